"""Sampling of activations and codes from a synthetic world."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from toyfeat.checks import check_int
from toyfeat.types import Array
from toyfeat.worlds.bits import fraction, normal, normal_cdf, seed_words, words
from toyfeat.worlds.hierarchy import Hierarchy, Level
from toyfeat.worlds.paths import path_samples
from toyfeat.worlds.world import World


def world_batch(key: Array, world: World, num: int) -> tuple[Array, Array]:
    """Sample activations, and the codes that they are made of.

    ``acts = codes @ feature_vectors + bias``.  The distribution is that of SAELens'
    ``sample_with_features``; the same key gives the same samples in all functions here.

    Args:
      key: a key of any kind.
      world: from :func:`synthetic_world` or :func:`load_synthetic_model`.
      num: number of samples ``N`` (static under ``jit``).

    Returns:
      ``acts [N, D]`` and ``codes [N, F]``, float32.

    Example:
      >>> import jax
      >>> from toyfeat.worlds import synthetic_world
      >>> world = synthetic_world(jax.random.key(0), 20, 8)
      >>> run = jax.jit(world_batch, static_argnums=2)
      >>> acts, codes = run(jax.random.key(1), world, 100)
      >>> again = codes @ world.feature_vectors + world.bias[None, :]
      >>> bool(abs(acts - again).max() < 1e-5)
      True
    """
    seed = _check_call(key, world, num)
    if _has_paths(world):
        acts, codes = path_samples(seed, world, num, acts=True, codes=True)
        return _require(acts), _require(codes)
    codes = dense_codes(seed, world, num)
    return codes @ world.feature_vectors + world.bias[None, :], codes


def world_codes(key: Array, world: World, num: int) -> Array:
    """Sample the codes of :func:`world_batch` alone, ``[N, F]``."""
    seed = _check_call(key, world, num)
    if not _has_paths(world):
        return dense_codes(seed, world, num)
    return _require(path_samples(seed, world, num, acts=False, codes=True).codes)


def world_acts(key: Array, world: World, num: int) -> Array:
    """Sample the activations of :func:`world_batch` alone, ``[N, D]``; the fastest."""
    seed = _check_call(key, world, num)
    if not _has_paths(world):
        codes = dense_codes(seed, world, num)
        return codes @ world.feature_vectors + world.bias[None, :]
    return _require(path_samples(seed, world, num, acts=True, codes=False).acts)


def _require(sums: Array | None) -> Array:
    """Return sums that were requested, or raise a TypeError if they are missing."""
    if sums is None:
        raise TypeError("path_samples: sums that were requested are missing")
    return sums


def _has_paths(world: World) -> bool:
    """Tell whether the trees of a world can be walked one path per tree."""
    return world.hierarchy is not None and world.hierarchy.trees is not None


def _check_call(key: Array, world: World, num: int) -> Array:
    """Check the arguments of a sampler, and return the seed of its words."""
    check_int("world_batch", "num", num, error=ValueError)
    features = world.feature_vectors.shape[0]
    if world.firing_probabilities.shape != (features,):
        raise ValueError(
            f"world_batch: wanted firing_probabilities [{features}], one per feature "
            f"vector, got shape {world.firing_probabilities.shape}"
        )
    return seed_words(key)


def dense_codes(seed: Array, world: World, num: int) -> Array:
    """Sample codes by drawing every feature, then applying the hierarchy."""
    # Every feature: whether it fires, and relu(mean + std * normal) if it does.
    shape = num, world.feature_vectors.shape[0]
    first, second = words(seed, 1, shape)
    mean, std = world.mean_firing_magnitudes, world.std_firing_magnitudes
    size = jax.nn.relu(mean[None, :] + std[None, :] * normal(second))
    fires = fraction(first) < firing_rates(seed, world, num)
    codes = jnp.where(fires, size, jnp.zeros_like(size))
    if world.hierarchy is None:
        return codes
    # From the roots down, so that a parent is settled before its children.
    score = fraction(words(seed, 2, shape)[0])
    for level in world.hierarchy.levels:
        codes = _apply_level(world, world.hierarchy, level, codes, score)
    return codes


def firing_rates(seed: Array, world: World, num: int) -> Array:
    """Compute firing probabilities given the factors of the copula.

    Returns:
      ``[num, F]``, or ``[1, F]`` without a copula.
    """
    if world.correlation_factor is None or world.correlation_diag is None:
        return world.firing_probabilities[None, :]
    # x = factor z + own e exceeds its threshold with a probability of
    # Phi((factor z + Phi^-1(p)) / own), given z.
    rank = world.correlation_factor.shape[1]
    factors = normal(words(seed, 0, (num, rank))[0])
    own = jnp.sqrt(world.correlation_diag)
    limit = ndtri(world.firing_probabilities) / own
    shift = factors @ (world.correlation_factor / own[:, None]).T
    return normal_cdf(shift + limit[None, :])


def _apply_level(
    world: World, hierarchy: Hierarchy, level: Level, codes: Array, score: Array
) -> Array:
    """Apply mutual exclusion and parents to the codes of a level."""
    take = {"mode": "fill", "fill_value": 0.0}
    # Of exclusive siblings, only the one with the largest score stays.
    if level.siblings.size:
        scores = jnp.where(codes > 0, score, jnp.full_like(score, -1.0))
        scores = scores.at[:, level.siblings].get(mode="fill", fill_value=-1.0)
        best = jnp.argmax(scores, axis=2)[..., None]
        loses = lax.broadcasted_iota(best.dtype, scores.shape, 2) != best
        keep = codes.at[:, level.siblings].get(**take) * (~loses).astype(codes.dtype)
        codes = codes.at[:, level.siblings].set(keep, mode="drop")
    # A child is 0 without its parent, and may be scaled by the parent's code.
    if level.features.size:
        parent = codes.at[:, level.parents].get(mode="fill", fill_value=1.0)
        mean = world.mean_firing_magnitudes.at[level.parents].get(
            mode="fill", fill_value=1.0
        )
        scaled = hierarchy.scaled[level.features]
        gain = jnp.where(scaled[None, :], parent / mean[None, :], jnp.ones_like(parent))
        gain = jnp.where(parent > 0, gain, jnp.zeros_like(gain))
        codes = codes.at[:, level.features].multiply(gain)
    return codes
