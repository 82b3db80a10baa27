"""Leading eigenvectors of a Gram matrix by a restarted block Krylov space."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg import dense
from toyfeat.linalg.orthonormal import choose, orthonormal_rows, polish_columns
from toyfeat.linalg.precision import GRAM_CUTOFF, dot
from toyfeat.types import Array

_KRYLOV_STEPS = 4
"""Products per restart; the space has one block more.  Chosen by trial."""

_MAX_RESTARTS = 4
"""Restarts before all eigenvectors are computed instead; chosen by trial."""

_DENSE_WIDTHS, _DENSE_WIDTHS_SMALL = _KRYLOV_STEPS + 1, 10
"""Below this many block widths all eigenvectors are computed instead.

The first is where the Krylov space does not fit any more.  The second is for
matrices up to ``_SMALL_DIM``: see "Leading eigenvectors of a Gram matrix" in
docs/decisions/linalg.md.
"""

_SMALL_DIM = 1024
"""Largest dimension of that measurement."""

_RESIDUAL = 1e-5
"""Accepted residual of an eigenpair, a share of ``sqrt(value * first value)``.

A singular value ``s`` changes by at most ``|residual| / (2 s)``, even next to equal
neighbours: half of this share, 5e-6 of the first value.
"""


class _RestartState(NamedTuple):
    rows: Array
    values: Array
    done: Array
    restarts: Array


def leading_eigenvectors(start: Array, gram: Array, rank: int) -> tuple[Array, Array]:
    r"""Leading eigenvalues, and eigenvectors as rows, of a Gram matrix.

    A block Krylov space, restarted from its own Ritz vectors until the residuals
    of the first ``rank`` are a small share of :math:`\sqrt{\lambda_j \lambda_1}`
    (``_RESIDUAL``).  If that is not reached, or if a dense decomposition is nearly
    as cheap, all eigenvectors are computed.

    Args:
      start: ``[l, dim]`` orthonormal rows, random.
      gram: ``[dim, dim]`` positive semi-definite, about 1 in size.
      rank: how many have to be right, at most ``l``.

    Returns:
      ``[l]``, descending, and ``[l, dim]``.

    References:
      Musco and Musco (2015), "Randomized block Krylov methods for stronger and
      faster approximate singular value decomposition".
    """
    # Wide blocks: the dense decomposition at once.
    width, dim = start.shape
    gram = (gram + gram.T) / 2
    small = dim <= _SMALL_DIM and _DENSE_WIDTHS_SMALL * width > dim
    if _DENSE_WIDTHS * width > dim or small:
        return _dense_eigenpairs(gram, width)

    # Restart until the residuals are small.
    state = _RestartState(
        rows=start,
        values=jnp.zeros(width, gram.dtype),
        done=jnp.zeros((), bool),
        restarts=jnp.zeros((), int),
    )

    def unfinished(state: _RestartState) -> Array:
        return ~state.done & (state.restarts < _MAX_RESTARTS)

    def restart(state: _RestartState) -> _RestartState:
        return _RestartState(*_ritz_pairs(gram, state.rows, rank), state.restarts + 1)

    state = jax.lax.while_loop(unfinished, restart, state)

    # Without convergence, the dense decomposition.
    def careful(gram: Array, *unused: Any) -> Any:
        del unused
        return _dense_eigenpairs(gram, width)

    operands = (gram, state.values, state.rows)
    return choose(~state.done, careful, lambda _, *pairs: pairs, *operands)


def _ritz_pairs(gram: Array, z: Array, rank: int) -> tuple[Array, Array, Array]:
    """Ritz vectors and values in the span of ``z, z G, z G^2, ...``.

    Returns:
      Vectors ``[l, dim]``, values ``[l]``, and whether the first ``rank`` converged.
    """
    # Build the space, block by block.
    width, basis, images = len(z), z, []
    for _ in range(_KRYLOV_STEPS):
        images.append(dot(z, gram))
        z, _ = orthonormal_rows(images[-1], basis)
        basis = jnp.concatenate([basis, z])
    images.append(dot(z, gram))

    # Eigenvectors of the matrix on the space.
    inner = dot(jnp.concatenate(images), basis.T)
    theta, vectors = dense.eigh((inner + inner.T) / 2)
    theta, vectors = theta[::-1], vectors[:, ::-1][:, :width]

    # Residuals.  Only the last image leaves the space, and the part outside shows
    # residuals far below the rounding of a product with the full matrix.
    outside = images[-1] - dot(dot(images[-1], basis.T), basis)
    gaps = dot(vectors[-width:, :rank].T, outside)
    floor = jnp.maximum(theta[:rank], GRAM_CUTOFF * theta[0])
    level = _RESIDUAL * jnp.sqrt(floor * theta[0])
    done = jnp.all(jnp.sqrt(jnp.sum(gaps**2, axis=1)) <= level)

    # Rayleigh quotients of the single vectors.  The Ritz values of the space carry
    # rounding of the size of the first value.
    rows = polish_columns(dot(vectors.T, basis).T).T
    values = jnp.maximum(jnp.sum(dot(rows, gram) * rows, axis=1), 0)
    order = jnp.argsort(-values)  # equal values may have changed places
    return rows[order], values[order], done


def _dense_eigenpairs(gram: Array, width: int) -> tuple[Array, Array]:
    """The first ``width`` pairs of a dense decomposition."""
    values, vectors = dense.eigh(gram)
    return jnp.maximum(values[::-1][:width], 0), vectors[:, ::-1][:, :width].T
