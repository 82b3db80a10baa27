"""Singular value decompositions, and how good they are."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct

from toyfeat.types import Array

ACCURACY = 5e-6
"""Error of a singular value, as a share of the first, that ``"auto"`` aims at.

It is the error at which the Gram matrix is not trusted any more (``GRAM_CUTOFF``).
"""


@struct.dataclass
class SVDInfo:
    """Method and accuracy of a singular value decomposition.

    Attributes:
      method: ``"gram"``, ``"subspace"``, ``"krylov"`` or ``"full"`` (in memory),
        ``"gram"``, ``"incremental"`` or ``"frequent_directions"`` (streams); not
        a leaf of the tree.
      passes: how many times the matrix is read, mostly for products with a block of
        vectors from either side; a fallback may add to it; not a leaf.
      width: number of columns of such a block; not a leaf.
      residual: ``[]``, an estimate of ``|A - u diag(s) vt|_F``.
      orthogonality: ``[]``, largest entry of ``|u^T u - 1|`` and ``|vt vt^T - 1|``.
      fallback: ``[]`` bool, whether a fast step failed its check and was replaced
        by a slower, safe one.
      finite: ``[]`` bool; if it is false the matrix holds NaN or inf (or its
        values leave the float's range), and ``u``, ``s``, ``vt`` are NaN.
      error: ``[]``, estimate of the largest error of ``s`` beyond rounding, a share of
        ``s[0]``: of iterations that were stopped (in memory), of what was dropped (a
        bound, streams).
      accurate: ``[]`` bool, whether ``error`` is at most ``ACCURACY``.  Spectra that
        fall slowly want more: a larger ``power_iters``, ``width`` or ``oversample``.
    """

    method: str = struct.field(pytree_node=False)
    passes: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    residual: Array
    orthogonality: Array
    fallback: Array
    finite: Array
    error: Array
    accurate: Array


class SVD(NamedTuple):
    """Leading singular triplets, ``A ~ u @ diag(s) @ vt``.

    Attributes:
      u: ``[N, R]`` orthonormal columns, or ``None`` if they were not requested or
        cannot be computed (of a stream, whose rows are not stored).
      s: ``[R]``, descending.
      vt: ``[R, D]`` orthonormal rows; the largest entry of each, by magnitude, is
        positive.
      info: method and accuracy.
    """

    u: Array | None
    s: Array
    vt: Array
    info: SVDInfo


def is_accurate(error: Array) -> Array:
    """Compare an error with the promised accuracy; false if it is NaN."""
    return error <= jnp.asarray(ACCURACY, error.dtype)
