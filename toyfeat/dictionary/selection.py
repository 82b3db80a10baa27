"""Which codes are kept, and how derivatives pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.counting import number_of
from toyfeat.types import Array

_SAMPLED = 128  # examples that suggest where the cut of a batch is


def best_of_each(score: Array, k: int) -> tuple[Array, Array]:
    """Where the ``k`` largest of each row are, and which of them are finite."""
    top, index = _top(jax.lax.stop_gradient(score), k)
    return index, jnp.isfinite(top)


def first_of(most: int, fewer: Array) -> Array:
    """Which of ``most`` places ``[1, most]`` are among the first ``fewer``."""
    places = jnp.arange(most, dtype=jnp.int32)[None, :]
    return places < jnp.asarray(fewer, jnp.int32)


def cut_of_batch(
    codes: Array, k: int, fewer: Array | None, num: Array | None = None
) -> Array:
    """A level that the ``k num`` largest of all ``codes [N, M] >= 0`` reach.

    No others do but those that equal the last of them; the level is 0 if fewer are
    positive.  Two levels that a sample of the examples suggests are closed in on by
    false position; a pass over the codes counts how many reach a level.
    """
    codes = jax.lax.stop_gradient(codes)
    each = jnp.asarray(k if fewer is None else fewer, jnp.float32)
    wanted = each * jnp.asarray(len(codes) if num is None else num, jnp.float32)
    wanted = jnp.maximum(wanted.astype(jnp.int32), 1)
    least = jnp.asarray(jnp.finfo(codes.dtype).tiny, codes.dtype)
    most, none = jnp.full_like(least, jnp.inf), jnp.zeros_like(wanted)
    sides = _Sides(least, most, _reaching(codes, least), none)
    for level in _levels(codes, wanted, least):
        sides = _narrowed(codes, wanted, sides, level)

    def close(state: tuple[Array, _Sides]) -> tuple[Array, _Sides]:
        step, sides = state
        level = jnp.where(step % 3 == 2, _middle(sides), _interpolated(sides, wanted))
        return step + 1, _narrowed(codes, wanted, sides, level)

    def open_(state: tuple[Array, _Sides]) -> Array:
        sides = state[1]
        return (sides.many > wanted) & (_next(sides.low) < sides.high)

    start = jnp.zeros((), jnp.int32), sides
    sides = jax.lax.while_loop(open_, close, start)[1]
    return jnp.where(sides.many < wanted, jnp.zeros_like(least), sides.low)


class _Sides(NamedTuple):
    """Levels around a cut, and how many codes reach them: enough, and too few."""

    low: Array
    high: Array
    many: Array
    few: Array


def _reaching(codes: Array, level: Array) -> Array:
    return jnp.sum(number_of(codes >= level), dtype=jnp.int32)


def _narrowed(codes: Array, wanted: Array, sides: _Sides, level: Array) -> _Sides:
    """The sides with a level between them in the place of one of them."""
    count = _reaching(codes, level)
    inside = (level > sides.low) & (level < sides.high)
    up, down = inside & (count >= wanted), inside & (count < wanted)
    return _Sides(
        jnp.where(up, level, sides.low),
        jnp.where(down, level, sides.high),
        jnp.where(up, count, sides.many),
        jnp.where(down, count, sides.few),
    )


def _interpolated(sides: _Sides, wanted: Array) -> Array:
    """Where a straight line of counts says; next to a side if it says the side."""
    low = sides.low
    high = jnp.where(jnp.isfinite(sides.high), sides.high, 2 * low)
    share = (sides.many - wanted).astype(low.dtype) + 0.5
    share = share / (sides.many - sides.few).astype(low.dtype)
    level = low + share * (high - low)
    return jnp.clip(level, _next(sides.low), jnp.maximum(sides.low, high))


def _middle(sides: _Sides) -> Array:
    """Half way between the bits of two levels."""
    low, high = _bits(sides.low), _bits(sides.high)
    return _float(low + (high - low) // 2, sides.low.dtype)


def _next(level: Array) -> Array:
    return _float(_bits(level) + 1, level.dtype)


def _levels(codes: Array, wanted: Array, least: Array) -> tuple[Array, Array]:
    """A level a bit under and a bit over the cut, if a sample is like the whole."""
    few = codes[:: max(1, len(codes) // _SAMPLED)]
    share = wanted.astype(codes.dtype) * (few.size / codes.size)
    around = jnp.stack([1.2 * share + 1, 0.8 * share - 1]).astype(jnp.int32)
    around = jnp.clip(around, 1, few.size)
    flat = few.reshape(-1)

    def enough(levels: Array) -> Array:
        counts = [jnp.sum(flat >= level, dtype=jnp.int32) for level in levels]
        return jnp.stack(counts) >= around

    low, high = jnp.maximum(largest_level(enough, around.shape, codes.dtype), least)
    return low, high


def largest_level(
    enough: Callable[[Array], Array], shape: tuple[int, ...], dtype: Any
) -> Array:
    """Largest non-negative floats of which ``enough`` is true, by bisecting bits.

    ``enough`` takes floats of ``shape`` and is true of 0 and of all below a level.
    """
    steps = jnp.finfo(dtype).bits - 1  # the sign is 0
    zeros = jnp.zeros(shape, jnp.uint32 if steps < 32 else jnp.uint64)

    def halve(step: Array, low: Array) -> Array:
        one = jnp.asarray(1, low.dtype) << (steps - 1 - step).astype(low.dtype)
        higher = low | one
        return jnp.where(enough(_float(higher, dtype)), higher, low)

    return _float(jax.lax.fori_loop(0, steps, halve, zeros), dtype)


def _bits(level: Array) -> Array:
    whole = jnp.uint32 if level.dtype == jnp.float32 else jnp.uint64
    return jax.lax.bitcast_convert_type(level, whole)


def _float(bits: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


def _top(score: Array, k: int) -> tuple[Array, Array]:
    """``top_k`` behind a barrier: a slice of its results makes XLA sort whole rows."""
    return jax.lax.optimization_barrier(tuple(jax.lax.top_k(score, k)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumped(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """``max(0, pre)`` where ``pre > threshold [M]``, with a kernel derivative.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equation 11.
    """
    del bandwidth
    return jnp.where(pre > threshold[None, :], jax.nn.relu(pre), jnp.zeros_like(pre))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def stepped(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """1 where ``pre > threshold [M]``, 0 elsewhere, with a kernel derivative.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equation 12.
    """
    del bandwidth
    return (pre > threshold[None, :]).astype(pre.dtype)


def _near(pre: Array, threshold: Array, bandwidth: float) -> Array:
    return (jnp.abs(pre - threshold[None, :]) < bandwidth / 2).astype(pre.dtype)


def _jumped_forward(
    pre: Array, threshold: Array, bandwidth: float
) -> tuple[Array, tuple]:
    return jumped(pre, threshold, bandwidth), (pre, threshold)


def _jumped_backward(bandwidth: float, kept: tuple, change: Array) -> tuple:
    pre, threshold = kept
    above = ((pre > threshold[None, :]) & (pre > 0)).astype(pre.dtype)
    total = jnp.sum(_near(pre, threshold, bandwidth) * change, axis=0)
    return above * change, -(threshold / bandwidth) * total


def _stepped_forward(
    pre: Array, threshold: Array, bandwidth: float
) -> tuple[Array, tuple]:
    return stepped(pre, threshold, bandwidth), (pre, threshold)


def _stepped_backward(bandwidth: float, kept: tuple, change: Array) -> tuple:
    pre, threshold = kept
    total = jnp.sum(_near(pre, threshold, bandwidth) * change, axis=0)
    return jnp.zeros_like(pre), -total / bandwidth


jumped.defvjp(_jumped_forward, _jumped_backward)
stepped.defvjp(_stepped_forward, _stepped_backward)
