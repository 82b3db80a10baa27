"""Gradients of a model as the rows of a table, their span and white coordinates."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.decompose import covariance
from toyfeat.moments import moments
from toyfeat.tap import tap
from toyfeat.tap.readouts import Readout
from toyfeat.types import Array, ArrayLike, Inputs, Subject, Taps

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
    return unit_mean_square(rows)


def unit_mean_square(rows: ArrayLike) -> Array:
    """Scale rows so that the mean square of their entries is 1."""
    rows = np.asarray(rows)
    return jnp.asarray(rows / np.sqrt(np.mean(rows**2)), float)


class WhiteCoordinates(NamedTuple):
    r"""Linear maps of rows to coordinates of unit second moment, and back.

    Rows :math:`g` of any other coordinates, :math:`g M` with an invertible :math:`M`,
    have the same white coordinates up to a rotation.  So whatever is done with white
    rows, and does not depend on a rotation, does not depend on :math:`M`.

    Attributes:
      whiten: ``[D, R]``; ``rows @ whiten`` have the second moment ``I``.
      unwhiten: ``[R, D]``; ``rows @ whiten @ unwhiten`` are the rows again.
    """

    whiten: np.ndarray
    unwhiten: np.ndarray

    def directions(self, white_rows: np.ndarray) -> np.ndarray:
        """Map rows ``[N, R]`` back, to unit length ``[N, D]``; zeros stay zeros."""
        rows = white_rows @ self.unwhiten
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
        return rows / np.where(lengths > 0, lengths, 1)


def white_coordinates(rows: ArrayLike, *, min_eigenvalue: float) -> WhiteCoordinates:
    """Find coordinates in which rows have unit second moment.

    Args:
      rows: ``[N, D]``, not centred.
      min_eigenvalue: of the second moment, as a share of the largest; directions with
        less are rounding and are left out.

    Returns:
      Maps to ``R <= D`` coordinates and back, in float64.

    Example:
      >>> import numpy as np
      >>> maps = white_coordinates([[4.0, 0, 0], [0, 2.0, 0]], min_eigenvalue=1e-6)
      >>> np.abs(maps.whiten).round(3)
      array([[0.   , 0.354],
             [0.707, 0.   ],
             [0.   , 0.   ]])
    """
    second_moment = _second_moment(rows) / max(1, len(np.asarray(rows)))
    values, vectors = np.linalg.eigh(second_moment)
    floor = min_eigenvalue * values.max(initial=np.finfo(np.float64).tiny)
    spanned = values > floor
    std, vectors = np.sqrt(values[spanned]), vectors[:, spanned]
    return WhiteCoordinates(whiten=vectors / std, unwhiten=(vectors * std).T)


def row_span(rows: ArrayLike) -> np.ndarray:
    """Return an orthonormal basis of the row space, up to rounding.

    Args:
      rows: ``[N, D]``.

    Returns:
      ``[R, D]`` float64, orthonormal rows.
    """
    values, vectors = np.linalg.eigh(_second_moment(rows))
    return vectors.T[values > _MIN_EIGENVALUE * values[-1]]


def acts_covariance(taps: Taps) -> Array:
    """Return the covariance ``[D, D]`` of the activations."""
    stats = moments(taps.acts.shape[1])
    return covariance(stats.finish(stats.update(stats.init(), taps)))


def _second_moment(rows: ArrayLike) -> np.ndarray:
    """Sum the outer products of rows ``[N, D]`` in float64, block by block."""
    rows = np.asarray(rows)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(rows), _BATCH_SIZE):
        block = rows[start : start + _BATCH_SIZE].astype(np.float64)
        total += block.T @ block
    return total
