r"""Compensated running moments: pairs of floats, rows centred before squaring.

Every sum is held in two floats (Knuth's two-sum), and rows are centred before
they are squared.  So a stream of 1e9 rows loses no more than one of 1e3, and a
mean of 1e4 standard deviations costs nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.gram import shifted_gram
from toyfeat.linalg.precision import dot
from toyfeat.types import Array

_WEIGHTED_ROWS = 512
"""Weighted rows whose Gram matrix is one float32 sum.

See "The rounded mean of a batch loses its last bits on purpose" in
docs/decisions/statistics.md.
"""

_PLAIN_ROWS = 16384
"""Unweighted rows that are summed before a pair of floats is updated.

The update is three passes over ``[D, D]``, and their cost vanishes beside a product
of that many rows; chosen by trial.
"""

_SHIFT_ROWS = 256
"""Rows whose mean is the shift.

Any number near the mean will do, and these read little; chosen by trial.
"""

_DROPPED_BITS = 2
"""Bits of the mantissa that a rounded mean loses; chosen by trial."""


class Pair(NamedTuple):
    """An unevaluated sum of two floats, ``high + low``."""

    high: Array
    low: Array


class RowMoments(NamedTuple):
    """Running moments of weighted rows.

    Attributes:
      weight: ``[]``, sum of the weights.
      mean: ``[D]``.
      scatter: ``[D, D]`` about ``mean``.
    """

    weight: Pair
    mean: Pair
    scatter: Pair


def merge_moments(left: RowMoments, right: RowMoments) -> RowMoments:
    """Merge the moments of two sets of rows (Chan, Golub and LeVeque 1983).

    Args:
      left: moments of the first set.
      right: moments of the second set.

    Returns:
      Moments of the union.
    """
    weight = add_pairs(left.weight, right.weight)
    step = add_pairs(right.mean, Pair(-left.mean.high, -left.mean.low))
    share = ratio(to_float(right.weight), to_float(weight))
    # The scatter about the two means, and that of the means themselves.
    between = to_float(left.weight) * share * outer(to_float(step))
    return RowMoments(
        weight=weight,
        mean=add_float(add_float(left.mean, share * step.high), share * step.low),
        scatter=add_float(add_pairs(left.scatter, right.scatter), between),
    )


def row_moments(rows: Array, weights: Array) -> RowMoments:
    """Compute the moments of one batch of weighted rows.

    Rows are centred twice: by a rounded mean, and by the tiny mean of the result.

    Args:
      rows: ``[n, D]``.
      weights: ``[n]``.

    Returns:
      Moments of the batch.
    """
    total = jnp.sum(weights)
    rough = _drop_last_bits(ratio(dot(weights, rows), total))
    centred = rows - rough[None, :]
    drift = ratio(dot(weights, centred), total)
    gram = _weighted_gram(centred, weights)
    scatter = add_float(gram, -total * outer(drift))
    return RowMoments(from_float(total), add_float(from_float(rough), drift), scatter)


@jax.jit
def unweighted_moments(rows: Array) -> RowMoments:
    """Compute the moments of rows of weight 1 in one pass.

    One product, of rows shifted by the mean of the first few.

    Args:
      rows: ``[n, D]``.

    Returns:
      Moments of the rows.
    """
    shift = _drop_last_bits(jnp.mean(rows[:_SHIFT_ROWS], axis=0))
    total = jnp.full((), len(rows), rows.dtype)
    chunks, remainder = divmod(len(rows), _PLAIN_ROWS)
    dim = rows.shape[1]

    def add(sums: tuple[Pair, Pair], start: Array | int, size: int) -> Any:
        return tuple(map(add_float, sums, shifted_gram(rows, shift, start, size)))

    # The Gram matrix and the sums of shifted rows, chunk by chunk.
    both = (_zero_pair(dim, dim), _zero_pair(dim))
    if chunks:
        both = jax.lax.fori_loop(
            0, chunks, lambda i, both: add(both, i * _PLAIN_ROWS, _PLAIN_ROWS), both
        )
    if remainder:
        both = add(both, chunks * _PLAIN_ROWS, remainder)

    # From moments about the shift to moments about the mean.
    gram, sums = both
    drift = to_float(sums) / total
    scatter = add_float(gram, -total * outer(drift))
    return RowMoments(from_float(total), add_float(from_float(shift), drift), scatter)


def _weighted_gram(rows: Array, weights: Array) -> Pair:
    """Weighted Gram matrix, block by block: a long float32 sum drifts."""
    num, dim = rows.shape
    if num <= _WEIGHTED_ROWS:
        return from_float(dot((rows * weights[:, None]).T, rows))
    # Fill the last block with rows of weight 0.
    blocks = -(-num // _WEIGHTED_ROWS)
    padding = blocks * _WEIGHTED_ROWS - num
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(blocks, _WEIGHTED_ROWS, dim)
    weights = jnp.pad(weights, (0, padding)).reshape(blocks, _WEIGHTED_ROWS)

    def add(gram: Pair, block: tuple[Array, Array]) -> tuple[Pair, None]:
        rows, weights = block
        return add_float(gram, dot((rows * weights[:, None]).T, rows)), None

    return jax.lax.scan(add, _zero_pair(dim, dim), (rows, weights))[0]


def _drop_last_bits(x: Array) -> Array:
    """Round to a shorter mantissa: any number near the mean will do.

    A compiler may fuse ``rows - a * b`` without rounding the product, and use
    another, rounded product as the mean; it cannot do so through this rounding.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - _DROPPED_BITS)


def empty_moments(dim: int) -> RowMoments:
    """Moments of no rows, the identity of :func:`merge_moments`."""
    return RowMoments(_zero_pair(), _zero_pair(dim), _zero_pair(dim, dim))


def outer(x: Array) -> Array:
    """Outer product ``x x^T``."""
    return x[:, None] * x[None, :]


def ratio(x: Array, y: Array) -> Array:
    """Divide ``x / y``; 0 where ``y`` is not positive."""
    return jnp.where(
        y > 0, x / jnp.where(y > 0, y, jnp.ones_like(y)), jnp.zeros_like(x)
    )


def _zero_pair(*shape: int) -> Pair:
    """Zeros of a shape, in the default float type."""
    return from_float(jnp.zeros(shape, jnp.result_type(float)))


def from_float(x: Array) -> Pair:
    """Pair that holds one float."""
    return Pair(x, jnp.zeros_like(x))


def to_float(x: Pair) -> Array:
    """Sum of a pair, rounded to one float."""
    return x.high + x.low


def add_float(x: Pair, y: Array) -> Pair:
    """Add a float to a pair without losing its low bits (Knuth's two-sum)."""
    # The exact rounding error of the sum of the high part ...
    high = x.high + y
    back = high - x.high
    low = x.low + ((x.high - (high - back)) + (y - back))
    # ... and a low part that stays below the rounding of the high one.
    total = high + low
    return Pair(total, low - (total - high))


def add_pairs(x: Pair, y: Pair) -> Pair:
    """Add two pairs."""
    return add_float(add_float(x, y.high), y.low)
