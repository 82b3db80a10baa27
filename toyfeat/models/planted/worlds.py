"""A synthetic world with a network that reads some of its features.

References:
  Chanin and Garriga-Alonso, SynthSAEBench, arXiv 2602.14687, for the world.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.models.planted import heads
from toyfeat.models.planted.heads import dot, unit
from toyfeat.models.planted.task import Task, Truth
from toyfeat.types import Array, Params
from toyfeat.worlds import (
    HierarchyConfig,
    LinearMagnitude,
    synthetic_world,
    world_codes,
)
from toyfeat.worlds.config import Firing, FoldedNormalMagnitude, ZipfianFiring
from toyfeat.worlds.world import World

_RARE = ZipfianFiring(max_prob=0.05, min_prob=0.005)
# Examples behind the frequencies, which a hierarchy makes hard to compute: a feature of
# frequency .005 is counted 100 times, to 10 %.
_EXAMPLES = 20_000


def world_with_head(
    key: Array,
    *,
    features: int = 512,
    dim: int = 128,
    read: int = 64,
    composed: int = 32,
    parts: int = 3,
    threshold: float = 0.8,
    firing: Firing = _RARE,
    hierarchy: HierarchyConfig | None = None,
) -> Task:
    """Plant a hierarchical world, of which a network reads some features and sums.

    Of the world's features the network reads ``read`` alone, and ``composed`` sums of
    ``parts`` others, which it does not tell apart; what it never reads is the rest.

    Args:
      key: random key of the task; not traced.
      features: of the world.
      dim: width ``D``.
      read: features that are read alone.
      composed: sums that are read.
      parts: features in a sum.
      threshold: under which a reader is silent, so that the interference of features
        in superposition stays small.
      firing: how often features fire, see :func:`toyfeat.worlds.synthetic_world`.
      hierarchy: trees of the world; ``None`` for a tree of 4 branches and 2 levels
        under every 32nd feature.

    Returns:
      :class:`toyfeat.models.planted.Task`; the features of the model are the
      ``read``, then the ``composed`` ones, with frequencies measured on a sample;
      ``ignored`` is ``None`` as the world fills the space.

    Raises:
      ValueError: if the world has too few features, or the threshold silences all.
      TypeError: if a size is not an int.
    """
    _check(features, dim, read, composed, parts, threshold)
    used = read + composed * parts
    world_key, chosen_key, mix_key = jax.random.split(key, 3)
    world = _world(world_key, features, dim, firing, hierarchy)
    # Choose what is read alone, and what is read in sums.
    order = np.asarray(jax.random.permutation(chosen_key, features))[:used]
    alone, sums = order[:read], order[read:].reshape(composed, parts)
    rows = world.feature_vectors
    readers = unit(jnp.concatenate([rows[alone], rows[sums].sum(1)]))
    params = heads.head(mix_key, readers, threshold) | {"world": world}
    # Measure how often each of them passes the threshold.
    acts = dot(_codes(world, jax.random.fold_in(mix_key, 1), _EXAMPLES), rows)
    frequency = jnp.mean(heads.features(params, acts) > 0, axis=0, dtype=readers.dtype)
    if not frequency.any():
        raise ValueError(
            f"world_with_head: no feature passes the threshold {threshold}; lower it"
        )
    return heads.make_task(
        "world with a head",
        _world_acts,
        params,
        partial(_codes, world),
        Truth(readers=readers, writers=readers, frequency=frequency),
        about=f"A hierarchical world of {features} features in {dim} dimensions; the "
        f"network reads {read} of them alone and {composed} sums of {parts}, "
        f"{used / features:.0%} in all.",
        limits="The parts of a sum are not told apart by the model, and nothing it "
        "computes could tell them.",
    )


def _check(
    features: int, dim: int, read: int, composed: int, parts: int, threshold: float
) -> None:
    sizes = {"features": features, "dim": dim, "read": read, "composed": composed}
    heads.check_ints("world_with_head", **sizes, parts=parts)
    if read + composed * parts > features or min(read, composed, parts) < 1:
        raise ValueError(
            "world_with_head: wanted at least one of read, composed and parts, and "
            f"read + composed * parts <= features = {features}, got {read}, "
            f"{composed}, {parts}"
        )
    if dim < 1 or not math.isfinite(threshold):
        raise ValueError(
            "world_with_head: wanted dim of at least 1 and a finite threshold, got dim "
            f"{dim}, threshold {threshold}"
        )


def _world(
    key: Array,
    features: int,
    dim: int,
    firing: Firing,
    hierarchy: HierarchyConfig | None,
) -> World:
    return synthetic_world(
        key,
        features,
        dim,
        firing_probability=firing,
        hierarchy=hierarchy
        or HierarchyConfig(
            total_root_nodes=max(1, features // 32),
            branching_factor=4,
            max_depth=2,
            compensate_probabilities=True,
        ),
        std_firing_magnitudes=FoldedNormalMagnitude(mean=0.2, std=0.1),
        mean_firing_magnitudes=LinearMagnitude(start=1.8, end=1.2),
        bias=0.0,
    )


def _codes(world: World, key: Array, num: int) -> Array:
    return world_codes(key, world, num).astype(world.feature_vectors.dtype)


def _world_acts(params: Params, codes: Array) -> Array:
    return dot(codes, params["world"].feature_vectors)
