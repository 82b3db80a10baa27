"""Bases from statistics: PCA, gradient PCA, joint PCA, local interaction basis."""

from toyfeat.decompose.basis import decode, describe, eigengaps, encode, truncated
from toyfeat.decompose.edges import interaction_edges
from toyfeat.decompose.interaction import local_interaction_basis
from toyfeat.decompose.second_moments import (
    covariance,
    gradient_pca,
    joint_pca,
    pca,
)

__all__ = [
    "covariance",
    "decode",
    "describe",
    "eigengaps",
    "encode",
    "gradient_pca",
    "interaction_edges",
    "joint_pca",
    "local_interaction_basis",
    "pca",
    "truncated",
]
