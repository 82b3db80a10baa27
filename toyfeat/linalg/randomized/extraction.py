"""Singular values and vectors of a matrix on a subspace (Rayleigh-Ritz)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg import dense
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


_GROWTH_ULPS = 4
"""Growth of a squared value that may be rounding, in ``eps`` of the first; by trial."""

_SLOWEST = 0.99
"""Largest ratio of two steps that is believed; one of 1 would never end."""


class Triplets(NamedTuple):
    """Leading singular triplets of a matrix on a subspace.

    Attributes:
      u: tall ``[n, R]``, or ``None``.
      s: ``[R]``.
      vt: ``[R, dim]``.
      residual: ``[]``, estimate of ``|A - u s vt|_F``.
      fallback: ``[]`` bool, whether Householder QR was used.
      orthogonality: ``[]``, how far ``u`` and ``vt`` are from orthonormal.
      error: ``[]``, estimate of the largest error of ``s``, a share of the first; NaN
        if the subspace tells nothing of it.
    """

    u: Tall | None
    s: Array
    vt: Array
    residual: Array
    fallback: Array
    orthogonality: Array
    error: Array


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
    values, vectors = dense.eigh(space.gram)
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
    careful = partial(_by_qr, rank=rank, axis=axis, with_u=with_u)
    quick = partial(_by_one_cholesky_factor, rank=rank, axis=axis, with_u=with_u)
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
        error=_error_of_values(space, values, leading, s),
    )


def _by_one_cholesky_factor(
    space: Subspace,
    vectors: Array,
    coded: Array,
    y: Tall,
    gram: Array,
    size: Array,
    gap: Array,
    *,
    rank: int,
    axis: Axis,
    with_u: bool,
) -> Any:
    """Triplets from one Cholesky factor of the turned images."""
    del coded
    inverse = inverse_factor(gram)
    left, s, right = _svd(dot(inverse, gram) * size[None, :])
    turn = dot(right, vectors[:, :rank].T)
    mix = dot(inverse.T, left)
    triplets = _orient(y, mix, s, turn, space.z, axis=axis, with_u=with_u)
    return *triplets, gap, jnp.zeros((), bool)


def _by_qr(
    space: Subspace,
    vectors: Array,
    coded: Array,
    *unused: Any,
    rank: int,
    axis: Axis,
    with_u: bool,
) -> Any:
    """Triplets from a QR of all turned images; the probes are compared once more."""
    del unused
    # Decompose the triangular factor.
    images = combine_columns(space.images, vectors)
    q, r, bad = orthonormal_columns(images, axis)
    left, s, right = _svd(r)
    # Its leading vectors, back in the space.
    turn = dot(right[:rank], vectors.T)
    mix = left[:, :rank]
    triplets = _orient(q, mix, s[:rank], turn, space.z, axis=axis, with_u=with_u)
    # What the projection leaves of the probes.
    factor = dot(turn.T, dot(turn, coded))
    _, _, gap = combine_and_compare(space.images, factor, space.probe_images, axis)
    return *triplets, gap, bad


def _orient(
    y: Tall,
    mix: Array,
    s: Array,
    turn: Array,
    z: Array,
    *,
    axis: Axis,
    with_u: bool,
) -> tuple:
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


def _error_of_values(space: Subspace, values: Array, leading: Array, s: Array) -> Array:
    r"""Estimate the largest error of the singular values, a share of the first.

    The last step of an iteration tells how far it is from its end.  In a Krylov space
    a vector whose last block holds a share ``f`` of its square had, without that
    block, a squared value that was wrong by about ``f``.  If the last two blocks
    hold ``g``, a step takes that error down by ``f / g``, and the next one would by
    at least as much: what is left is ``f^2 / g``.  An iteration tells the same by
    the growth of its values.

    Args:
      space: the subspace.
      values: ``[L]``, squared singular values on it, largest first.
      leading: ``[L, R]``, eigenvectors of the leading ones.
      s: ``[R]``, singular values, which are right where their squares are rounding.

    Returns:
      ``[]``; 0 if the space is complete, NaN if there was no step.
    """
    zero, rank = jnp.zeros((), values.dtype), leading.shape[1]
    tiny = float(jnp.finfo(values.dtype).tiny)
    if len(space.z) == space.z.shape[1]:
        return zero
    first = jnp.maximum(values[0], tiny)
    if len(space.images) > 1:
        # Weights of the last block, and of the last two.
        width = space.images[-1][0].shape[1]
        last = jnp.sum(leading[-width:] ** 2, axis=0)
        both = jnp.sum(leading[-2 * width :] ** 2, axis=0)
        share = last**2 / jnp.maximum(both, tiny)
        return jnp.max(share * s) / nonzero(s[0]) / 2
    if not space.history:
        return zero * jnp.nan
    # Growth in the last step, and in the one before it, beyond rounding.
    steps = jnp.stack([x[:rank] for x in space.history] + [values[:rank]])
    rounding = _GROWTH_ULPS * float(jnp.finfo(values.dtype).eps) * first
    growth = jnp.maximum(jnp.diff(steps, axis=0) - rounding, 0)
    ratio = growth[-1] / jnp.maximum(growth[max(len(growth) - 2, 0)], tiny)
    ratio = jnp.clip(ratio, 0.5, _SLOWEST)
    left = growth[-1] * ratio / (1 - ratio)
    # Squares of small values are known to the rounding of the first only.
    floor = jnp.maximum(values[:rank], GRAM_CUTOFF * first)
    return jnp.max(left / jnp.sqrt(floor * first)) / 2


def _svd(square: Array) -> tuple[Array, Array, Array]:
    """Dense SVD with polished vectors and accurate small values.

    The values are the lengths of the turned columns.  In a graded matrix, as these
    are, small ones keep their digits that way; LAPACK's do not.  See "Singular
    values of the small matrix" in docs/decisions/linalg.md.
    """
    left, _, right = dense.svd(square)
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
    _, s, right = dense.svd(matrix)
    return s, right
