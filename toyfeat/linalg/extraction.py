"""From a subspace and its image to singular values and vectors."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import choose, deviation, inverse_factor, polished
from toyfeat.linalg.precise import dot
from toyfeat.linalg.subspaces import Subspace
from toyfeat.linalg.tall import (
    Axis,
    Tall,
    householder,
    inner,
    orthonormal_columns,
    summed,
    times,
)
from toyfeat.types import Array


class Extracted(NamedTuple):
    """Leading singular triplets of a matrix on a subspace, not yet signed.

    Attributes:
      u: tall ``[n, R]``, or ``None``.
      s: ``[R]``.
      vt: ``[R, dim]``.
      residual: ``[]``, estimate of ``|A - u s vt|_F``.
      fallback: ``[]`` bool, whether Householder's QR was used.
    """

    u: Tall | None
    s: Array
    vt: Array
    residual: Array
    fallback: Array


@partial(jax.jit, static_argnames=("rank", "axis", "with_u"))
def extracted(space: Subspace, rank: int, axis: Axis, *, with_u: bool) -> Extracted:
    r"""Rayleigh-Ritz: the singular triplets of ``A z^T z``.

    The images are turned by the ``rank`` leading eigenvectors of their Gram
    matrix and made orthonormal by one Cholesky factor, which also takes the
    singular values off the squares.  Where the squares have lost too much (the
    last kept value below 6e-3 of the first), all columns are made orthonormal
    with care instead.

    The residual is that of the probes, Gaussian rows :math:`\omega` that were
    left out of the subspace: the mean of :math:`|A \omega - A V V^\top \omega|^2`
    is an unbiased estimate of the squared Frobenius error.

    References:
      Epperly and Tropp (2024), "Efficient error and variance estimation for
      randomized matrix computations": the leave-one-out estimate, here with
      the vectors that are left out fixed beforehand.
    """
    values, vectors = jnp.linalg.eigh(space.gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    size = jnp.sqrt(jnp.maximum(values[:rank], jnp.finfo(values.dtype).tiny))
    kept = vectors[:, :rank]
    coded = dot(space.z, space.probes.T)
    factor = [kept / size[None, :], dot(kept, dot(kept.T, coded))]
    columns = times(space.images, jnp.concatenate(factor, axis=1))
    y = [x[:, :rank] for x in columns]
    shadow = [x[:, rank:] for x in columns]
    gram = inner(y, y, axis)
    low = ~((values[rank - 1] > 4e-5 * values[0]) & (deviation(gram) < 0.1))

    def quick(images: list[Tall], vectors: Array, coded: Array, *rest: Any) -> tuple:
        del images, coded
        y, gram, size, shadow = rest
        inverse = inverse_factor(gram)
        left, s, right = _svd(dot(inverse, gram) * size[None, :])
        u = times([y], dot(inverse.T, left)) if with_u else []
        return u, s, dot(right, vectors[:, :rank].T), shadow, jnp.zeros((), bool)

    def careful(images: list[Tall], vectors: Array, coded: Array, *_: Any) -> tuple:
        q, r, bad = orthonormal_columns(times(images, vectors), axis)
        left, s, right = _svd(r)
        u = times([q], left[:, :rank]) if with_u else []
        turn = dot(right[:rank], vectors.T)
        shadow = times(images, dot(turn.T, dot(turn, coded)))
        return u, s[:rank], turn, shadow, bad

    operands = (space.images, vectors, coded, y, gram, size, shadow)
    u, s, turn, shadow, bad = choose(low, careful, quick, *operands)
    gaps = [a - b for a, b in zip(space.seen, shadow, strict=True)]
    squares = jnp.stack([jnp.sum(gap**2) for gap in gaps]).sum()
    error = jnp.sqrt(summed(squares, axis) / max(len(space.probes), 1))
    return Extracted(
        u=u if with_u else None,
        s=s * space.scale,
        vt=polished(dot(turn, space.z).T).T,
        residual=error * space.scale,
        fallback=space.fallback | bad,
    )


def _svd(square: Array) -> tuple[Array, Array, Array]:
    """Dense decomposition, its vectors a step nearer to orthonormal."""
    left, s, right = jnp.linalg.svd(square, full_matrices=False)
    return polished(left), s, polished(right.T).T


def all_right_vectors(y: Tall, axis: Axis) -> tuple[Array, Array]:
    """All singular values, and right vectors as rows, of a tall matrix."""
    whole = y[0] if axis is None and len(y) == 1 else householder(y, axis)[1]
    _, s, right = jnp.linalg.svd(whole, full_matrices=False)
    return s, right
