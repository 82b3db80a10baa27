"""Orthonormalization by matrix products, with a check and a safe fallback."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from toyfeat.linalg import dense
from toyfeat.linalg.precision import dot
from toyfeat.types import Array

_SHIFT_ULPS = 4
"""Shift of the first Cholesky factor, in ``rows * eps`` of a scaled Gram matrix.

Rounding can make the Gram matrix of ``l`` unit rows indefinite by a few ``l * eps``.
Fukaya et al. (2020) prove a larger shift; this factor was chosen by trial.
"""

_ORTHONORMAL_ULPS = 24
"""Largest accepted error of an inner product, in ``eps``; chosen by trial."""

_HOUSEHOLDER_ROUNDS = 3
"""Rounds of projection and Householder QR in the fallback.

What one round leaves may be rounding, and lie in the span of the other rows; the
next round removes that part.  The number was chosen by trial.
"""


@partial(jax.jit, static_argnames="rounds")
def orthonormal_rows(
    w: Array, against: Array | None = None, *, rounds: int = 3
) -> tuple[Array, Array]:
    r"""Orthonormalize the rows of ``w``, and make them orthogonal to other rows.

    Rounds of Cholesky QR, the first of them shifted, use matrix products only and
    work for any matrix of full rank.  The result is checked.  Where it fails
    (linearly dependent rows), Householder QR takes over and completes the rows
    with arbitrary directions.

    Args:
      w: ``[l, D]`` with ``l <= D``.
      against: ``[m, D]`` orthonormal rows that the result is orthogonal to, with
        ``m + l <= D``.
      rounds: 2 is enough for rows that are known to be well conditioned; from 3 on
        the first is shifted.

    Returns:
      ``[l, D]`` and ``[]`` bool, whether Householder QR was used.

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa (2020), "Shifted
      Cholesky QR for computing the QR factorization of ill-conditioned matrices".
    """
    others = jnp.zeros((0, w.shape[1]), w.dtype) if against is None else against
    eps = jnp.finfo(w.dtype).eps

    def cholesky_qr(w: Array, others: Array) -> Array:
        # First round: project, and shift so that the factor exists.
        w = _project_out(w, others)
        shift = _SHIFT_ULPS * len(w) * float(eps) if rounds > 2 else 0.0
        w = dot(inverse_factor(dot(w, w.T), shift), w)
        # The first factor amplified what was left of the other rows.
        w = _project_out(w, others)
        for _ in range(rounds - 1):
            w = dot(inverse_factor(dot(w, w.T)), w)
        return w

    def householder_qr(w: Array, others: Array, z: Array) -> Array:
        del z
        for _ in range(_HOUSEHOLDER_ROUNDS):
            w = dense.qr(_project_out(w, others).T)[0].T
        return w

    # Take the quick result if it is orthonormal to rounding.
    z = cholesky_qr(w, others)
    level = _ORTHONORMAL_ULPS * eps
    overlap = jnp.max(jnp.abs(dot(z, others.T)), initial=0)
    bad = ~((deviation(dot(z, z.T)) < level) & (overlap < level))
    return choose(bad, householder_qr, lambda w, others, z: z, w, others, z), bad


def inverse_factor(gram: Array, shift: float = 0.0) -> Array:
    """Invert the Cholesky factor of a Gram matrix: ``M`` with ``M gram M^T = 1``.

    Rows are scaled to unit length first, so that their lengths do not matter.
    Entries are not finite if the rows are linearly dependent.

    Args:
      gram: ``[l, l]``.
      shift: multiple of the identity added to the scaled matrix.

    Returns:
      ``[l, l]``, lower triangular.
    """
    size = jnp.sqrt(jnp.diagonal(gram))
    safe = jnp.where(size > 0, size, jnp.ones_like(size))
    scaled = gram / (safe[:, None] * safe[None, :]) + shift * identity(gram)
    inverse = jax.lax.platform_dependent(
        scaled, cpu=_invert_by_elimination, default=_invert_by_cholesky
    )
    return inverse / safe[None, :]


def _invert_by_cholesky(gram: Array) -> Array:
    """Factorize and solve by the platform's library."""
    lower = dense.cholesky(gram)
    return dense.solve_lower(lower, identity(gram))


