"""Matrices of known spectrum."""

import numpy as np
import scipy.fft


def with_spectrum(
    rows: int, dim: int, spectrum: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Make a float32 matrix with given singular values, in closed form.

    ``U diag(s) V^T`` with cosine transforms whose signs are scrambled for ``U``
    and ``V``: orthogonal exactly, and made in ``rows * dim * log`` time.

    Args:
      rows: ``n``.
      dim: ``d``.
      spectrum: ``[min(n, d)]`` singular values.
      seed: of the signs.

    Returns:
      ``[n, d]`` float32.

    Example:
      >>> a = with_spectrum(6, 4, np.array([4.0, 3.0, 2.0, 1.0]))
      >>> np.linalg.svd(a, compute_uv=False).round(4).tolist()
      [4.0, 3.0, 2.0, 1.0]
    """
    rng = np.random.default_rng(seed)
    small = min(rows, dim)
    core = np.zeros((rows, dim), np.float32)
    core[np.arange(small), np.arange(small)] = spectrum
    left = rng.choice([-1, 1], size=(rows, 1)).astype(np.float32)
    right = rng.choice([-1, 1], size=(1, dim)).astype(np.float32)
    tall = np.asarray(scipy.fft.dct(core, axis=0, norm="ortho")) * left
    return np.asarray(scipy.fft.dct(tall, axis=1, norm="ortho")) * right
