"""Gradients of a model as the rows of a table, and the span of such rows."""

import jax.numpy as jnp
import numpy as np

from toyfeat.decompose import covariance
from toyfeat.moments import moments
from toyfeat.tap import tap
from toyfeat.tap.readouts import Readout
from toyfeat.types import Array, Inputs, Subject, Taps

# Memory only: examples per call of the model, and rows per product.
_BATCH_SIZE = 5000

# Shortest gradient that counts, as a share of the root mean square length.  Shorter
# ones are float32 rounding of a gradient that is 0.
_MIN_LENGTH = 1e-6

# Smallest eigenvalue of the rows' second moment that counts as spanned, as a share of
# the largest: a standard deviation of a thousandth, well above float32 rounding.
_MIN_EIGENVALUE = 1e-6


def tap_subject(subject: Subject, inputs: Inputs, readout: Readout) -> Taps:
    """Tap activations and gradients at the site of a subject.

    Args:
      subject: the model and the site.
      inputs: pytree with leading axis ``B``.
      readout: which gradients.

    Returns:
      Taps of the subject's site.
    """
    taps = tap(
        subject.probed,
        subject.params,
        inputs,
        sites=subject.site,
        readout=readout,
        batch_size=_BATCH_SIZE,
    )
    return taps[subject.site]


def gradient_rows(taps: Taps) -> Array:
    """Stack the nonzero gradients of all readouts, in units of their size.

    Args:
      taps: with gradients ``[N, K, D]``.

    Returns:
      ``[n, D]`` with ``n <= N K``; the root mean square of the entries is 1.

    Raises:
      ValueError: if there are no gradients, all are 0, or one is not finite.
    """
    if taps.grads is None:
        raise ValueError("consensus: wanted taps with gradients, got taps without")
    rows = np.asarray(taps.grads).reshape(-1, taps.grads.shape[-1])
    largest = np.abs(rows).max(initial=0.0)
    if not (np.isfinite(largest) and largest > 0):
        raise ValueError(
            "consensus: gradients must be finite and not all 0, the largest is "
            f"{largest}"
        )
    # Divide by the largest entry first: squares of tiny or huge ones have no float32.
    rows = rows / largest
    lengths = np.linalg.norm(rows, axis=1)
    rms_length = np.sqrt(np.mean(lengths**2))
    rows = rows[lengths > _MIN_LENGTH * rms_length]
    return jnp.asarray(rows / np.sqrt(np.mean(rows**2)))


def row_span(rows: Array) -> np.ndarray:
    """Return an orthonormal basis of the row space, up to rounding.

    Args:
      rows: ``[N, D]``.

    Returns:
      ``[R, D]`` float64, orthonormal rows.
    """
    blocks = (
        np.asarray(rows[i : i + _BATCH_SIZE]) for i in range(0, len(rows), _BATCH_SIZE)
    )
    second_moment = sum(block.T.astype(np.float64) @ block for block in blocks)
    values, vectors = np.linalg.eigh(second_moment)
    return vectors.T[values > _MIN_EIGENVALUE * values[-1]]


def acts_covariance(taps: Taps) -> Array:
    """Return the covariance ``[D, D]`` of the activations."""
    stats = moments(taps.acts.shape[1])
    return covariance(stats.finish(stats.update(stats.init(), taps)))
