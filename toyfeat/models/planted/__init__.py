"""Models whose features are known: what a method is scored on.

Every function makes a :class:`toyfeat.types.Task` from a random key; its arguments
are the knobs.  :func:`blind` is what a method may see.
"""

from toyfeat.models.planted.heads import blind
from toyfeat.models.planted.manifolds import (
    ignored_structure,
    product_space,
    quiet_and_loud,
    tiled_curve,
)
from toyfeat.models.planted.networks import (
    circuits,
    cross_layer,
    squares,
    superposition,
)
from toyfeat.models.planted.waves import modular_addition
from toyfeat.models.planted.worlds import world_with_head

__all__ = [
    "blind",
    "circuits",
    "cross_layer",
    "ignored_structure",
    "modular_addition",
    "product_space",
    "quiet_and_loud",
    "squares",
    "superposition",
    "tiled_curve",
    "world_with_head",
]
