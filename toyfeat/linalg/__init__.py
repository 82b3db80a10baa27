"""Randomized and streaming SVD, and eigendecomposition of PSD matrices.

Range, in float32: entries of matrices and of rows may have any size from 1e-36 to 1e36,
tangents, cotangents and weights from 1e-30 to 1e30, and results are right relative to
the largest.  Where a result is a square (:func:`toyfeat.moments`, spectra of
:func:`toyfeat.pca`), that square has to fit: sizes of about 1e-15 to 1e16.  Beyond, an
error names the size; inside a trace the result is NaN.
"""

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
