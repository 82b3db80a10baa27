"""Samples of a world whose trees are complete and exclusive: one path per tree.

At most one of exclusive siblings fires, so that a tree is walked from its root: of
the children of the feature that fires, the one that is kept is drawn, and so on down.
Features below others, which cannot matter, are never drawn.  Arrays have the samples
last, in chunks that stay in the caches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from toyfeat.data.bits import fraction, normal, normal_cdf, threefry, uniform
from toyfeat.data.world import World
from toyfeat.types import Array

_FACTORS, _FIRES, _SIZES, _OUTSIDE, _LOW, _OUTSIDE_SIZES = range(8, 14)  # streams
_CHUNK = 256
_WORDS = 8
_NEVER = 2.0


class _Tables(NamedTuple):
    """``[F]`` each, what a walk looks up."""

    active: Array  # probability that a code that fires is above 0
    mean: Array
    std: Array
    least: Array  # erf of where the normal is cut
    gain: Array  # 1 / mean of the parent that scales, or 0


class Sums(NamedTuple):
    """``[n, D]`` and ``[n, F]``, each of them or ``None``."""

    acts: Array | None
    codes: Array | None


def path_samples(
    seed: Array, world: World, num: int, *, acts: bool, codes: bool
) -> Sums:
    """Activations, codes or both, of ``num`` samples."""
    size = _CHUNK if jax.default_backend() == "cpu" else num
    features, dim = world.feature_vectors.shape
    weights, tables = _weights(world), _tables(world)

    def chunk(first: Array) -> Sums:
        samples = first + lax.iota(jnp.uint32, size)
        factors = normal(_words(seed, _FACTORS, weights.shape[1] - 1, samples))
        ones = jnp.ones((1, size), jnp.float32)
        factors = jnp.concatenate([factors, ones])
        sums = Sums(
            jnp.broadcast_to(world.bias[None, :], (size, dim)) if acts else None,
            jnp.zeros((size, features), jnp.float32) if codes else None,
        )
        for walk in _walks(seed, world, tables, weights, factors, samples):
            sums = _summed(world, sums, walk)
        return _outside(seed, world, weights, factors, samples, sums)

    starts = size * jnp.arange(-(-num // size), dtype=jnp.uint32)
    out = lax.map(chunk, starts)
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:num], out)


def _words(seed: Array, stream: int, rows: int, samples: Array) -> Array:
    return _pairs(seed, stream, rows, samples)[0]


def _pairs(seed: Array, stream: int, rows: int, samples: Array) -> tuple[Array, Array]:
    shape = rows, len(samples)
    row = lax.broadcasted_iota(jnp.uint32, shape, 0) + jnp.uint32(stream << 24)
    return threefry(seed, row, jnp.broadcast_to(samples[None, :], shape))


def _weights(world: World) -> Array:
    """``[F, r + 1]``: times the factors and 1, the normal quantile of firing."""
    limit = ndtri(world.firing_probabilities)[:, None]
    if world.correlation_factor is None or world.correlation_diag is None:
        return limit
    own = jnp.sqrt(world.correlation_diag)[:, None]
    return jnp.concatenate([world.correlation_factor, limit], axis=1) / own


def _tables(world: World) -> _Tables:
    assert world.hierarchy is not None
    mean, std = world.mean_firing_magnitudes, world.std_firing_magnitudes
    fixed = jnp.where(mean > 0, jnp.full_like(mean, jnp.inf), -jnp.inf)
    ratio = jnp.where(std > 0, mean / jnp.where(std > 0, std, 1.0), fixed)
    above = mean[jnp.maximum(world.hierarchy.parents, 0)]
    gain = jnp.where(world.hierarchy.scaled, 1 / above, jnp.zeros_like(above))
    least = lax.erf(-ratio * jnp.float32(0.5**0.5))
    return _Tables(normal_cdf(ratio), mean, std, least, gain)


def _walks(
    seed: Array,
    world: World,
    tables: _Tables,
    weights: Array,
    factors: Array,
    samples: Array,
) -> list[tuple[Array, Array]]:
    """For every level the features that are kept and their codes, ``[T, n]`` each."""
    assert world.hierarchy is not None
    assert world.hierarchy.trees is not None
    levels, num = world.hierarchy.trees, len(samples)
    roots = levels[0].size
    sizes = uniform(_words(seed, _SIZES, roots * len(levels), samples))
    starts = [0]
    for level in levels:
        starts.append(starts[-1] + level.size)
    draws = _words(
        seed, _FIRES, roots * (1 + levels[1].shape[1] * len(levels)), samples
    )
    found, path, value = [], [], jnp.ones((roots, num), jnp.float32)
    node = jnp.broadcast_to(jnp.arange(roots, dtype=jnp.int32)[:, None], (roots, num))
    for at, level in enumerate(levels):
        part = slice(starts[at], starts[at + 1])
        mine = [x[part].reshape(*level.shape, 1) for x in tables]
        near = (weights[part] @ factors).reshape(*level.shape, num)
        if at == 0:
            fires = fraction(draws[:roots]) < normal_cdf(near) * mine[0]
        else:
            width = level.shape[-1]
            near, *mine = (_chosen(x, path) for x in (near, *mine))
            rate = normal_cdf(near) * mine[0]
            rows = roots * (1 + width * (at - 1))
            drawn = draws[rows : rows + roots * width].reshape(roots, width, num)
            fires, won = _winner(fraction(drawn), rate)
            fires, node = fires & (value > 0), node * width + won
            mine = [_chosen(x, [won]) for x in mine]
            path.append(won)
        _, mean, std, least, gain = mine
        size = _cut_normal(sizes[roots * at : roots * (at + 1)], mean, std, least)
        size = jnp.where(gain > 0, size * value * gain, size)
        value = jnp.where(fires, size, jnp.zeros_like(size))
        found.append((node + starts[at], value))
    return found


def _chosen(x: Array, path: Sequence[Array]) -> Array:
    """``[T, C, C, ..., n]`` at a child per tree and sample, for each step."""
    for step in path:
        index = step.reshape(step.shape[0], *(1,) * (x.ndim - 3), step.shape[1])
        out = x[:, 0]
        for child in range(1, x.shape[1]):
            out = jnp.where(index == child, x[:, child], out)
        x = out
    return x


def _winner(drawn: Array, rate: Array) -> tuple[Array, Array]:
    """Whether any of ``[T, C, n]`` fires, and which of those is kept.

    Given that ``drawn < rate``, ``drawn / rate`` is uniform and settles who is kept.
    """
    score = jnp.where(drawn < rate, drawn / rate, jnp.full_like(rate, _NEVER))
    best = jnp.min(score, axis=1)
    won = jnp.zeros(best.shape, jnp.int32)
    for child in range(1, rate.shape[1]):
        won = jnp.where(score[:, child] == best, child, won)
    return best < _NEVER, won


def _cut_normal(drawn: Array, mean: Array, std: Array, least: Array) -> Array:
    """The normal given that it is above 0."""
    inside = jnp.minimum(least + (1 - least) * drawn, jnp.float32(1 - 2.0**-24))
    return jax.nn.relu(mean + std * jnp.float32(2.0**0.5) * lax.erf_inv(inside))


def _summed(world: World, sums: Sums, walk: tuple[Array, Array]) -> Sums:
    """In a loop, so that indices and codes are computed once and not per entry."""
    step = lambda sums, one: (_added(world, sums, *one), None)  # noqa: E731
    return lax.scan(step, sums, walk)[0]


def _added(world: World, sums: Sums, index: Array, value: Array) -> Sums:
    acts, codes = sums
    if acts is not None:
        acts = acts + value[:, None] * world.feature_vectors[index]
    if codes is not None:
        codes = codes.at[jnp.arange(len(index)), index].add(value)
    return Sums(acts, codes)


def _outside(
    seed: Array,
    world: World,
    weights: Array,
    factors: Array,
    samples: Array,
    sums: Sums,
) -> Sums:
    """Adds the features outside the trees, 32 bits of a word at a time.

    A feature's 16 bits decide together with 16 that a sample's features share: these
    matter to one in ``2**16``, to two at once in ``2**32``.
    """
    assert world.hierarchy is not None
    assert world.hierarchy.trees is not None
    first = sum(level.size for level in world.hierarchy.trees)
    count = weights.shape[0] - first
    if count == 0:
        return sums
    sets = -(-count // 32)
    own = jnp.pad(weights[first:], ((0, 32 * sets - count), (0, 0)))
    filled = jnp.where(jnp.arange(32 * sets) < count, own[:, -1], -jnp.inf)
    own = own.at[:, -1].set(filled).reshape(sets, 4, 8, -1)
    low = (_words(seed, _LOW, 1, samples) >> jnp.uint32(16))[None]
    many = _pairs(seed, _OUTSIDE, 8 * sets, samples)
    fired = jnp.zeros((sets, 8, len(samples)), jnp.uint32)
    marks = jnp.uint32(1) << jnp.arange(8, dtype=jnp.uint32)[None, :, None]
    upper = jnp.uint32(16)
    for part in range(4):
        high = many[part // 2].reshape(fired.shape)
        high = high >> upper << upper if part % 2 else high << upper
        near = own[:, part].reshape(8 * sets, -1) @ factors
        fires = fraction(high | low) < normal_cdf(near.reshape(fired.shape))
        mark = marks << jnp.uint32(8 * part)
        fired = fired | jnp.where(fires, mark, jnp.zeros_like(mark))
    fired = jnp.sum(fired, axis=1, dtype=jnp.uint32)
    width = min(_WORDS, sets)
    blocks = jnp.pad(fired, ((0, -sets % width), (0, 0)))
    blocks = blocks.reshape(-1, width, len(samples))
    starts = first + 32 * width * jnp.arange(len(blocks), dtype=jnp.int32)

    def block(sums: Sums, one: tuple[Array, Array]) -> tuple[Sums, None]:
        return _listed(seed, world, samples, sums, *one), None

    return lax.scan(block, sums, (starts, blocks))[0]


def _listed(
    seed: Array, world: World, samples: Array, sums: Sums, first: Array, fired: Array
) -> Sums:
    """Adds the features from ``first`` on whose bits are set, one after the other."""
    mean, std = world.mean_firing_magnitudes, world.std_firing_magnitudes

    def following(fired: Array) -> tuple[Array, Array, Array, Array]:
        fired, place, found = _lowest(fired)
        index = jnp.where(found, first + place, first)
        row = index.astype(jnp.uint32) + jnp.uint32(_OUTSIDE_SIZES << 24)
        drawn = normal(threefry(seed, row, samples)[0])
        size = jax.nn.relu(mean[index] + std[index] * drawn)
        size = jnp.where(found, size, jnp.zeros_like(size))
        return fired, index, size, jnp.any(found)

    # One turn ahead, so that what is added was computed once and not per entry.
    def body(carry: tuple[Any, Sums]) -> tuple[Any, Sums]:
        (fired, index, size, _), sums = carry
        return following(fired), _added(world, sums, index, size)

    return lax.while_loop(lambda c: c[0][3], body, (following(fired), sums))[1]


def _lowest(fired: Array) -> tuple[Array, Array, Array]:
    """Words ``[G, n]`` without their lowest bit, its place, whether there is one."""
    found = jnp.zeros(fired.shape[1], bool)
    place, left = jnp.zeros(fired.shape[1], jnp.int32), []
    for group, word in enumerate(fired):
        here = (word != 0) & ~found
        lowest = word & (~word + jnp.uint32(1))
        bit = 31 - lax.clz(lowest).astype(jnp.int32)
        place = jnp.where(here, 32 * group + bit, place)
        left.append(jnp.where(here, word ^ lowest, word))
        found = found | here
    return jnp.stack(left), place, found
