"""Choosing and counting codes, with what makes it fast on a CPU.

Three tricks are for CPUs; elsewhere they cost little.  :func:`best_of_each` puts
``top_k`` behind a barrier, since a slice of its results makes XLA sort whole rows.
:func:`cut_of_batch` finds the cut of a batch by false position on counts instead of a
sort (docs/decisions/dictionary.md, "The cut of a batch is found by false position").
:func:`number_of` and :func:`smallest_positive` are passes over codes ``[N, M]`` for
which XLA makes no array of their size: a sum of a comparison in float32 or int32 is
made by way of a full array of ones and zeros, so bytes are summed instead
(docs/decisions/dictionary.md, "Counts are of bytes").  The thresholds of JumpReLU
follow.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.shards import Split, over_shards, split_axes
from toyfeat.meshes import lies_on_mesh
from toyfeat.types import Array

_SAMPLED = 128
"""Examples that suggest where the cut of a batch is: the number of codes that they
keep varies by a few percent, and to count them is cheap beside a pass over a batch."""

_HALF = 0xFFFF
"""Lower half of the bits of an int32."""

_BYTE = 127
"""Ones that a signed byte can count."""


def best_of_each(score: Array, k: int) -> tuple[Array, Array]:
    """Find the ``k`` largest of each row ``[N, k]``, and which of them are finite."""
    top, index = _top(jax.lax.stop_gradient(score), k)
    return index, jnp.isfinite(top)


def first_of(num: int, fewer: Array) -> Array:
    """Mark the first ``fewer`` of ``num`` places, ``[1, num]`` bool."""
    places = jnp.arange(num, dtype=jnp.int32)[None, :]
    return places < jnp.asarray(fewer, jnp.int32)


def number_of(mask: Array, split: Split | None = None) -> Array:
    """Count the true entries of each row of ``mask [N, M]``, ``[N]`` int32."""
    if split is not None:  # windows may lie across shards
        return jnp.sum(mask, axis=1, dtype=jnp.int32)
    # Bytes hold the count of a window; only the windows' counts are 32 bits wide.
    rows, columns = mask.shape
    window = _window(columns)
    windows = mask.reshape(rows, window, columns // window)
    counts = jnp.sum(windows, axis=1, dtype=jnp.int8)
    return jnp.sum(counts, axis=1, dtype=jnp.int32)


def smallest_positive(codes: Array) -> Array:
    """Find the smallest of ``codes [N, M] >= 0`` that is not 0, or inf."""
    huge = jnp.asarray(jnp.finfo(codes.dtype).max, codes.dtype)
    off = 1 - jnp.sign(codes)  # arithmetic: a selection would be a full array
    least = jnp.min(jnp.min(codes + huge * off, axis=0))
    return jnp.where(least < huge / 2, least, jnp.full_like(least, jnp.inf))


def _window(size: int) -> int:
    """Find the largest divisor of a size whose ones a byte can count."""
    return max(d for d in range(1, min(size, _BYTE) + 1) if size % d == 0)


def cut_of_batch(
    codes: Array,
    k: int,
    fewer: Array | None,
    num: Array | None = None,
    split: Split | None = None,
) -> Array:
    """Find a level that the ``k num`` largest of all ``codes [N, M] >= 0`` reach.

    No others do but those that equal the last of them; the level is 0 if fewer are
    positive.

    Args:
      codes: of a batch.
      k: codes per example.
      fewer: in place of ``k``, may be traced, or ``None``.
      num: number of examples that count, or ``None`` for ``N``.
      split: how codes are split over devices, which then exchange counts alone, or
        ``None``.
    """
    # How many codes are wanted.
    codes = jax.lax.stop_gradient(codes)
    each = jnp.asarray(k if fewer is None else fewer, jnp.float32)
    wanted = each * jnp.asarray(len(codes) if num is None else num, jnp.float32)
    wanted = jnp.maximum(wanted.astype(jnp.int32), 1)
    if split is None:
        return _cut((), 1, codes, wanted)
    # On shards, with sums over all that are different.
    axes = split_axes(split, len(codes))
    sizes = {name: split.mesh.shape[name] for name in axes if name is not None}
    names, shards = tuple(x for x in sizes if sizes[x] > 1), math.prod(sizes.values())
    cut = over_shards(split, partial(_cut, names, shards), (axes, ()), ())
    return cut(codes, wanted)


def _cut(names: tuple[str, ...], shards: int, codes: Array, wanted: Array) -> Array:
    """Find the level; counts are sums over the named axes, of so many shards."""
    # Start from all positive codes and from none, and from what a sample suggests.
    least = jnp.asarray(jnp.finfo(codes.dtype).tiny, codes.dtype)
    sides = _Sides(
        low=least,
        high=jnp.full_like(least, jnp.inf),
        num_low=_num_reaching(names, codes, least),
        num_high=jnp.zeros_like(wanted),
    )
    for level in _levels(names, shards, codes, wanted, least):
        sides = _narrowed(names, codes, wanted, sides, level)

    # Close in by false position, every third time by bisection.
    def close(state: tuple[Array, _Sides]) -> tuple[Array, _Sides]:
        step, sides = state
        level = jnp.where(step % 3 == 2, _middle(sides), _interpolated(sides, wanted))
        return step + 1, _narrowed(names, codes, wanted, sides, level)

    def open_(state: tuple[Array, _Sides]) -> Array:
        sides = state[1]
        return (sides.num_low > wanted) & (_next(sides.low) < sides.high)

    start = jnp.zeros((), jnp.int32), sides
    sides = jax.lax.while_loop(open_, close, start)[1]
    return jnp.where(sides.num_low < wanted, jnp.zeros_like(least), sides.low)


class _Sides(NamedTuple):
    """Levels around a cut, and how many codes reach them: enough, and too few."""

    low: Array
    high: Array
    num_low: Array
    num_high: Array


def _num_reaching(names: tuple[str, ...], codes: Array, level: Array) -> Array:
    count = jnp.sum(number_of(codes >= level), dtype=jnp.int32)
    if not names:
        return count
    # Sums of halves, of 16 bits each: the codes of all shards may be more than 2^31.
    low, high = jax.lax.psum((count & _HALF, count >> 16), names)
    high = high + (low >> 16)
    most = jnp.full_like(count, jnp.iinfo(jnp.int32).max)
    return jnp.where(high > _HALF >> 1, most, (high << 16) | (low & _HALF))


def _narrowed(
    names: tuple[str, ...], codes: Array, wanted: Array, sides: _Sides, level: Array
) -> _Sides:
    """Replace one of the sides by a level between them."""
    count = _num_reaching(names, codes, level)
    # A level outside, such as a suggestion that missed the cut, changes nothing.
    inside = (level > sides.low) & (level < sides.high)
    up, down = inside & (count >= wanted), inside & (count < wanted)
    return _Sides(
        jnp.where(up, level, sides.low),
        jnp.where(down, level, sides.high),
        jnp.where(up, count, sides.num_low),
        jnp.where(down, count, sides.num_high),
    )


def _interpolated(sides: _Sides, wanted: Array) -> Array:
    """Place a level where a straight line of counts has it, strictly inside."""
    low = sides.low
    # While nothing is known above, a level twice as high stands in.
    high = jnp.where(jnp.isfinite(sides.high), sides.high, 2 * low)
    # Aim between the last code that is wanted and the one after it.
    share = (sides.num_low - wanted).astype(low.dtype) + 0.5
    share = share / (sides.num_low - sides.num_high).astype(low.dtype)
    level = low + share * (high - low)
    return jnp.clip(level, _next(sides.low), jnp.maximum(sides.low, high))


def _middle(sides: _Sides) -> Array:
    """Place a level half way between the bits of the sides."""
    # Bits of non-negative floats, read as integers, are in the order of the floats.
    low, high = bits_of(sides.low), bits_of(sides.high)
    return _float(low + (high - low) // 2, sides.low.dtype)


def _next(level: Array) -> Array:
    return _float(bits_of(level) + 1, level.dtype)


def _levels(
    names: tuple[str, ...], shards: int, codes: Array, wanted: Array, least: Array
) -> tuple[Array, Array]:
    """Suggest a level below and one above the cut, if a sample is like the batch.

    A fifth more and a fifth less than the share of the sample leaves room for its
    error; levels that miss the cut only cost further passes.
    """
    # Evenly spaced examples, and how many codes of theirs would be wanted.
    sample = codes[:: max(1, len(codes) // _SAMPLED)]
    share = wanted.astype(codes.dtype) * (sample.size / (codes.size * shards))
    around = jnp.stack([1.2 * share + 1, 0.8 * share - 1]).astype(jnp.int32)
    around = jnp.clip(around, 1, sample.size)
    flat = sample.reshape(-1)

    def enough(levels: Array) -> Array:
        counts = [jnp.sum(flat >= level, dtype=jnp.int32) for level in levels]
        return jnp.stack(counts) >= around

    # The two levels, at once.
    low, high = jnp.maximum(largest_level(enough, around.shape, codes.dtype), least)
    if names:  # every shard has its own sample: the widest of their suggestions
        return jax.lax.pmin(low, names), jax.lax.pmax(high, names)
    return low, high


def largest_level(
    enough: Callable[[Array], Array], shape: tuple[int, ...], dtype: Any
) -> Array:
    """Find the largest non-negative floats for which ``enough``, by bisecting bits.

    ``enough`` takes floats of ``shape`` and is true at 0 and up to a level.
    """
    steps = jnp.finfo(dtype).bits - 1  # the sign is 0
    zeros = jnp.zeros(shape, jnp.uint32 if steps < 32 else jnp.uint64)
    bits = largest_bits(lambda bits: enough(_float(bits, dtype)), zeros, steps)
    return _float(bits, dtype)


def largest_bits(enough: Callable[[Array], Array], zeros: Array, steps: int) -> Array:
    """Set one bit after another, from the largest, where that is not too high."""

    def halve(step: Array, low: Array) -> Array:
        bit = jnp.asarray(1, low.dtype) << (steps - 1 - step).astype(low.dtype)
        higher = low | bit
        return jnp.where(enough(higher), higher, low)

    return jax.lax.fori_loop(0, steps, halve, zeros)


def bits_of(level: Array) -> Array:
    """Bits of floats, as unsigned integers."""
    unsigned = jnp.uint32 if level.dtype == jnp.float32 else jnp.uint64
    return jax.lax.bitcast_convert_type(level, unsigned)


def _float(bits: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


def _top(score: Array, k: int) -> tuple[Array, Array]:
    """``top_k`` behind a barrier: a slice of its results makes XLA sort whole rows.

    On a mesh each result has its own: one for both ends the process (jaxlib 0.10.2).
    """
    top, index = jax.lax.top_k(score, k)
    if lies_on_mesh(score):
        return jax.lax.optimization_barrier(top), jax.lax.optimization_barrier(index)
    return jax.lax.optimization_barrier((top, index))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """Compute ``max(0, pre)`` where ``pre > threshold [M]``, with a kernel derivative.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equation 11.
    """
    del bandwidth
    return jnp.where(pre > threshold[None, :], jax.nn.relu(pre), jnp.zeros_like(pre))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def heaviside(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """Compute 1 where ``pre > threshold [M]``, else 0, with a kernel derivative.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equation 12.
    """
    del bandwidth
    return (pre > threshold[None, :]).astype(pre.dtype)


def _near(pre: Array, threshold: Array, bandwidth: float) -> Array:
    return (jnp.abs(pre - threshold[None, :]) < bandwidth / 2).astype(pre.dtype)


def _jump_forward(
    pre: Array, threshold: Array, bandwidth: float
) -> tuple[Array, tuple]:
    return jump(pre, threshold, bandwidth), (pre, threshold)


def _jump_backward(bandwidth: float, saved: tuple, change: Array) -> tuple:
    pre, threshold = saved
    # By the input: that of a ReLU above the threshold.
    above = ((pre > threshold[None, :]) & (pre > 0)).astype(pre.dtype)
    # By the threshold: the kernel counts what is within half a bandwidth of it.
    total = jnp.sum(_near(pre, threshold, bandwidth) * change, axis=0)
    return above * change, -(threshold / bandwidth) * total


def _heaviside_forward(
    pre: Array, threshold: Array, bandwidth: float
) -> tuple[Array, tuple]:
    return heaviside(pre, threshold, bandwidth), (pre, threshold)


def _heaviside_backward(bandwidth: float, saved: tuple, change: Array) -> tuple:
    pre, threshold = saved
    total = jnp.sum(_near(pre, threshold, bandwidth) * change, axis=0)
    return jnp.zeros_like(pre), -total / bandwidth


jump.defvjp(_jump_forward, _jump_backward)
heaviside.defvjp(_heaviside_forward, _heaviside_backward)
