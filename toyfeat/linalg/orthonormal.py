"""Orthonormal rows by matrix products alone, checked, with a safe way out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from toyfeat.linalg.precise import dot
from toyfeat.types import Array


@partial(jax.jit, static_argnames="rounds")
def orthonormal_rows(
    w: Array, against: Array | None = None, *, rounds: int = 3
) -> tuple[Array, Array]:
    r"""Orthonormal rows that span the rows of ``w``, and are orthogonal to others.

    Three rounds of Cholesky QR, the first of them shifted, need products only and
    stand any full rank; where they fail (rows that depend on each other), it is
    Householder's QR, which completes the rows with arbitrary directions.

    Args:
      w: ``[l, D]`` with ``l <= D``.
      against: ``[m, D]`` orthonormal rows that the result is orthogonal to, with
        ``m + l <= D``.
      rounds: 2 will do for rows that are known to be well conditioned; from 3 on
        the first is shifted.

    Returns:
      ``[l, D]`` and ``[]`` bool, whether Householder's QR was used.

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa (2020), "Shifted
      Cholesky QR for computing the QR factorization of ill-conditioned matrices".
    """
    others = jnp.zeros((0, w.shape[1]), w.dtype) if against is None else against

    def quick(w: Array, others: Array) -> Array:
        w = _without(w, others)
        shift = 4 * len(w) * float(jnp.finfo(w.dtype).eps) if rounds > 2 else 0.0
        w = dot(inverse_factor(dot(w, w.T), shift), w)
        w = _without(w, others)
        for _ in range(rounds - 1):
            w = dot(inverse_factor(dot(w, w.T)), w)
        return w

    def careful(w: Array, others: Array, z: Array) -> Array:
        del z
        for _ in range(3):  # what is left may be rounding, and lie in their span
            w = jnp.linalg.qr(_without(w, others).T)[0].T
        return w

    z = quick(w, others)
    level = 24 * jnp.finfo(w.dtype).eps
    overlap = jnp.max(jnp.abs(dot(z, others.T)), initial=0)
    bad = ~((deviation(dot(z, z.T)) < level) & (overlap < level))
    return choose(bad, careful, lambda w, others, z: z, w, others, z), bad


def inverse_factor(gram: Array, shift: float = 0.0) -> Array:
    """``[l, l]`` ``M`` with ``M gram M^T = 1``: the inverse of a Cholesky factor.

    The rows are scaled to one length first, so that their sizes do not matter;
    entries are not finite if the rows depend on each other.
    """
    size = jnp.sqrt(jnp.diagonal(gram))
    safe = jnp.where(size > 0, size, jnp.ones_like(size))
    one = identity(gram)
    scaled = gram / (safe[:, None] * safe[None, :]) + shift * one
    inverse = jax.lax.platform_dependent(scaled, cpu=_eliminated, default=_solved)
    return inverse / safe[None, :]


def _solved(gram: Array) -> Array:
    lower = jnp.linalg.cholesky(gram)
    one = identity(gram)
    return jax.scipy.linalg.solve_triangular(lower, one, lower=True)


def _eliminated(gram: Array) -> Array:
    """The same by plain elimination.

    On a CPU the threads of LAPACK's Cholesky go on spinning after the call and
    slow down the products that follow by more than this loop costs.
    """
    index = jnp.arange(len(gram))

    def step(j: Array, m: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(m, j, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(row, j, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(m, j, axis=1, keepdims=False) / pivot
        scaled = jnp.ones_like(pivot) - 1 / jnp.sqrt(pivot)
        below = jnp.where(index > j, column, jnp.zeros_like(column))
        factor = jnp.where(index == j, jnp.broadcast_to(scaled, below.shape), below)
        return m - factor[:, None] * row[None, :]

    pair = jnp.concatenate([gram, identity(gram)], axis=1)
    return jax.lax.fori_loop(0, len(gram), step, pair)[:, len(gram) :]


def deviation(gram: Array) -> Array:
    """Largest entry of ``|gram - 1|``, infinite if one is NaN."""
    gap = jnp.abs(gram - identity(gram))
    # A maximum may step over NaN on a CPU; a comparison does not.
    return jnp.where(jnp.all(gap < jnp.inf), jnp.max(gap), jnp.inf)


def polished(x: Array) -> Array:
    """One Newton step from columns that are nearly orthonormal to the nearest."""
    gram = dot(x.T, x)
    return x - dot(x, gram - identity(gram)) / 2


def identity(like: Array) -> Array:
    """Identity matrix of the width and dtype of another."""
    return jnp.eye(like.shape[-1], dtype=like.dtype)


def choose(
    pred: Array,
    careful: Callable[..., Any],
    quick: Callable[..., Any],
    *operands: Any,
) -> Any:
    """``lax.cond`` that stays a condition under ``vmap``.

    A batch runs ``careful`` only if one of its members needs it (a batched
    ``lax.cond`` would run both sides for all, always).  Both functions may use
    nothing but their operands.
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

        def some_careful(pred: Array, operands: Any) -> Any:
            def one(pred: Array, ops: Any) -> Any:
                kept = (quick(*ops), careful(*ops))
                return jax.tree.map(lambda q, c: jnp.where(pred, c, q), *kept)

            return jax.vmap(one, in_axes=(0, axes[1]), axis_size=size)(pred, operands)

        out = choose(jnp.any(pred), some_careful, all_quick, pred, operands)
        return out, jax.tree.map(lambda _: True, out)

    return run(pred, tuple(operands))


def _without(w: Array, others: Array) -> Array:
    """What is left of rows outside the span of orthonormal others."""
    return w - dot(dot(w, others.T), others) if len(others) else w
