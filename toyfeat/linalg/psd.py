"""Eigendecomposition of positive semi-definite matrices, with a numerical rank."""

from typing import NamedTuple

import jax.numpy as jnp

from toyfeat.checks import check_array, check_int
from toyfeat.linalg import dense
from toyfeat.linalg.precision import HIGHEST, nonzero
from toyfeat.types import Array


class Spectrum(NamedTuple):
    """Leading eigenpairs, zero past the numerical rank.

    Attributes:
      values: ``[R]``, descending.
      vectors: ``[D, R]``, orthonormal columns where ``values`` is not zero.
      rank: ``[]`` int32, how many of the ``R`` values lie above ``cut``.
      cut: ``[]``, the level below which a value is rounding.
    """

    values: Array
    vectors: Array
    rank: Array
    cut: Array


def psd_spectrum(
    matrix: Array, rank: int | None = None, *, floor: Array | float = 0.0
) -> Spectrum:
    r"""Compute the leading eigenpairs of a positive semi-definite matrix.

    Eigenvalues up to :math:`\max(D \epsilon \lambda_1, \text{floor})` count as
    zero.  The matrix is scaled by its largest entry first, so neither tiny nor
    huge matrices under- or overflow.  Entries that are not finite stay visible:
    they make the values NaN.

    Args:
      matrix: ``[D, D]``; only its symmetric part counts.
      rank: how many pairs ``R`` to compute, all by default.
      floor: an absolute level below which eigenvalues are known to be rounding,
        for matrices that are differences of larger ones.

    Returns:
      Pairs with the signs of :func:`fix_signs`.

    Raises:
      ValueError: if ``matrix`` is not square or ``rank`` not in ``1 .. D``.

    Example:
      >>> import jax.numpy as jnp
      >>> spectrum = psd_spectrum(jnp.diag(jnp.array([1.0, 0.0, 4.0])), 2)
      >>> spectrum.values.tolist(), int(spectrum.rank)
      ([4.0, 1.0], 2)
    """
    hint = "convert it with jnp.asarray"
    check_array("psd_spectrum", "matrix", matrix, hint=hint, floats=True)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"psd_spectrum: wanted a square matrix, got shape {matrix.shape}"
        )
    dim = matrix.shape[0]
    rank = dim if rank is None else rank
    about = ", the width of the matrix"
    rank = check_int("psd_spectrum", "rank", rank, most=dim, about=about)

    # Decompose the scaled, symmetric part; largest eigenvalue first.
    scale = jnp.max(jnp.abs(matrix))
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    scaled = matrix / scale
    values, vectors = dense.eigh((scaled + scaled.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]

    # The level of rounding.
    level = dim * jnp.finfo(matrix.dtype).eps * values[0]
    cut = jnp.maximum(level, jnp.asarray(floor, matrix.dtype) / scale)

    # LAPACK may return numbers for a matrix with NaN in it; NaN has to be seen.
    values = jnp.where(jnp.all(jnp.isfinite(matrix)), values, jnp.nan)
    significant = ~(values[:rank] <= cut)  # true for NaN
    zero = jnp.zeros((), matrix.dtype)
    signed = fix_signs(vectors[:, :rank])
    return Spectrum(
        values=jnp.where(significant, values[:rank] * scale, zero),
        vectors=jnp.where(significant[None, :], signed, zero),
        rank=jnp.sum(significant, dtype=jnp.int32),
        cut=cut * scale,
    )


def fix_signs(vectors: Array) -> Array:
    """Flip columns so that the largest entry of each, by magnitude, is positive.

    Args:
      vectors: ``[D, R]``.

    Returns:
      ``[D, R]``, the same columns up to sign.
    """
    return vectors * column_signs(vectors)[None, :]


def column_signs(vectors: Array) -> Array:
    """Sign of the largest entry of each column, by magnitude; 1 for zeros."""
    largest = jnp.argmax(jnp.abs(vectors), axis=0)
    return nonzero(jnp.sign(vectors[largest, jnp.arange(vectors.shape[1])]))


def psd_inverse(matrix: Array) -> Array:
    """Pseudo-inverse of a positive semi-definite matrix.

    Args:
      matrix: ``[D, D]``.

    Returns:
      ``[D, D]``, with eigenvalues that count as zero left at zero.
    """
    values, vectors, _, _ = psd_spectrum(matrix)
    safe = jnp.where(values == 0, jnp.ones_like(values), values)
    inverse = jnp.where(values == 0, jnp.zeros_like(values), 1 / safe)
    return jnp.matmul(vectors * inverse[None, :], vectors.T, precision=HIGHEST)
