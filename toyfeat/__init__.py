"""Features of the model: activations and gradients, analysed together, in JAX.

Everything that is public is here.  ``toyfeat.tap`` and ``toyfeat.moments`` are
the functions; import from the modules of the same name with ``from toyfeat.tap
import ...``.
"""

from toyfeat.ablation import ablation_curve, edge_ablation, edges_needed
from toyfeat.decompose import (
    decode,
    eigengaps,
    encode,
    explanation,
    gradient_pca,
    interaction_edges,
    joint_pca,
    local_interaction_basis,
    pca,
)
from toyfeat.dictionary import (
    batch_topk,
    gated,
    gradient_topk,
    jump_relu,
    matryoshka,
    standard,
    topk,
)
from toyfeat.evaluate import (
    match_features,
    output_preserved,
    principal_angles,
    r_squared,
    random_coverage,
    variance_explained,
)
from toyfeat.interop import load_saelens, save_saelens
from toyfeat.linalg import Products, randomized_svd, stream_svd
from toyfeat.moments import moments, sketched_moments
from toyfeat.tap import (
    check_no_mixing,
    check_taps,
    from_function,
    from_linen,
    from_nnx,
    from_split,
    readouts,
    site_shapes,
    tap,
)
from toyfeat.types import (
    SVD,
    Accumulator,
    Basis,
    Diagnostics,
    Dictionary,
    DictionaryConfig,
    Match,
    Moments,
    Probed,
    SketchedMoments,
    SVDInfo,
    Taps,
    Truth,
)

__version__ = "0.1.0"

__all__ = [
    "SVD",
    "Accumulator",
    "Basis",
    "Diagnostics",
    "Dictionary",
    "DictionaryConfig",
    "Match",
    "Moments",
    "Probed",
    "Products",
    "SVDInfo",
    "SketchedMoments",
    "Taps",
    "Truth",
    "ablation_curve",
    "batch_topk",
    "check_no_mixing",
    "check_taps",
    "decode",
    "edge_ablation",
    "edges_needed",
    "eigengaps",
    "encode",
    "explanation",
    "from_function",
    "from_linen",
    "from_nnx",
    "from_split",
    "gated",
    "gradient_pca",
    "gradient_topk",
    "interaction_edges",
    "joint_pca",
    "jump_relu",
    "load_saelens",
    "local_interaction_basis",
    "match_features",
    "matryoshka",
    "moments",
    "output_preserved",
    "pca",
    "principal_angles",
    "r_squared",
    "random_coverage",
    "randomized_svd",
    "readouts",
    "save_saelens",
    "site_shapes",
    "sketched_moments",
    "standard",
    "stream_svd",
    "tap",
    "topk",
    "variance_explained",
]
