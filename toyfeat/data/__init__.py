"""Where examples come from: synthetic worlds, stores on disk, mixing buffers."""

from toyfeat.data.batches import array_batches, store_batches
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
from toyfeat.data.mixing import mixing_buffer
from toyfeat.data.sampling import world_acts, world_batch, world_codes
from toyfeat.data.store import Store, open_store, store_size, verify_store
from toyfeat.data.world import World, synth_sae_bench, synthetic_world
from toyfeat.data.writing import store_writer

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
    "Store",
    "World",
    "WorldConfig",
    "ZipfianFiring",
    "array_batches",
    "load_synthetic_model",
    "mixing_buffer",
    "open_store",
    "save_synthetic_model",
    "store_batches",
    "store_size",
    "store_writer",
    "synth_sae_bench",
    "synthetic_world",
    "verify_store",
    "world_acts",
    "world_batch",
    "world_codes",
]
