"""Randomized SVD: the inside of one function."""

from toyfeat.linalg.randomized.linear_maps import LinearMap
from toyfeat.linalg.randomized.svd import randomized_svd

__all__ = [
    "LinearMap",
    "randomized_svd",
]
