"""From a subspace and its image to singular values and vectors."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import choose, deviation, inverse_factor, polished
from toyfeat.linalg.precise import dot, nonzero
from toyfeat.linalg.spectral import signs_of
from toyfeat.linalg.subspaces import Subspace
from toyfeat.linalg.tall import (
    Axis,
    Tall,
    combined,
    householder,
    inner,
    orthonormal_columns,
    times,
)
from toyfeat.types import Array


class Extracted(NamedTuple):
    """Leading singular triplets of a matrix on a subspace.

    Attributes:
      u: tall ``[n, R]``, or ``None``.
      s: ``[R]``.
      vt: ``[R, dim]``.
      residual: ``[]``, estimate of ``|A - u s vt|_F``.
      fallback: ``[]`` bool, whether Householder's QR was used.
      orthogonality: ``[]``, how far ``u`` and ``vt`` are from orthonormal.
    """

    u: Tall | None
    s: Array
    vt: Array
    residual: Array
    fallback: Array
    orthogonality: Array


@partial(jax.jit, static_argnames=("rank", "axis", "with_u"))
def extracted(space: Subspace, rank: int, axis: Axis, *, with_u: bool) -> Extracted:
    r"""Rayleigh-Ritz: the singular triplets of ``A z^T z``.

    The images are turned by the ``rank`` leading eigenvectors of their Gram
    matrix and made orthonormal by one Cholesky factor, which also takes the
    singular values off the squares.  Where the squares have lost too much (the
    last kept value below 6e-3 of the first), all columns are made orthonormal
    with care instead.

    The residual is that of the probes, random rows :math:`\omega` that were
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
    factor = jnp.concatenate(factor, axis=1)
    y, gram, gap = combined(space.images, factor, space.seen, axis)
    low = ~((values[rank - 1] > 4e-5 * values[0]) & (deviation(gram) < 0.1))

    def signed(y: Tall, mix: Array, s: Array, turn: Array, z: Array) -> tuple:
        vt = polished(dot(turn, z).T).T
        off = deviation(dot(vt, vt.T))
        signs = signs_of(vt.T)
        if not with_u:
            return [], s, vt * signs[:, None], off
        # Signs and NaN go into the small factor, so that u is not touched again.
        finite = jnp.isfinite(jnp.sum(s)) & jnp.isfinite(jnp.sum(vt))
        mix = mix * jnp.where(finite, signs, jnp.nan)[None, :]
        u = times([y], mix)
        off = jnp.maximum(off, deviation(inner(u, u, axis)))
        return u, s, vt * signs[:, None], off

    def quick(space: Subspace, vectors: Array, *rest: Any) -> Any:
        _, y, gram, size, gap = rest
        inverse = inverse_factor(gram)
        left, s, right = _svd(dot(inverse, gram) * size[None, :])
        turn = dot(right, vectors[:, :rank].T)
        done = signed(y, dot(inverse.T, left), s, turn, space.z)
        return *done, gap, jnp.zeros((), bool)

    def careful(space: Subspace, vectors: Array, coded: Array, *rest: Any) -> Any:
        del rest
        q, r, bad = orthonormal_columns(times(space.images, vectors), axis)
        left, s, right = _svd(r)
        turn = dot(right[:rank], vectors.T)
        done = signed(q, left[:, :rank], s[:rank], turn, space.z)
        factor = dot(turn.T, dot(turn, coded))
        _, _, gap = combined(space.images, factor, space.seen, axis)
        return *done, gap, bad

    operands = (space, vectors, coded, y, gram, size, gap)
    u, s, vt, off, gap, bad = choose(low, careful, quick, *operands)
    error = jnp.sqrt(gap / max(len(space.probes), 1))
    return Extracted(
        u=u if with_u else None,
        s=s * space.scale,
        vt=vt,
        residual=error * space.scale,
        fallback=space.fallback | bad,
        orthogonality=off,
    )


def _svd(square: Array) -> tuple[Array, Array, Array]:
    """Dense decomposition, its vectors a step nearer to orthonormal.

    The values are the lengths of the turned columns: in a matrix that is graded,
    as these are, small ones keep their digits so, which LAPACK's do not.
    """
    left, _, right = jnp.linalg.svd(square, full_matrices=False)
    right = polished(right.T).T
    turned = dot(square, right.T)
    size = nonzero(jnp.max(jnp.abs(turned), axis=0, initial=0))
    lengths = size * jnp.sqrt(jnp.sum((turned / size[None, :]) ** 2, axis=0))
    order = jnp.argsort(-lengths)  # equal ones may have changed places
    return polished(left)[:, order], lengths[order], right[order]


def all_right_vectors(y: Tall, axis: Axis) -> tuple[Array, Array]:
    """All singular values, and right vectors as rows, of a tall matrix."""
    whole = y[0] if axis is None and len(y) == 1 else householder(y, axis)[1]
    _, s, right = jnp.linalg.svd(whole, full_matrices=False)
    return s, right
