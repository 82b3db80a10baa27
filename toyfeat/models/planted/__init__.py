"""Models whose features are known: what a method is scored on.

Every function makes a :class:`Task` from a random key; its arguments are the knobs.
:func:`subject_of` is what a method may see, and :func:`recondition` the same task in
other coordinates.
"""

from toyfeat.models.planted.attention import attention_reads
from toyfeat.models.planted.bottleneck import superposition
from toyfeat.models.planted.conditioning import recondition
from toyfeat.models.planted.controls import random_network, unrelated_labels
from toyfeat.models.planted.crowds import overcomplete
from toyfeat.models.planted.gated import gated_units
from toyfeat.models.planted.loudness import quiet_and_loud
from toyfeat.models.planted.manifolds import (
    ignored_structure,
    product_space,
    tiled_curve,
)
from toyfeat.models.planted.networks import (
    circuits,
    cross_layer,
    squares,
)
from toyfeat.models.planted.residual import compressed_computation, resid_mlp
from toyfeat.models.planted.task import Task, Truth, subject_of
from toyfeat.models.planted.waves import modular_addition
from toyfeat.models.planted.worlds import world_with_head

__all__ = [
    "Task",
    "Truth",
    "attention_reads",
    "circuits",
    "compressed_computation",
    "cross_layer",
    "gated_units",
    "ignored_structure",
    "modular_addition",
    "overcomplete",
    "product_space",
    "quiet_and_loud",
    "random_network",
    "recondition",
    "resid_mlp",
    "squares",
    "subject_of",
    "superposition",
    "tiled_curve",
    "unrelated_labels",
    "world_with_head",
]
