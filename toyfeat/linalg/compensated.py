r"""Compensated running moments: pairs of floats, rows centred before squaring.

Every sum is held in two floats (Knuth's two-sum), and rows are centred before
they are squared.  So a stream of 1e9 rows loses no more than one of 1e3, and a
mean of 1e4 standard deviations costs nothing.

Rows and weights are held in units, powers of two near the largest so far.  So rows of
1e-36 to 1e36 have squares like those of rows of 1.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.gram import shifted_gram
from toyfeat.linalg.precision import (
    dot,
    largest_size,
    power_of_four,
    power_of_two,
)
from toyfeat.meshes import cut_rows, everywhere, row_parts, run_automatic
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
    """Running moments of weighted rows, in units.

    Attributes:
      weight: ``[]``, sum of the weights over ``mass``.
      mean: ``[D]``, over ``unit``.
      scatter: ``[D, D]`` about the mean, over ``mass * unit**2``.
      unit: ``[]``, a power of two near the largest entry of a row.
      mass: ``[]``, a power of four near the largest weight.
    """

    weight: Pair
    mean: Pair
    scatter: Pair
    unit: Array
    mass: Array


def merge_moments(left: RowMoments, right: RowMoments) -> RowMoments:
    """Merge the moments of two sets of rows (Chan, Golub and LeVeque 1983).

    Args:
      left: moments of the first set.
      right: moments of the second set.

    Returns:
      Moments of the union.
    """
    # Both in the larger units.
    unit = jnp.maximum(left.unit, right.unit)
    mass = jnp.maximum(left.mass, right.mass)
    left, right = _in_units(left, unit, mass), _in_units(right, unit, mass)
    # Weights, and the distance of the two means.
    weight = add_pairs(left.weight, right.weight)
    step = add_pairs(right.mean, Pair(-left.mean.high, -left.mean.low))
    share = ratio(to_float(right.weight), to_float(weight))
    # The scatter about the two means, and that of the means themselves.
    between = to_float(left.weight) * share * outer(to_float(step))
    return RowMoments(
        weight=weight,
        mean=add_float(add_float(left.mean, share * step.high), share * step.low),
        scatter=add_float(add_pairs(left.scatter, right.scatter), between),
        unit=unit,
        mass=mass,
    )


def _in_units(moments: RowMoments, unit: Array, mass: Array) -> RowMoments:
    """Change the units of moments, exactly."""
    size, share = moments.unit / unit, moments.mass / mass
    return RowMoments(
        weight=scale_pair(moments.weight, share),
        mean=scale_pair(moments.mean, size),
        scatter=scale_pair(moments.scatter, size**2 * share),
        unit=unit,
        mass=mass,
    )


def row_moments(rows: Array, weights: Array) -> RowMoments:
    """Compute the moments of one batch of weighted rows.

    Rows are centred twice: by a rounded mean, and by the tiny mean of the result.

    Args:
      rows: ``[n, D]``; what a row of weight 0 holds does not matter.
      weights: ``[n]``.

    Returns:
      Moments of the batch, on every device of a mesh; weight and scatter are NaN if a
      weight is negative or not finite, or if a row that counts is not finite.
    """
    return run_automatic(_row_moments, everywhere, rows, weights)


def _row_moments(rows: Array, weights: Array) -> RowMoments:
    """Compute :func:`row_moments` where products need no sharding of their results."""
    rows, weights, unit, mass = units_of_rows(rows, weights)
    total = jnp.sum(weights)
    # Centre by a rounded mean, then by the mean of what is left.
    rough = drop_last_bits(ratio(dot(weights, rows), total))
    centred = rows - rough[None, :]
    drift = ratio(dot(weights, centred), total)
    # Squares of the rows, less those of the second mean.
    gram = _weighted_gram(centred, weights)
    scatter = add_float(gram, -total * outer(drift))
    return RowMoments(
        weight=from_float(total),
        mean=add_float(from_float(rough), drift),
        scatter=scatter,
        unit=unit,
        mass=mass,
    )


def units_of_rows(rows: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
    """Bring rows and weights to units; negative or infinite weights become NaN.

    Args:
      rows: ``[n, D]``.
      weights: ``[n]``.

    Returns:
      Rows over their unit, zeros where the weight is 0; weights over their mass, NaN
      where they are negative or not finite; the unit and the mass.
    """
    valid = (weights >= 0) & (weights < jnp.inf)
    weights = jnp.where(valid, weights, jnp.nan)
    rows = jnp.where(weights[:, None] != 0, rows, jnp.zeros_like(rows))
    unit = power_of_two(largest_size(rows))
    mass = power_of_four(largest_size(weights))
    return rows / unit, weights / mass, unit, mass


@jax.jit
def unweighted_moments(rows: Array) -> RowMoments:
    """Compute the moments of rows of weight 1 in one pass.

    One product, of rows shifted by the mean of the first few.

    Args:
      rows: ``[n, D]``.

    Returns:
      Moments of the rows, on every device of a mesh.
    """
    return run_automatic(_unweighted_moments, everywhere, rows)


def _unweighted_moments(rows: Array) -> RowMoments:
    """Compute :func:`unweighted_moments` where products need no sharding."""
    # The shift, averaged in the unit of the first rows.
    first = power_of_two(largest_size(rows[:_SHIFT_ROWS]))
    shift = drop_last_bits(jnp.mean(rows[:_SHIFT_ROWS] / first, axis=0)) * first
    total = jnp.full((), len(rows), rows.dtype)
    # The Gram matrix and the sums of shifted rows; on a mesh, of those of each device.
    parts = row_parts(len(rows), rows)
    if parts == 1:
        gram, shifted, small = _sum_chunks(rows, shift)
    else:
        sum_part = partial(_sum_chunks, shift=shift)
        gram, shifted, small = _sum_parts(*jax.vmap(sum_part)(cut_rows(rows, parts)))
    # From moments about the shift to moments about the mean, in a unit for both.
    unit = jnp.maximum(small, power_of_two(largest_size(shift)))
    drift = to_float(shifted) / total
    scatter = add_float(gram, -total * outer(drift))
    return RowMoments(
        weight=from_float(total),
        mean=add_float(from_float(shift / unit), drift * (small / unit)),
        scatter=scale_pair(scatter, (small / unit) ** 2),
        unit=unit,
        mass=jnp.ones((), rows.dtype),
    )


def _sum_parts(gram: Pair, total: Pair, unit: Array) -> tuple[Pair, Pair, Array]:
    """Add up sums of :func:`_sum_chunks`, which come in units of their own."""
    largest = jnp.max(unit)
    share = unit / largest
    gram = scale_pair(gram, share[:, None, None] ** 2)
    total = scale_pair(total, share[:, None])
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), (gram, total))
    return *sums, largest


def _sum_chunks(rows: Array, shift: Array) -> tuple[Pair, Pair, Array]:
    """Gram matrix and sum of shifted rows, chunk by chunk, and their unit."""
    chunks, remainder = divmod(len(rows), _PLAIN_ROWS)
    dim = rows.shape[1]

    def add(sums: tuple[Pair, Pair, Array], start: Array | int, size: int) -> Any:
        gram, total, unit = sums
        new_gram, new_total, new_unit = shifted_gram(rows, shift, start, size)
        larger = jnp.maximum(unit, new_unit)
        ours, theirs = unit / larger, new_unit / larger
        gram = add_float(scale_pair(gram, ours**2), new_gram * theirs**2)
        total = add_float(scale_pair(total, ours), new_total * theirs)
        return gram, total, larger

    sums = (_zero_pair(dim, dim), _zero_pair(dim), smallest_unit())
    if chunks:
        sums = jax.lax.fori_loop(
            0, chunks, lambda i, sums: add(sums, i * _PLAIN_ROWS, _PLAIN_ROWS), sums
        )
    if remainder:
        sums = add(sums, chunks * _PLAIN_ROWS, remainder)
    return sums


def _weighted_gram(rows: Array, weights: Array) -> Pair:
    """Weighted Gram matrix, block by block: a long float32 sum drifts.

    On a mesh every device sums the blocks of its own rows, and these sums are added.
    """
    parts = row_parts(len(rows), rows)
    if parts == 1:
        return _sum_blocks(rows, weights)
    grams = jax.vmap(_sum_blocks)(cut_rows(rows, parts), cut_rows(weights, parts))
    return Pair(jnp.sum(grams.high, axis=0), jnp.sum(grams.low, axis=0))


def _sum_blocks(rows: Array, weights: Array) -> Pair:
    """Sum the Gram matrices of blocks of rows, one after the other."""
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


def drop_last_bits(x: Array) -> Array:
    """Round to a shorter mantissa, as for a shift, which need only be near the mean.

    A compiler may fuse ``rows - a * b`` without rounding the product, and use
    another, rounded product as the mean; it cannot do so through this rounding.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - _DROPPED_BITS)


def empty_moments(dim: int) -> RowMoments:
    """Moments of no rows, the identity of :func:`merge_moments`."""
    return RowMoments(
        weight=_zero_pair(),
        mean=_zero_pair(dim),
        scatter=_zero_pair(dim, dim),
        unit=smallest_unit(),
        mass=smallest_unit(four=True),
    )


def smallest_unit(*, four: bool = False) -> Array:
    """Unit of empty moments, below all others."""
    zero = jnp.zeros((), jnp.result_type(float))
    return power_of_four(zero) if four else power_of_two(zero)


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


def scale_pair(x: Pair, factor: Array) -> Pair:
    """Multiply a pair by a power of two."""
    return Pair(x.high * factor, x.low * factor)


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
