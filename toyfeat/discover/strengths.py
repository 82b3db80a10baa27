"""Strengths of mechanisms: the share of the attribution that goes through each."""

import numpy as np

from toyfeat.discover.gradients import WhiteCoordinates
from toyfeat.discover.sparse_coding import matching_pursuit, pursuit_errors
from toyfeat.discover.sparse_fit import MAX_ERROR, spread_rows
from toyfeat.types import ArrayLike, Taps

# Examples that are coded; a mean of squares needs no more.
_MAX_EXAMPLES = 4000

# Most codes of a gradient.
_MAX_CODES = 32


def attribution_shares(
    taps: Taps, readers: ArrayLike, group: ArrayLike, coordinates: WhiteCoordinates
) -> np.ndarray:
    r"""Measure the share of the readout's attribution that each mechanism carries.

    With gradients :math:`g = \sum_j c_j r_j` as sparse sums of readers, the attribution
    of a mechanism is :math:`\sum_j c_j \, r_j \cdot (a - \bar a)` over its readers, in
    units of the readout.  Its strength is the root mean square over examples, as a
    share of the sum over mechanisms.  It does not depend on the coordinates of the
    site, nor on the lengths of readers.

    Args:
      taps: activations ``[N, D]`` and gradients ``[N, 1, D]`` of one readout.
      readers: ``[R, D]``.
      group: ``[R]`` int, readers of one mechanism share a value.
      coordinates: in which gradients are coded.

    Returns:
      ``[R]``, the strength of the mechanism of each reader; those of all mechanisms sum
      to 1, or are all 0 if nothing is attributed.

    Example:
      >>> import numpy as np
      >>> from toyfeat.discover.gradients import white_coordinates
      >>> from toyfeat.types import Taps
      >>> acts = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
      >>> taps = Taps(acts, np.sign(acts)[:, None], np.ones(4))
      >>> white = white_coordinates(taps.grads[:, 0], min_eigenvalue=1e-6)
      >>> attribution_shares(taps, np.eye(2), np.arange(2), white)
      array([0.25, 0.75])

    References:
      Kramár et al. (2024), "AtP*: An efficient and scalable method for localizing LLM
      behaviour to components", for gradient times activation.
    """
    readers = np.asarray(readers, np.float64)
    if not len(readers):
        return np.zeros(0)
    mean = np.asarray(taps.acts, np.float64).mean(0)
    moved = spread_rows(taps.acts, _MAX_EXAMPLES) - mean
    grads = np.asarray(taps.grads)[:, 0]
    rows = spread_rows(grads, _MAX_EXAMPLES) @ coordinates.whiten

    # Codes of unit directions in white coordinates, as few as explain the gradients.
    directions = readers @ coordinates.whiten
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    most = min(len(readers), max(1, rows.shape[1] // 2), _MAX_CODES)
    errors = pursuit_errors(rows, directions, most)
    k = int(np.argmax(errors <= MAX_ERROR)) + 1 if errors[-1] <= MAX_ERROR else most
    codes = matching_pursuit(rows, directions, k).matrix(len(readers)).toarray()

    # Attributions of readers, then of mechanisms.
    attribution = codes * (moved @ (directions @ coordinates.unwhiten).T)
    _, mechanism = np.unique(group, return_inverse=True)
    of_mechanism = np.eye(mechanism.max() + 1)[mechanism]
    size = np.sqrt(np.mean((attribution @ of_mechanism) ** 2, axis=0))
    total = size.sum()
    return (size / total if total > 0 else size)[mechanism]
