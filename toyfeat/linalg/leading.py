"""The leading eigenvectors of a Gram matrix, without all the others."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import choose, orthonormal_rows, polished
from toyfeat.linalg.precise import dot
from toyfeat.types import Array

_STEPS = 4
_ROUNDS = 4


class _State(NamedTuple):
    rows: Array
    values: Array
    done: Array
    rounds: Array


def leading(start: Array, gram: Array, rank: int) -> tuple[Array, Array]:
    r"""Leading eigenvalues, and eigenvectors as rows, of a Gram matrix.

    A block Krylov space, started again from what it found until the residuals of
    the first ``rank`` are below :math:`10^{-5} \sqrt{\lambda_j \lambda_1}`, where no
    singular value is wrong by more than 5e-6 of the first even if its neighbours
    are as near as can be.  All eigenvectors, if it does not get there or they are
    nearly as cheap; a fifth to two thirds of the time where it does.

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
    width, dim = start.shape
    gram = (gram + gram.T) / 2
    if 5 * width > dim or (dim <= 1024 and 10 * width > dim):
        return _all(gram, width)
    state = _State(
        rows=start,
        values=jnp.zeros(width, gram.dtype),
        done=jnp.zeros((), bool),
        rounds=jnp.zeros((), int),
    )

    def unfinished(state: _State) -> Array:
        return ~state.done & (state.rounds < _ROUNDS)

    def better(state: _State) -> _State:
        return _State(*_by_krylov(gram, state.rows, rank), state.rounds + 1)

    state = jax.lax.while_loop(unfinished, better, state)

    def careful(gram: Array, *found: Any) -> Any:
        del found
        return _all(gram, width)

    kept = (gram, state.values, state.rows)
    return choose(~state.done, careful, lambda _, *found: found, *kept)


def _by_krylov(gram: Array, z: Array, rank: int) -> tuple[Array, Array, Array]:
    """Ritz values and vectors in the space of ``z, z G, z G^2, ...``."""
    width, basis, images = len(z), z, []
    for _ in range(_STEPS):
        images.append(dot(z, gram))
        z, _ = orthonormal_rows(images[-1], basis)
        basis = jnp.concatenate([basis, z])
    images.append(dot(z, gram))
    inner = dot(jnp.concatenate(images), basis.T)
    theta, vectors = jnp.linalg.eigh((inner + inner.T) / 2)
    theta, vectors = theta[::-1], vectors[:, ::-1][:, :width]
    # Only the last image leaves the space.  What it leaves by shows residuals far
    # below the rounding of a product with the whole matrix.
    outside = images[-1] - dot(dot(images[-1], basis.T), basis)
    gaps = dot(vectors[-width:, :rank].T, outside)
    floor = jnp.maximum(theta[:rank], 4e-5 * theta[0])
    level = 1e-5 * jnp.sqrt(floor * theta[0])
    done = jnp.all(jnp.sqrt(jnp.sum(gaps**2, axis=1)) <= level)
    rows = polished(dot(vectors.T, basis).T).T
    # Quotients of the vectors themselves: those of the space mix in rounding of
    # the size of the first value.
    values = jnp.maximum(jnp.sum(dot(rows, gram) * rows, axis=1), 0)
    order = jnp.argsort(-values)  # equal ones may have changed places
    return rows[order], values[order], done


def _all(gram: Array, width: int) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(gram)
    return jnp.maximum(values[::-1][:width], 0), vectors[:, ::-1][:, :width].T
