r"""Running sums that lose nothing: floats in pairs, rows centred before squaring.

Every sum is kept in two floats (Knuth's two-sum), and rows are centred before
they are squared, so that a stream of 1e9 rows loses no more than one of 1e3, and
a mean of 1e4 standard deviations costs nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.gram import shifted_gram
from toyfeat.linalg.precise import dot
from toyfeat.types import Array

_BLOCK = 512
_CHUNK = 16384


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


def merged_rows(left: RowMoments, right: RowMoments) -> RowMoments:
    """Moments of two sets of rows together (Chan, Golub and LeVeque 1983)."""
    weight = pair_sum(left.weight, right.weight)
    step = pair_sum(right.mean, Pair(-left.mean.high, -left.mean.low))
    share = ratio(value(right.weight), value(weight))
    delta = value(step)
    cross = value(left.weight) * share * outer(delta)
    return RowMoments(
        weight=weight,
        mean=added(added(left.mean, share * step.high), share * step.low),
        scatter=added(pair_sum(left.scatter, right.scatter), cross),
    )


def row_moments(rows: Array, weights: Array) -> RowMoments:
    """Moments of one batch, centred twice: the mean of what is left is tiny."""
    total = jnp.sum(weights)
    rough = _short(ratio(dot(weights, rows), total))
    centred = rows - rough[None, :]
    rest = ratio(dot(weights, centred), total)
    gram = _gram(centred, weights)
    scatter = added(gram, -total * outer(rest))
    return RowMoments(single(total), added(single(rough), rest), scatter)


@jax.jit
def plain_moments(rows: Array) -> RowMoments:
    """Moments of rows of weight 1: one product, shifted by a mean of a few rows."""
    shift = _short(jnp.mean(rows[:256], axis=0))
    total = jnp.full((), len(rows), rows.dtype)
    chunks, rest = divmod(len(rows), _CHUNK)
    dim = rows.shape[1]

    def add(sums: tuple[Pair, Pair], start: Array | int, size: int) -> Any:
        return tuple(map(added, sums, shifted_gram(rows, shift, start, size)))

    both = (_zeros(dim, dim), _zeros(dim))
    if chunks:
        both = jax.lax.fori_loop(
            0, chunks, lambda i, both: add(both, i * _CHUNK, _CHUNK), both
        )
    if rest:
        both = add(both, chunks * _CHUNK, rest)
    gram, sums = both
    drift = value(sums) / total
    scatter = added(gram, -total * outer(drift))
    return RowMoments(single(total), added(single(shift), drift), scatter)


def _gram(rows: Array, weights: Array) -> Pair:
    """Weighted Gram matrix, block by block: a long float32 sum drifts."""
    num, dim = rows.shape
    if num <= _BLOCK:
        return single(dot((rows * weights[:, None]).T, rows))
    blocks = -(-num // _BLOCK)
    fill = blocks * _BLOCK - num
    rows = jnp.pad(rows, ((0, fill), (0, 0))).reshape(blocks, _BLOCK, dim)
    weights = jnp.pad(weights, (0, fill)).reshape(blocks, _BLOCK)

    def add(gram: Pair, block: tuple[Array, Array]) -> tuple[Pair, None]:
        rows, weights = block
        return added(gram, dot((rows * weights[:, None]).T, rows)), None

    return jax.lax.scan(add, _zeros(dim, dim), (rows, weights))[0]


def _short(x: Array) -> Array:
    """Drop the last bits of the mantissa: any number near the mean will do.

    A compiler may fuse ``rows - a * b`` without rounding the product, and keep
    another, rounded product as the mean; it cannot do so through this rounding.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - 2)


def no_rows(dim: int) -> RowMoments:
    """Moments of nothing."""
    return RowMoments(_zeros(), _zeros(dim), _zeros(dim, dim))


def outer(x: Array) -> Array:
    """``x x^T``."""
    return x[:, None] * x[None, :]


def ratio(x: Array, y: Array) -> Array:
    """``x / y``, and 0 where nothing was seen."""
    return jnp.where(
        y > 0, x / jnp.where(y > 0, y, jnp.ones_like(y)), jnp.zeros_like(x)
    )


def _zeros(*shape: int) -> Pair:
    return single(jnp.zeros(shape, jnp.result_type(float)))


def single(x: Array) -> Pair:
    """One float as a pair."""
    return Pair(x, jnp.zeros_like(x))


def value(x: Pair) -> Array:
    """The sum, rounded."""
    return x.high + x.low


def added(x: Pair, y: Array) -> Pair:
    """Add a float without losing its low bits."""
    high = x.high + y
    back = high - x.high
    low = x.low + ((x.high - (high - back)) + (y - back))
    total = high + low  # so that the low part stays below the rounding of the high
    return Pair(total, low - (total - high))


def pair_sum(x: Pair, y: Pair) -> Pair:
    """Add two pairs."""
    return added(added(x, y.high), y.low)
