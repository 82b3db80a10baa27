"""SAELens' synthetic worlds: activations whose features are known."""

from toyfeat.worlds.config import (
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
from toyfeat.worlds.files import load_synthetic_model, save_synthetic_model
from toyfeat.worlds.sampling import world_acts, world_batch, world_codes
from toyfeat.worlds.world import World, synth_sae_bench, synthetic_world

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
