"""Singular values and vectors of a matrix on a subspace (Rayleigh-Ritz)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import (
    choose,
    deviation,
    inverse_factor,
    polish_columns,
)
from toyfeat.linalg.precision import GRAM_CUTOFF, Axis, dot, nonzero
from toyfeat.linalg.psd import column_signs
from toyfeat.linalg.randomized.subspaces import Subspace
from toyfeat.linalg.randomized.tall import (
    Tall,
    combine_and_compare,
    combine_columns,
    householder,
    inner,
    orthonormal_columns,
)
from toyfeat.types import Array

_MAX_DEVIATION = 0.1
"""How far turned images may be from orthonormal for a single Cholesky factor.

Their Gram matrix is then so well conditioned that one round is right to rounding;
chosen by trial.
"""


class Triplets(NamedTuple):
    """Leading singular triplets of a matrix on a subspace.

    Attributes:
      u: tall ``[n, R]``, or ``None``.
      s: ``[R]``.
      vt: ``[R, dim]``.
      residual: ``[]``, estimate of ``|A - u s vt|_F``.
      fallback: ``[]`` bool, whether Householder QR was used.
      orthogonality: ``[]``, how far ``u`` and ``vt`` are from orthonormal.
    """

    u: Tall | None
    s: Array
    vt: Array
    residual: Array
    fallback: Array
    orthogonality: Array


@partial(jax.jit, static_argnames=("rank", "axis", "with_u"))
def rayleigh_ritz(space: Subspace, rank: int, axis: Axis, *, with_u: bool) -> Triplets:
    r"""Compute the leading singular triplets of ``A z^T z``.

    The images are turned by the ``rank`` leading eigenvectors of their Gram
    matrix and made orthonormal by one Cholesky factor, which also gives singular
    values that are not roots of squares.  Where squares have lost too much (see
    ``GRAM_CUTOFF``), all columns are made orthonormal by a checked QR instead.

    The residual is that of the probes, random rows :math:`\omega` that were
    left out of the subspace: the mean of :math:`|A \omega - A V V^\top \omega|^2`
    is an unbiased estimate of the squared Frobenius error.

    Args:
      space: the subspace and the images of its rows.
      rank: how many triplets ``R``.
      axis: the mesh axis of the rows.
      with_u: whether left vectors are computed.

    Returns:
      The triplets and their checks.

    References:
      Epperly and Tropp (2024), "Efficient error and variance estimation for
      randomized matrix computations": the leave-one-out estimate.  Here the
      vectors that are left out are fixed beforehand.
    """
    # Eigenvectors of the Gram matrix of the images.
    values, vectors = jnp.linalg.eigh(space.gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    size = jnp.sqrt(jnp.maximum(values[:rank], jnp.finfo(values.dtype).tiny))
    leading = vectors[:, :rank]

    # One pass over the images: turn them, and compare with those of the probes.
    coded = dot(space.z, space.probes.T)
    factor = [leading / size[None, :], dot(leading, dot(leading.T, coded))]
    factor = jnp.concatenate(factor, axis=1)
    y, gram, gap = combine_and_compare(space.images, factor, space.probe_images, axis)

    # Are the squares good enough for one Cholesky factor?
    trusted = values[rank - 1] > GRAM_CUTOFF * values[0]
    low = ~(trusted & (deviation(gram) < _MAX_DEVIATION))

    def orient(y: Tall, mix: Array, s: Array, turn: Array, z: Array) -> tuple:
        """Turn ``y`` and ``z`` into signed vectors, and check them."""
        vt = polish_columns(dot(turn, z).T).T
        off = deviation(dot(vt, vt.T))
        signs = column_signs(vt.T)
        if not with_u:
            return [], s, vt * signs[:, None], off
        # Signs and NaN go into the small factor, so that u is not touched again.
        finite = jnp.isfinite(jnp.sum(s)) & jnp.isfinite(jnp.sum(vt))
        mix = mix * jnp.where(finite, signs, jnp.nan)[None, :]
        u = combine_columns([y], mix)
        off = jnp.maximum(off, deviation(inner(u, u, axis)))
        return u, s, vt * signs[:, None], off

    def quick(
        space: Subspace,
        vectors: Array,
        coded: Array,
        y: Tall,
        gram: Array,
        size: Array,
        gap: Array,
    ) -> Any:
        """One Cholesky factor of the turned images."""
        del coded
        inverse = inverse_factor(gram)
        left, s, right = _svd(dot(inverse, gram) * size[None, :])
        turn = dot(right, vectors[:, :rank].T)
        triplets = orient(y, dot(inverse.T, left), s, turn, space.z)
        return *triplets, gap, jnp.zeros((), bool)

    def careful(space: Subspace, vectors: Array, coded: Array, *unused: Any) -> Any:
        """QR of all turned images; the probes are compared once more."""
        del unused
        images = combine_columns(space.images, vectors)
        q, r, bad = orthonormal_columns(images, axis)
        left, s, right = _svd(r)
        turn = dot(right[:rank], vectors.T)
        triplets = orient(q, left[:, :rank], s[:rank], turn, space.z)
        factor = dot(turn.T, dot(turn, coded))
        _, _, gap = combine_and_compare(space.images, factor, space.probe_images, axis)
        return *triplets, gap, bad

    operands = (space, vectors, coded, y, gram, size, gap)
    u, s, vt, off, gap, bad = choose(low, careful, quick, *operands)

    # Back from units of the scale; the mean over the probes is the residual.
    error = jnp.sqrt(gap / max(len(space.probes), 1))
    return Triplets(
        u=u if with_u else None,
        s=s * space.scale,
        vt=vt,
        residual=error * space.scale,
        fallback=space.fallback | bad,
        orthogonality=off,
    )


def _svd(square: Array) -> tuple[Array, Array, Array]:
    """Dense SVD with polished vectors and accurate small values.

    The values are the lengths of the turned columns.  In a graded matrix, as these
    are, small ones keep their digits that way; LAPACK's do not.  See "Singular
    values of the small matrix" in docs/decisions/linalg.md.
    """
    left, _, right = jnp.linalg.svd(square, full_matrices=False)
    right = polish_columns(right.T).T
    # Lengths of the columns, safe from over- and underflow.
    turned = dot(square, right.T)
    size = nonzero(jnp.max(jnp.abs(turned), axis=0, initial=0))
    lengths = size * jnp.sqrt(jnp.sum((turned / size[None, :]) ** 2, axis=0))
    order = jnp.argsort(-lengths)  # equal values may have changed places
    return polish_columns(left)[:, order], lengths[order], right[order]


def all_right_vectors(y: Tall, axis: Axis) -> tuple[Array, Array]:
    """All singular values, and right vectors as rows, of a tall matrix."""
    matrix = y[0] if axis is None and len(y) == 1 else householder(y, axis)[1]
    _, s, right = jnp.linalg.svd(matrix, full_matrices=False)
    return s, right
