"""Randomized and streaming SVD, and eigendecomposition of PSD matrices."""

from toyfeat.linalg.psd import (
    Spectrum,
    column_signs,
    fix_signs,
    psd_inverse,
    psd_spectrum,
)
from toyfeat.linalg.randomized.linear_maps import LinearMap
from toyfeat.linalg.randomized.svd import randomized_svd
from toyfeat.linalg.streams import stream_svd
from toyfeat.linalg.svd import SVD, SVDInfo

__all__ = [
    "SVD",
    "LinearMap",
    "SVDInfo",
    "Spectrum",
    "column_signs",
    "fix_signs",
    "psd_inverse",
    "psd_spectrum",
    "randomized_svd",
    "stream_svd",
]
