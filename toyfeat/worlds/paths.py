"""Fast sampling of worlds whose trees are complete and exclusive: one path per tree.

At most one of exclusive siblings fires, so a tree is walked from its root: among the
children of the active feature one is selected, then among its children, and so on.
Features off the path cannot fire and are never drawn.  Samples are the last axis of
arrays, in chunks that stay in the caches of a CPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from toyfeat.types import Array
from toyfeat.worlds.bits import (
    STREAM_SHIFT,
    fraction,
    normal,
    normal_cdf,
    threefry,
    uniform,
)
from toyfeat.worlds.hierarchy import Hierarchy
from toyfeat.worlds.world import World

_FACTORS, _FIRES, _SIZES, _OUTSIDE, _LOW, _OUTSIDE_SIZES = range(8, 14)  # streams
_CHUNK = 256  # samples per chunk on a CPU, so that its arrays fit in the caches
_BLOCK = 8  # words of firing bits, 32 features each, that are searched together
_NEVER = 2.0  # score of a feature that does not fire; scores of others are below 1


class _Tables(NamedTuple):
    """Parameters of the features for a walk, ``[F]`` each.

    Attributes:
      active: probability that a magnitude is above 0.
      mean: mean of the magnitude's normal.
      std: standard deviation of the magnitude's normal.
      least: erf at the point where the normal is truncated.
      gain: 1 / mean of the parent if the parent scales the code, else 0.
    """

    active: Array
    mean: Array
    std: Array
    least: Array
    gain: Array


class Sums(NamedTuple):
    """Sums over features: activations ``[n, D]`` and codes ``[n, F]``, or ``None``."""

    acts: Array | None
    codes: Array | None


def path_samples(
    seed: Array, world: World, num: int, *, acts: bool, codes: bool
) -> Sums:
    """Sample activations, codes or both.

    Raises:
      ValueError: if the trees of the world are not complete and exclusive.
    """
    if world.hierarchy is None or world.hierarchy.trees is None:
        raise ValueError("path_samples: wanted a world of complete, exclusive trees")
    hierarchy, trees = world.hierarchy, world.hierarchy.trees
    size = _CHUNK if jax.default_backend() == "cpu" else num
    features, dim = world.feature_vectors.shape
    weights, tables = _weights(world), _tables(world, hierarchy)

    def chunk(first: Array) -> Sums:
        # Draw the factors of the copula, and a constant for the thresholds.
        samples = first + lax.iota(jnp.uint32, size)
        factors = normal(_words(seed, _FACTORS, weights.shape[1] - 1, samples))
        ones = jnp.ones((1, size), jnp.float32)
        factors = jnp.concatenate([factors, ones])
        sums = Sums(
            jnp.broadcast_to(world.bias[None, :], (size, dim)) if acts else None,
            jnp.zeros((size, features), jnp.float32) if codes else None,
        )
        # Add the active features of the trees, then those outside the trees.
        for walk in _walk_trees(seed, trees, tables, weights, factors, samples):
            sums = _add_level(world, sums, walk)
        first_outside = sum(level.size for level in trees)
        return _add_outside(seed, world, first_outside, weights, factors, samples, sums)

    starts = size * jnp.arange(-(-num // size), dtype=jnp.uint32)
    out = lax.map(chunk, starts)
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:num], out)


def _words(seed: Array, stream: int, rows: int, samples: Array) -> Array:
    """Draw words, ``[rows, n]``, that depend on the stream, the row and the sample."""
    return _word_pairs(seed, stream, rows, samples)[0]


def _word_pairs(
    seed: Array, stream: int, rows: int, samples: Array
) -> tuple[Array, Array]:
    """Draw two independent arrays of words, ``[rows, n]``."""
    shape = rows, len(samples)
    row = lax.broadcasted_iota(jnp.uint32, shape, 0) + jnp.uint32(
        stream << STREAM_SHIFT
    )
    return threefry(seed, row, jnp.broadcast_to(samples[None, :], shape))


def _weights(world: World) -> Array:
    """Weights of the factors and of 1 in the firing threshold, ``[F, r + 1]``."""
    limit = ndtri(world.firing_probabilities)[:, None]
    if world.correlation_factor is None or world.correlation_diag is None:
        return limit
    own = jnp.sqrt(world.correlation_diag)[:, None]
    return jnp.concatenate([world.correlation_factor, limit], axis=1) / own


def _tables(world: World, hierarchy: Hierarchy) -> _Tables:
    """Compute the parameters that a walk looks up."""
    mean, std = world.mean_firing_magnitudes, world.std_firing_magnitudes
    fixed = jnp.where(mean > 0, jnp.full_like(mean, jnp.inf), -jnp.inf)
    ratio = jnp.where(std > 0, mean / jnp.where(std > 0, std, 1.0), fixed)
    parent_mean = mean[jnp.maximum(hierarchy.parents, 0)]
    gain = jnp.where(hierarchy.scaled, 1 / parent_mean, jnp.zeros_like(parent_mean))
    return _Tables(
        active=normal_cdf(ratio),
        mean=mean,
        std=std,
        least=lax.erf(-ratio * jnp.float32(0.5**0.5)),
        gain=gain,
    )


def _walk_trees(
    seed: Array,
    levels: tuple[Array, ...],
    tables: _Tables,
    weights: Array,
    factors: Array,
    samples: Array,
) -> list[tuple[Array, Array]]:
    """Walk all trees from their roots.

    Returns:
      The selected features and their codes, ``[T, n]`` each, for every level.
    """
    # Draw all words at once: one magnitude per level, and one firing per root and
    # per child of a path.
    num, roots = len(samples), levels[0].size
    sizes = uniform(_words(seed, _SIZES, roots * len(levels), samples))
    starts = [0]
    for level in levels:
        starts.append(starts[-1] + level.size)
    draws = _words(
        seed, _FIRES, roots * (1 + levels[1].shape[1] * len(levels)), samples
    )
    steps, path, value = [], [], jnp.ones((roots, num), jnp.float32)
    node = jnp.broadcast_to(jnp.arange(roots, dtype=jnp.int32)[:, None], (roots, num))
    for depth, level in enumerate(levels):
        part = slice(starts[depth], starts[depth + 1])
        parameters = [x[part].reshape(*level.shape, 1) for x in tables]
        threshold = (weights[part] @ factors).reshape(*level.shape, num)
        if depth == 0:
            fires = fraction(draws[:roots]) < normal_cdf(threshold) * parameters[0]
        else:
            # Look up the children of the path, and select one of those that fire.
            width = level.shape[-1]
            threshold, *parameters = (
                _select_children(x, path) for x in (threshold, *parameters)
            )
            rate = normal_cdf(threshold) * parameters[0]
            row = roots * (1 + width * (depth - 1))
            drawn = draws[row : row + roots * width].reshape(roots, width, num)
            fires, child = _select_firing(fraction(drawn), rate)
            # It fires only under an active parent.
            fires, node = fires & (value > 0), node * width + child
            parameters = [_select_children(x, [child]) for x in parameters]
            path.append(child)
        drawn = sizes[roots * depth : roots * (depth + 1)]
        value = _draw_codes(drawn, fires, value, parameters[1:])
        steps.append((node + starts[depth], value))
    return steps


def _draw_codes(
    drawn: Array, fires: Array, parent: Array, parameters: Sequence[Array]
) -> Array:
    """Draw the codes of features that fire, scaled by the codes of their parents."""
    mean, std, least, gain = parameters
    size = _truncated_normal(drawn, mean, std, least)
    size = jnp.where(gain > 0, size * parent * gain, size)
    return jnp.where(fires, size, jnp.zeros_like(size))


def _select_children(x: Array, path: Sequence[Array]) -> Array:
    """Index ``[T, C, C, ..., n]`` by a child per tree and sample for each step."""
    for step in path:
        index = step.reshape(step.shape[0], *(1,) * (x.ndim - 3), step.shape[1])
        out = x[:, 0]
        for child in range(1, x.shape[1]):
            out = jnp.where(index == child, x[:, child], out)
        x = out
    return x


def _select_firing(drawn: Array, rate: Array) -> tuple[Array, Array]:
    """Select one of the siblings that fire, among ``[T, C, n]``, with equal chances.

    Given that ``drawn < rate``, ``drawn / rate`` is uniform, and the least is selected.

    Returns:
      Whether any sibling fires, and the index of the selected one, ``[T, n]`` each.
    """
    score = jnp.where(drawn < rate, drawn / rate, jnp.full_like(rate, _NEVER))
    best = jnp.min(score, axis=1)
    selected = jnp.zeros(best.shape, jnp.int32)
    for child in range(1, rate.shape[1]):
        selected = jnp.where(score[:, child] == best, child, selected)
    return best < _NEVER, selected


def _truncated_normal(drawn: Array, mean: Array, std: Array, least: Array) -> Array:
    """Map uniforms to a normal truncated at 0, by the inverse CDF."""
    inside = jnp.minimum(least + (1 - least) * drawn, jnp.float32(1 - 2.0**-24))
    return jax.nn.relu(mean + std * jnp.float32(2.0**0.5) * lax.erf_inv(inside))


def _add_level(world: World, sums: Sums, walk: tuple[Array, Array]) -> Sums:
    """Add the features of a level, tree by tree.

    The loop makes XLA compute indices and codes once, not once per entry of the sums.
    """

    def step(sums: Sums, tree: tuple[Array, Array]) -> tuple[Sums, None]:
        return _add_features(world, sums, *tree), None

    return lax.scan(step, sums, walk)[0]


def _add_features(world: World, sums: Sums, index: Array, value: Array) -> Sums:
    """Add one feature per sample, with its code."""
    acts, codes = sums
    if acts is not None:
        acts = acts + value[:, None] * world.feature_vectors[index]
    if codes is not None:
        codes = codes.at[jnp.arange(len(index)), index].add(value)
    return Sums(acts, codes)


def _add_outside(
    seed: Array,
    world: World,
    first: int,
    weights: Array,
    factors: Array,
    samples: Array,
    sums: Sums,
) -> Sums:
    """Add the features outside the trees, which start at ``first``.

    Each feature has 16 random bits of its own, and 16 lower bits that all features of
    a sample share: these decide for one feature in ``2**16``, and for two features at
    once in ``2**32``.
    """
    count = weights.shape[0] - first
    if count == 0:
        return sums
    # Group the features in sets of 32, whose firings are the bits of a word.
    sets = -(-count // 32)
    own = jnp.pad(weights[first:], ((0, 32 * sets - count), (0, 0)))
    filled = jnp.where(jnp.arange(32 * sets) < count, own[:, -1], -jnp.inf)
    own = own.at[:, -1].set(filled).reshape(sets, 4, 8, -1)
    # Compare the bits of a quarter of all features at a time with their rates.
    low = (_words(seed, _LOW, 1, samples) >> jnp.uint32(16))[None]
    halves = _word_pairs(seed, _OUTSIDE, 8 * sets, samples)
    fired = jnp.zeros((sets, 8, len(samples)), jnp.uint32)
    marks = jnp.uint32(1) << jnp.arange(8, dtype=jnp.uint32)[None, :, None]
    upper = jnp.uint32(16)
    for part in range(4):
        high = halves[part // 2].reshape(fired.shape)
        high = high >> upper << upper if part % 2 else high << upper
        threshold = own[:, part].reshape(8 * sets, -1) @ factors
        fires = fraction(high | low) < normal_cdf(threshold.reshape(fired.shape))
        mark = marks << jnp.uint32(8 * part)
        fired = fired | jnp.where(fires, mark, jnp.zeros_like(mark))
    fired = jnp.sum(fired, axis=1, dtype=jnp.uint32)
    # Add the features whose bits are set, block by block.
    width = min(_BLOCK, sets)
    blocks = jnp.pad(fired, ((0, -sets % width), (0, 0)))
    blocks = blocks.reshape(-1, width, len(samples))
    starts = first + 32 * width * jnp.arange(len(blocks), dtype=jnp.int32)

    def step(sums: Sums, block: tuple[Array, Array]) -> tuple[Sums, None]:
        return _add_fired(seed, world, samples, sums, *block), None

    return lax.scan(step, sums, (starts, blocks))[0]


def _add_fired(
    seed: Array, world: World, samples: Array, sums: Sums, first: Array, fired: Array
) -> Sums:
    """Add the features from ``first`` on whose bits are set, one after the other."""
    mean, std = world.mean_firing_magnitudes, world.std_firing_magnitudes

    def next_feature(fired: Array) -> tuple[Array, Array, Array, Array]:
        """Remove the next feature of each sample from the bits, and draw its code."""
        fired, place, exists = _pop_lowest_bit(fired)
        index = jnp.where(exists, first + place, first)
        row = index.astype(jnp.uint32) + jnp.uint32(_OUTSIDE_SIZES << STREAM_SHIFT)
        drawn = normal(threefry(seed, row, samples)[0])
        size = jax.nn.relu(mean[index] + std[index] * drawn)
        size = jnp.where(exists, size, jnp.zeros_like(size))
        return fired, index, size, jnp.any(exists)

    # Compute one iteration ahead, so that XLA draws a code once and not per entry.
    def body(carry: tuple[Any, Sums]) -> tuple[Any, Sums]:
        (fired, index, size, _), sums = carry
        return next_feature(fired), _add_features(world, sums, index, size)

    start = next_feature(fired), sums
    return lax.while_loop(lambda carry: carry[0][3], body, start)[1]


def _pop_lowest_bit(fired: Array) -> tuple[Array, Array, Array]:
    """Clear the lowest set bit of each column of words ``[G, n]``.

    Returns:
      The remaining words, the position of the bit, and whether there was one.
    """
    exists = jnp.zeros(fired.shape[1], bool)
    place, remaining = jnp.zeros(fired.shape[1], jnp.int32), []
    for group, word in enumerate(fired):
        is_first = (word != 0) & ~exists
        lowest = word & (~word + jnp.uint32(1))
        bit = 31 - lax.clz(lowest).astype(jnp.int32)
        place = jnp.where(is_first, 32 * group + bit, place)
        remaining.append(jnp.where(is_first, word ^ lowest, word))
        exists = exists | is_first
    return jnp.stack(remaining), place, exists
