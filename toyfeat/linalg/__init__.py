"""Spectral kernels; they know nothing of features."""

from toyfeat.linalg.operators import Products
from toyfeat.linalg.randomized import randomized_svd
from toyfeat.linalg.spectral import (
    Spectrum,
    psd_inverse,
    psd_spectrum,
    signs_of,
    with_signs,
)
from toyfeat.linalg.streams import stream_svd

__all__ = [
    "Products",
    "Spectrum",
    "psd_inverse",
    "psd_spectrum",
    "randomized_svd",
    "signs_of",
    "stream_svd",
    "with_signs",
]
