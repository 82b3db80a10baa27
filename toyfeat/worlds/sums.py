"""Sums over the features of samples: activations and codes."""

from typing import NamedTuple

import jax.numpy as jnp

from toyfeat.types import Array
from toyfeat.worlds.world import World


class Sums(NamedTuple):
    """Sums over features: activations ``[n, D]`` and codes ``[n, F]``, or ``None``."""

    acts: Array | None
    codes: Array | None


def add_features(world: World, sums: Sums, index: Array, value: Array) -> Sums:
    """Add one feature per sample, with its code."""
    acts, codes = sums
    if acts is not None:
        acts = acts + value[:, None] * world.feature_vectors[index]
    if codes is not None:
        codes = codes.at[jnp.arange(len(index)), index].add(value)
    return Sums(acts, codes)