def _invert_by_elimination(gram: Array) -> Array:
    """Invert the Cholesky factor by plain Gaussian elimination.

    On a CPU the threads of LAPACK's Cholesky go on spinning after the call and
    slow down the products that follow by more than this loop costs.  See
    "Orthonormal rows by elimination on CPUs" in docs/decisions/linalg.md.
    """
    index = jnp.arange(len(gram))

    def eliminate(j: Array, m: Array) -> Array:
        # Subtract multiples of row j from the rows below it ...
        row = jax.lax.dynamic_index_in_dim(m, j, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(row, j, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(m, j, axis=1, keepdims=False) / pivot
        below = jnp.where(index > j, column, jnp.zeros_like(column))
        # ... and divide row j itself by the root of its pivot.
        scaled = jnp.ones_like(pivot) - 1 / jnp.sqrt(pivot)
        factor = jnp.where(index == j, jnp.broadcast_to(scaled, below.shape), below)
        return m - factor[:, None] * row[None, :]

    # The right half starts as the identity and ends as the inverse factor.
    pair = jnp.concatenate([gram, identity(gram)], axis=1)
    return jax.lax.fori_loop(0, len(gram), eliminate, pair)[:, len(gram) :]


def deviation(gram: Array) -> Array:
    """Largest entry of ``|gram - 1|``, infinite if an entry is NaN."""
    gap = jnp.abs(gram - identity(gram))
    # A maximum may skip NaN on a CPU; a comparison does not.
    return jnp.where(jnp.all(gap < jnp.inf), jnp.max(gap), jnp.inf)


def polish_columns(x: Array) -> Array:
    """Improve nearly orthonormal columns by one Newton-Schulz step."""
    gram = dot(x.T, x)
    return x - dot(x, gram - identity(gram)) / 2


def identity(like: Array) -> Array:
    """Identity matrix of the width and dtype of another matrix."""
    return jnp.eye(like.shape[-1], dtype=like.dtype)


def choose(
    pred: Array,
    careful: Callable[..., Any],
    quick: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Run ``careful`` or ``quick``; a ``lax.cond`` that survives ``vmap``.

    A batch runs ``careful`` only if one of its members needs it.  (A batched
    ``lax.cond`` would run both sides for all members, always.)

    Args:
      pred: ``[]`` bool, whether ``careful`` is needed.
      careful: ``(*operands) -> result``; it must not close over arrays.
      quick: likewise, with a result of the same shapes.
      operands: arrays, or trees of arrays.

    Returns:
      The result of one of the two.
    """

    @custom_vmap
    def run(pred: Array, operands: Any) -> Any:
        return jax.lax.cond(pred, careful, quick, *operands)

    @run.def_vmap
    def _(size: int, batched: Any, pred: Array, operands: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        if not batched[0]:
            pred = jnp.broadcast_to(pred, (size,))

        def all_quick(pred: Array, operands: Any) -> Any:
            del pred
            return jax.vmap(
                lambda ops: quick(*ops), in_axes=(axes[1],), axis_size=size
            )(operands)

        def any_careful(pred: Array, operands: Any) -> Any:
            def select(pred: Array, ops: Any) -> Any:
                results = (quick(*ops), careful(*ops))
                return jax.tree.map(lambda q, c: jnp.where(pred, c, q), *results)

            return jax.vmap(select, in_axes=(0, axes[1]), axis_size=size)(
                pred, operands
            )

        # The batch as a whole is one condition again, for an outer vmap.
        out = choose(jnp.any(pred), any_careful, all_quick, pred, operands)
        return out, jax.tree.map(lambda _: True, out)

    return run(pred, tuple(operands))


def _project_out(w: Array, others: Array) -> Array:
    """Subtract from rows their projection on orthonormal other rows."""
    return w - dot(dot(w, others.T), others) if len(others) else w
