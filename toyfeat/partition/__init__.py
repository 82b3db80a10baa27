"""Partition: weights of a model split into parts of which few matter at a time."""

from toyfeat.partition import importance, losses
from toyfeat.partition.adversary import persistent_pgd
from toyfeat.partition.batches import sparse_batches
from toyfeat.partition.decomposition import Decomposition, Site
from toyfeat.partition.evaluation import reconstructions
from toyfeat.partition.gradients import attributions, gradient_batch
from toyfeat.partition.importance import importances
from toyfeat.partition.presets import Preset, spd_2025, vpd_2026
from toyfeat.partition.sites import decompose_weights
from toyfeat.partition.squashings import lower_leaky, upper_leaky
from toyfeat.partition.training import cosine, trainer

__all__ = [
    "Decomposition",
    "Preset",
    "Site",
    "attributions",
    "cosine",
    "decompose_weights",
    "gradient_batch",
    "importance",
    "importances",
    "losses",
    "lower_leaky",
    "persistent_pgd",
    "reconstructions",
    "sparse_batches",
    "spd_2025",
    "trainer",
    "upper_leaky",
    "vpd_2026",
]
