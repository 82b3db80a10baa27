"""Fast sampling of worlds whose trees are complete and exclusive: one path per tree.

At most one of exclusive siblings fires, so a tree is walked from its root: among the
children of the active feature one is selected, then among its children, and so on.
Features off the path cannot fire and are never drawn.  Samples are the last axis of
arrays, in chunks that stay in the caches of a CPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from toyfeat.types import Array
from toyfeat.worlds.bits import fraction, normal, normal_cdf, row_words, uniform
from toyfeat.worlds.hierarchy import Hierarchy
from toyfeat.worlds.outside import add_outside
from toyfeat.worlds.sums import Sums, add_features
from toyfeat.worlds.world import World

_FACTORS, _FIRES, _SIZES = range(8, 11)  # streams of random words
_CHUNK = 256  # samples per chunk on a CPU, so that its arrays fit in the caches
_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1, where erf_inv is finite
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
        factors = normal(row_words(seed, _FACTORS, weights.shape[1] - 1, samples))
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
        return add_outside(seed, world, first_outside, weights, factors, samples, sums)

    starts = size * jnp.arange(-(-num // size), dtype=jnp.uint32)
    out = lax.map(chunk, starts)
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:num], out)


def _weights(world: World) -> Array:
    """Weights of the factors and of 1 in the firing threshold, ``[F, r + 1]``."""
    limit = ndtri(world.firing_probabilities)[:, None]
    if world.correlation_factor is None or world.correlation_diag is None:
        return limit
    own = jnp.sqrt(world.correlation_diag)[:, None]
    return jnp.concatenate([world.correlation_factor, limit], axis=1) / own


def _tables(world: World, hierarchy: Hierarchy) -> _Tables:
    """Compute the parameters that a walk looks up."""
    # A magnitude is above 0 with probability Phi(mean / std), or always or never.
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
    sizes = uniform(row_words(seed, _SIZES, roots * len(levels), samples))
    starts = [0]
    for level in levels:
        starts.append(starts[-1] + level.size)
    draws = row_words(
        seed, _FIRES, roots * (1 + levels[1].shape[1] * len(levels)), samples
    )
    steps, path, value = [], [], jnp.ones((roots, num), jnp.float32)
    node = jnp.broadcast_to(jnp.arange(roots, dtype=jnp.int32)[:, None], (roots, num))
    # Level by level: whether a feature fires in each tree, which one, and its code.
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
    inside = jnp.minimum(least + (1 - least) * drawn, jnp.float32(_BELOW_ONE))
    return jax.nn.relu(mean + std * jnp.float32(2.0**0.5) * lax.erf_inv(inside))


def _add_level(world: World, sums: Sums, walk: tuple[Array, Array]) -> Sums:
    """Add the features of a level, tree by tree.

    The loop makes XLA compute indices and codes once, not once per entry of the sums.
    """

    def step(sums: Sums, tree: tuple[Array, Array]) -> tuple[Sums, None]:
        return add_features(world, sums, *tree), None

    return lax.scan(step, sums, walk)[0]
