"""Features of a model, from its activations and their gradients, in JAX.

The public face has 49 names: ten contracts, 27 functions, 12 namespaces.  Everything
else is imported from its module (``toyfeat.decompose``, ``toyfeat.discover``,
``toyfeat.worlds``, ``toyfeat.lm``, ``toyfeat.jobs``, ``toyfeat.report``).

``toyfeat.tap``, ``toyfeat.moments`` and the like are the functions; ``from toyfeat.tap
import ...`` still reaches the modules of the same name.
"""

from toyfeat import data, interop, linalg, metrics, partition
from toyfeat import dictionary as dictionaries
from toyfeat import lens as lenses
from toyfeat.checkpoint import load_tree, save_tree
from toyfeat.decompose import (
    decode,
    describe,
    encode,
    gradient_pca,
    joint_pca,
    local_interaction_basis,
    pca,
)
from toyfeat.dictionary import Dictionary, controllers, losses
from toyfeat.discover import consensus
from toyfeat.models import planted
from toyfeat.moments import moments, moments_of
from toyfeat.tap import (
    check_no_mixing,
    check_taps,
    from_equinox,
    from_function,
    from_haiku,
    from_linen,
    from_nnx,
    from_penzai,
    from_split,
    readouts,
    site_shapes,
    tap,
)
from toyfeat.train import (
    Trainer,
    TrainState,
    denormalized,
    fit,
    population,
    sweeps,
    trainer,
)
from toyfeat.types import (
    Accumulator,
    Basis,
    Features,
    Moments,
    Probed,
    Subject,
    Taps,
)

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "Basis",
    "Dictionary",
    "Features",
    "Moments",
    "Probed",
    "Subject",
    "Taps",
    "TrainState",
    "Trainer",
    "check_no_mixing",
    "check_taps",
    "consensus",
    "controllers",
    "data",
    "decode",
    "denormalized",
    "describe",
    "dictionaries",
    "encode",
    "fit",
    "from_equinox",
    "from_function",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "from_penzai",
    "from_split",
    "gradient_pca",
    "interop",
    "joint_pca",
    "lenses",
    "linalg",
    "load_tree",
    "local_interaction_basis",
    "losses",
    "metrics",
    "moments",
    "moments_of",
    "partition",
    "pca",
    "planted",
    "population",
    "readouts",
    "save_tree",
    "site_shapes",
    "sweeps",
    "tap",
    "trainer",
]
