"""Tell directions in which rows pile up from sums of them, where dimensions are few."""

import numpy as np

from toyfeat.types import ArrayLike

# Degrees from a direction within which rows are counted, and again from there to twice
# as far.  Rows of trained bottlenecks are within half a degree of their readers.
_ANGLES = (1.0, 2.0, 4.0, 8.0)

# Fewest rows within twice the largest angle to say that a direction has no peak.
_MIN_ROWS = 30

# Rows within an angle, over those that a smooth density would have there, and standard
# deviations above them, from which there is a peak.  At sums of two readers of
# bottlenecks with two dimensions half of the rows within twice the angle are within it,
# as if smooth; at readers 19 of 20.
_MIN_RATIO = 1.33
_MIN_DEVIATIONS = 4.0

# In more dimensions too few rows are near a sum by chance to say that it has no peak.
_MAX_DIM = 4

# Rows shorter than this share of their root mean square have no direction.
_MIN_LENGTH = 1e-3


def with_peaks(rows: ArrayLike, directions: np.ndarray) -> np.ndarray:
    """Tell in which directions rows pile up.

    A reader that is active alone in some examples has rows along it.  Between two
    readers in a plane there are the rows of examples in which both are active, at all
    angles alike, and one code per row takes one more direction in the middle of them.
    Rows within an angle of a direction are counted against those between this angle and
    twice as much, which tell how many a smooth density would have.  In more than four
    dimensions so few rows are near a sum by chance that none is left out.

    Args:
      rows: ``[N, D]``.
      directions: ``[R, D]`` unit rows.

    Returns:
      ``[R]`` bool: all but those that have many rows near them and no peak; all, if
      those that are left do not span the space, as where no reader is ever alone.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> alone, both = np.repeat(np.eye(2), 200, axis=0), rng.random((400, 2))
      >>> directions = np.array([[1, 0], [0, 1], [0.7071, 0.7071]])
      >>> with_peaks(np.concatenate([alone, both]), directions)
      array([ True,  True, False])
    """
    rows = np.asarray(rows)
    dim = rows.shape[1]
    if not 1 < dim <= _MAX_DIM:
        return np.ones(len(directions), bool)
    lengths = np.linalg.norm(rows, axis=1)
    counted = lengths > _MIN_LENGTH * np.sqrt(np.mean(lengths**2))
    angles = _degrees(rows[counted] / lengths[counted, None], directions)
    between = _degrees(directions, directions)
    np.fill_diagonal(between, np.inf)
    room = between.min(0, initial=np.inf)  # another direction has a peak of its own

    peaked = np.sum(angles <= 2 * _ANGLES[-1], axis=0) < _MIN_ROWS
    # Volumes go with angle^(dim - 1): the share of a smooth density that is inside.
    share = 2.0 ** (1 - dim)
    for angle in _ANGLES:
        inside = np.sum(angles <= angle, axis=0)
        near = np.sum(angles <= 2 * angle, axis=0)
        deviation = np.sqrt(share * (1 - share) * np.maximum(near, 1))
        excess = inside - share * near > _MIN_DEVIATIONS * deviation
        peaked |= excess & (inside > _MIN_RATIO * share * near) & (angle < room)
    if np.linalg.matrix_rank(directions[peaked], tol=1e-2) < dim:
        return np.ones(len(directions), bool)
    return peaked


def _degrees(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return the angles between lines, ``[N, R]``, of unit rows."""
    return np.degrees(np.arccos(np.minimum(np.abs(rows @ directions.T), 1)))
