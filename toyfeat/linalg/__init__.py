"""Spectral kernels; they know nothing of features."""

from toyfeat.linalg.spectral import Spectrum, psd_inverse, psd_spectrum, with_signs

__all__ = ["Spectrum", "psd_inverse", "psd_spectrum", "with_signs"]
