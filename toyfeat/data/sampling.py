"""Samples of a synthetic world."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from toyfeat.data.bits import fraction, normal, normal_cdf, seed_words, words
from toyfeat.data.hierarchy import Level
from toyfeat.data.paths import path_samples
from toyfeat.data.world import World
from toyfeat.types import Array


def world_batch(key: Array, world: World, num: int) -> tuple[Array, Array]:
    """Activations of independent samples, and the codes they are made of.

    ``acts = codes @ feature_vectors + bias``.  The distribution is that of SAELens'
    ``sample_with_features``; the same key gives the same samples in all functions here.

    Args:
      key: of any kind.
      world: from :func:`synthetic_world` or :func:`load_synthetic_model`.
      num: ``N``, how many (static under ``jit``).

    Returns:
      ``acts [N, D]`` and ``codes [N, F]``, float32.

    Example:
      >>> import jax
      >>> from toyfeat.data import synthetic_world
      >>> world = synthetic_world(jax.random.key(0), 20, 8)
      >>> run = jax.jit(world_batch, static_argnums=2)
      >>> acts, codes = run(jax.random.key(1), world, 100)
      >>> again = codes @ world.feature_vectors + world.bias[None, :]
      >>> bool(abs(acts - again).max() < 1e-5)
      True
    """
    seed = _checked(key, world, num)
    if _by_paths(world):
        acts, codes = path_samples(seed, world, num, acts=True, codes=True)
        assert acts is not None
        assert codes is not None
        return acts, codes
    codes = dense_codes(seed, world, num)
    return codes @ world.feature_vectors + world.bias[None, :], codes


def world_codes(key: Array, world: World, num: int) -> Array:
    """The codes of :func:`world_batch` alone, ``[N, F]``."""
    seed = _checked(key, world, num)
    if not _by_paths(world):
        return dense_codes(seed, world, num)
    codes = path_samples(seed, world, num, acts=False, codes=True).codes
    assert codes is not None
    return codes


def world_acts(key: Array, world: World, num: int) -> Array:
    """The activations of :func:`world_batch` alone, ``[N, D]``; the fastest."""
    seed = _checked(key, world, num)
    if not _by_paths(world):
        codes = dense_codes(seed, world, num)
        return codes @ world.feature_vectors + world.bias[None, :]
    acts = path_samples(seed, world, num, acts=True, codes=False).acts
    assert acts is not None
    return acts


def _by_paths(world: World) -> bool:
    return world.hierarchy is not None and world.hierarchy.trees is not None


def _checked(key: Array, world: World, num: int) -> Array:
    if not isinstance(num, int) or num < 1:
        raise ValueError(f"world_batch: num must be an int of at least 1, got {num!r}")
    features = world.feature_vectors.shape[0]
    if world.firing_probabilities.shape != (features,):
        raise ValueError(
            f"world_batch: wanted firing_probabilities [{features}], one per feature "
            f"vector, got shape {world.firing_probabilities.shape}"
        )
    return seed_words(key)


def dense_codes(seed: Array, world: World, num: int) -> Array:
    """Every feature of every sample is drawn, and the hierarchy applied to them."""
    shape = num, world.feature_vectors.shape[0]
    first, second = words(seed, 1, shape)
    mean, std = world.mean_firing_magnitudes, world.std_firing_magnitudes
    size = jax.nn.relu(mean[None, :] + std[None, :] * normal(second))
    fires = fraction(first) < firing_rates(seed, world, num)
    codes = jnp.where(fires, size, jnp.zeros_like(size))
    if world.hierarchy is None:
        return codes
    score = fraction(words(seed, 2, shape)[0])
    for level in world.hierarchy.levels:
        codes = _below(world, level, codes, score)
    return codes


def firing_rates(seed: Array, world: World, num: int) -> Array:
    """``[num, F]`` or ``[1, F]``, probabilities given the factors of the copula."""
    if world.correlation_factor is None or world.correlation_diag is None:
        return world.firing_probabilities[None, :]
    rank = world.correlation_factor.shape[1]
    factors = normal(words(seed, 0, (num, rank))[0])
    own = jnp.sqrt(world.correlation_diag)
    limit = ndtri(world.firing_probabilities) / own
    shift = factors @ (world.correlation_factor / own[:, None]).T
    return normal_cdf(shift + limit[None, :])


def _below(world: World, level: Level, codes: Array, score: Array) -> Array:
    """One of exclusive siblings, then nothing without the parent."""
    assert world.hierarchy is not None
    take = {"mode": "fill", "fill_value": 0.0}
    if level.siblings.size:
        mine = jnp.where(codes > 0, score, jnp.full_like(score, -1.0))
        mine = mine.at[:, level.siblings].get(mode="fill", fill_value=-1.0)
        best = jnp.argmax(mine, axis=2)[..., None]
        loses = lax.broadcasted_iota(best.dtype, mine.shape, 2) != best
        keep = codes.at[:, level.siblings].get(**take) * (~loses).astype(codes.dtype)
        codes = codes.at[:, level.siblings].set(keep, mode="drop")
    if level.features.size:
        above = codes.at[:, level.parents].get(mode="fill", fill_value=1.0)
        mean = world.mean_firing_magnitudes.at[level.parents].get(
            mode="fill", fill_value=1.0
        )
        scaled = world.hierarchy.scaled[level.features]
        gain = jnp.where(scaled[None, :], above / mean[None, :], jnp.ones_like(above))
        gain = jnp.where(above > 0, gain, jnp.zeros_like(gain))
        codes = codes.at[:, level.features].multiply(gain)
    return codes
