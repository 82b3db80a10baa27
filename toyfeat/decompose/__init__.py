"""Statistics to bases: directions that are read, and directions that are written."""

from toyfeat.decompose.circles import circular_planes
from toyfeat.decompose.codes import decode, eigengaps, encode, explanation
from toyfeat.decompose.interaction import (
    interaction_edges,
    local_interaction_basis,
)
from toyfeat.decompose.second_moments import (
    covariance,
    gradient_pca,
    joint_pca,
    pca,
)

__all__ = [
    "circular_planes",
    "covariance",
    "decode",
    "eigengaps",
    "encode",
    "explanation",
    "gradient_pca",
    "interaction_edges",
    "joint_pca",
    "local_interaction_basis",
    "pca",
]
