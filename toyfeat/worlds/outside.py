"""Features outside the trees: their firings as bits of words, 32 features each."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from toyfeat.types import Array
from toyfeat.worlds.bits import (
    STREAM_SHIFT,
    fraction,
    normal,
    normal_cdf,
    row_word_pairs,
    row_words,
    threefry,
)
from toyfeat.worlds.sums import Sums, add_features
from toyfeat.worlds.world import World

_FIRES, _LOW, _SIZES = range(11, 14)  # streams of random words, behind those of paths
_WORD = 32  # bits of a word, the features whose firings it holds
_PARTS = 4  # parts of a word's features that are compared with their rates in turn
_HALF = 16  # bits that a feature has of its own
_BLOCK = 8  # words of firing bits that are searched together


def add_outside(
    seed: Array,
    world: World,
    first: int,
    weights: Array,
    factors: Array,
    samples: Array,
    sums: Sums,
) -> Sums:
    """Add the features outside the trees, which start at ``first``."""
    count = weights.shape[0] - first
    if count == 0:
        return sums
    fired = _draw_outside(seed, weights[first:], factors, samples)
    # Add the features whose bits are set, block by block.
    width = min(_BLOCK, len(fired))
    blocks = jnp.pad(fired, ((0, -len(fired) % width), (0, 0)))
    blocks = blocks.reshape(-1, width, len(samples))
    starts = first + _WORD * width * jnp.arange(len(blocks), dtype=jnp.int32)

    def step(sums: Sums, block: tuple[Array, Array]) -> tuple[Sums, None]:
        return _add_fired(seed, world, samples, sums, *block), None

    return lax.scan(step, sums, (starts, blocks))[0]


def _draw_outside(seed: Array, weights: Array, factors: Array, samples: Array) -> Array:
    """Draw which features outside the trees fire, as the bits of words ``[sets, n]``.

    Each feature has 16 random bits of its own, and 16 lower bits that all features of
    a sample share: these decide for one feature in ``2**16``, and for two features at
    once in ``2**32``.
    """
    # Sets of as many features as a word has bits; what fills the last never fires.
    count, size = len(weights), _WORD // _PARTS
    sets = -(-count // _WORD)
    own = jnp.pad(weights, ((0, _WORD * sets - count), (0, 0)))
    filled = jnp.where(jnp.arange(_WORD * sets) < count, own[:, -1], -jnp.inf)
    own = own.at[:, -1].set(filled).reshape(sets, _PARTS, size, -1)
    # Two words serve four parts: each half of a word is the upper bits of a feature.
    half = jnp.uint32(_HALF)
    low = (row_words(seed, _LOW, 1, samples) >> half)[None]
    halves = row_word_pairs(seed, _FIRES, size * sets, samples)
    fired = jnp.zeros((sets, size, len(samples)), jnp.uint32)
    marks = jnp.uint32(1) << jnp.arange(size, dtype=jnp.uint32)[None, :, None]
    for part in range(_PARTS):
        high = halves[part // 2].reshape(fired.shape)
        high = high >> half << half if part % 2 else high << half
        # Fires below its rate; the mark is the feature's bit in the word of its set.
        threshold = own[:, part].reshape(size * sets, -1) @ factors
        fires = fraction(high | low) < normal_cdf(threshold.reshape(fired.shape))
        mark = marks << jnp.uint32(size * part)
        fired = fired | jnp.where(fires, mark, jnp.zeros_like(mark))
    return jnp.sum(fired, axis=1, dtype=jnp.uint32)


def _add_fired(
    seed: Array, world: World, samples: Array, sums: Sums, first: Array, fired: Array
) -> Sums:
    """Add the features from ``first`` on whose bits are set, one after the other."""
    mean, std = world.mean_firing_magnitudes, world.std_firing_magnitudes

    def next_feature(fired: Array) -> tuple[Array, Array, Array, Array]:
        """Remove the next feature of each sample from the bits, and draw its code."""
        fired, place, exists = _pop_lowest_bit(fired)
        index = jnp.where(exists, first + place, first)
        row = index.astype(jnp.uint32) + jnp.uint32(_SIZES << STREAM_SHIFT)
        drawn = normal(threefry(seed, row, samples)[0])
        size = jax.nn.relu(mean[index] + std[index] * drawn)
        size = jnp.where(exists, size, jnp.zeros_like(size))
        return fired, index, size, jnp.any(exists)

    # Compute one iteration ahead, so that XLA draws a code once and not per entry.
    def body(carry: tuple[Any, Sums]) -> tuple[Any, Sums]:
        (fired, index, size, _), sums = carry
        return next_feature(fired), add_features(world, sums, index, size)

    start = next_feature(fired), sums
    return lax.while_loop(lambda carry: carry[0][3], body, start)[1]


def _pop_lowest_bit(fired: Array) -> tuple[Array, Array, Array]:
    """Clear the lowest set bit of each column of words ``[G, n]``.

    Returns:
      The remaining words, the position of the bit, and whether there was one.
    """
    # The first word with a bit has it; x & -x is the lowest bit of x.
    exists = jnp.zeros(fired.shape[1], bool)
    place, remaining = jnp.zeros(fired.shape[1], jnp.int32), []
    for group, word in enumerate(fired):
        is_first = (word != 0) & ~exists
        lowest = word & (~word + jnp.uint32(1))
        bit = _WORD - 1 - lax.clz(lowest).astype(jnp.int32)
        place = jnp.where(is_first, _WORD * group + bit, place)
        remaining.append(jnp.where(is_first, word ^ lowest, word))
        exists = exists | is_first
    return jnp.stack(remaining), place, exists
