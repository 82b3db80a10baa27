"""Keyed synthetic worlds, their samples and their files."""

from toyfeat.data.config import (
    ConstantMagnitude,
    CorrelationConfig,
    ExponentialMagnitude,
    FoldedNormalMagnitude,
    HierarchyConfig,
    LinearFiring,
    LinearMagnitude,
    OrthogonalizationConfig,
    RandomFiring,
    WorldConfig,
    ZipfianFiring,
)
from toyfeat.data.files import load_synthetic_model, save_synthetic_model
from toyfeat.data.sampling import world_acts, world_batch, world_codes
from toyfeat.data.world import World, synth_sae_bench, synthetic_world

__all__ = [
    "ConstantMagnitude",
    "CorrelationConfig",
    "ExponentialMagnitude",
    "FoldedNormalMagnitude",
    "HierarchyConfig",
    "LinearFiring",
    "LinearMagnitude",
    "OrthogonalizationConfig",
    "RandomFiring",
    "World",
    "WorldConfig",
    "ZipfianFiring",
    "load_synthetic_model",
    "save_synthetic_model",
    "synth_sae_bench",
    "synthetic_world",
    "world_acts",
    "world_batch",
    "world_codes",
]
