r"""Tell a subspace that one mechanism reads from the span of several readers."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from toyfeat.discover.block_coding import spectrum

# Ratio of least to largest coupling from which a block is whole.  Planes had .84 and
# more, in superposition too; readers that always come together, with sizes in U[.5,
# 1.5], had .76 and less in 280 examples.
_MIN_FLATNESS = 0.8

# Angle within which directions of a block are the same, and the share of the examples
# from which as many directions as it has dimensions are what it is made of.  Bilinear
# units of which one source is alone in half of the examples have .5.
_SAME_ANGLE = np.deg2rad(3)
_MAX_ON_LINES = 0.75

# Square of what an example has beside its leading direction, as a share, up to which
# it is on a line.
_LINE_SHARE = 1e-2

# Coupling, from chance at 0 to 1, below which a block is as good as linear: heads read
# queries and keys with .6 and more, units in superposition with .3, values with 0.
# Lines have to be as few then as where there are none, .07 on two.  Couplings near
# chance take more examples to compare, with 100 some readers had a ratio of .95; and
# mixtures of two linear blocks had .89, the blocks .90 to .98.
_MIN_COUPLING = 0.2
_MAX_ON_LINES_LINEAR = 0.15
_MIN_FLATNESS_LINEAR = 0.9
_MIN_USES_LINEAR = 300
_RANGE_DEVIATIONS = 4.0

# Angles of a quarter turn at which couplings are compared, sweeps over pairs of axes,
# starts at random axes where there are more than two, and examples whose directions are
# counted.  Not swept.
_NUM_ANGLES = 12
_SWEEPS = 2
_STARTS = 3
_MAX_SEEDS = 300


def is_whole(tables: Sequence[np.ndarray], pieces: np.ndarray | None = None) -> bool:
    r"""Tell whether the parts of examples in a subspace are those of one mechanism.

    - *No direction recurs:* few of the examples lie on as few directions as the
      subspace has dimensions.
    - *Coefficients are coupled:* over the readouts of an example, the coefficients
      :math:`x` and :math:`y` of two axes are as parallel, in the mean of
      :math:`(x \cdot y)^2`, for the axes that make them least so as for those that make
      them most so.  In a gated unit they always are parallel.  Those of two readers
      are so only by chance, and more so along sums of both.

    Args:
      tables: ``[n, K, m]`` each, coefficients of examples that use the subspace.
      pieces: ``[p, m]``, rows of what it may be a union of, piece after piece; axes
        are searched from them too, as random ones seldom lead to those of two planes.

    Returns:
      Whether no table separates it, and one with ``K >= 2`` could have.

    Example:
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)
      >>> one, two = rng.normal(size=(2, 500, 4, 1))
      >>> is_whole([one * rng.normal(size=(500, 1, 2))])
      True
      >>> sizes = rng.uniform(0.5, 1.5, size=(500, 1, 2))
      >>> is_whole([np.concatenate([one, two], axis=2) * sizes])
      False

    References:
      Cardoso (1998), "Multidimensional independent component analysis".
    """
    is_coupled = is_linear = False
    on_lines = []
    for parts in tables:
        num, num_readouts, _ = parts.shape
        # Coordinates of unit second moment, where axes without coupling are orthogonal.
        values, vectors = spectrum(parts)
        whiten = vectors.T / np.sqrt(values.clip(np.finfo(float).tiny))
        parts = parts @ whiten
        on_lines.append(_share_on_lines(parts))
        if num_readouts < 2:
            continue
        hints = np.zeros((0, len(values))) if pieces is None else pieces @ whiten
        least, flatness = _coupling_of_axes(parts, hints)
        chance = 1 / num_readouts
        if (least - chance) / (1 - chance) < _MIN_COUPLING:
            is_linear = True
            if num < _MIN_USES_LINEAR or flatness < _least_by_chance(num, num_readouts):
                return False
        if flatness < _MIN_FLATNESS:
            return False
        is_coupled = True
    most = _MAX_ON_LINES_LINEAR if is_linear else _MAX_ON_LINES
    return is_coupled and max(on_lines) < most


def _least_by_chance(num: int, num_readouts: int) -> float:
    """Ratio of couplings that those of a linear block have in ``num`` examples.

    The squared cosine of two random directions in ``K`` dimensions has mean ``1 / K``
    and variance ``2 (K - 1) / (K^2 (K + 2))``.
    """
    relative = np.sqrt(2 * (num_readouts - 1) / (num_readouts + 2) / num)
    return min(_MIN_FLATNESS_LINEAR, 1 - _RANGE_DEVIATIONS * relative)


def _share_on_lines(parts: np.ndarray) -> float:
    """Share of the examples ``[n, K, m]`` on the ``m`` directions that most are on."""
    _, sizes, rows = np.linalg.svd(parts, full_matrices=False)
    beside = np.sum(sizes[:, 1:] ** 2, axis=1)
    lines = rows[beside <= _LINE_SHARE * np.sum(sizes**2, axis=1), 0]
    seeds = lines[:: max(1, len(lines) // _MAX_SEEDS)]
    near = np.abs(seeds @ lines.T) >= np.cos(_SAME_ANGLE)
    count = 0
    for _ in range(parts.shape[2]):
        if not near.any():
            break
        # The direction that most of the others are on.
        best = near[near.sum(1).argmax()].copy()
        count += int(best.sum())
        near &= ~best
    return count / len(parts)


def _coupling_of_axes(parts: np.ndarray, hints: np.ndarray) -> tuple[float, float]:
    """Search the axes whose coefficients are coupled least.

    Args:
      parts: ``[n, K, m]``, of unit second moment.
      hints: ``[p, m]``, rows to begin at; random ones if they do not span.

    Returns:
      The least coupling of two axes, and its ratio to the largest one.
    """
    # All examples count alike: with their size, few large ones decided.
    parts = parts / np.linalg.norm(parts, axis=(1, 2), keepdims=True)
    angles = np.arange(_NUM_ANGLES) * (np.pi / 2 / _NUM_ANGLES)
    rng = np.random.default_rng(0)
    all_couplings = []
    num_axes = parts.shape[2]
    for start in range(_STARTS if num_axes > 2 else 1):
        rows = rng.normal(size=(num_axes, num_axes))
        if start == 0:
            rows = np.concatenate([hints, rows])
        turned = parts @ np.linalg.qr(rows.T)[0]
        # Turn pairs of axes to where they are coupled least.
        for pair in list(combinations(range(num_axes), 2)) * _SWEEPS:
            couplings = _couplings(turned[..., pair[0]], turned[..., pair[1]], angles)
            best = angles[np.argmin(couplings)]
            turn = [[np.cos(best), -np.sin(best)], [np.sin(best), np.cos(best)]]
            turned[..., pair] = turned[..., pair] @ np.array(turn)
            all_couplings += couplings.tolist()
    return min(all_couplings), min(all_couplings) / max(all_couplings)


def _couplings(x: np.ndarray, y: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return how parallel coefficients ``[n, K]`` are after turns by angles ``[A]``.

    It is the mean squared cosine over the readouts, weighted by the squares of both.
    """
    # Turned products are sums of the three products of each example.
    xx, yy, xy = (np.sum(a * b, axis=1) for a, b in [(x, x), (y, y), (x, y)])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    cross = cos * sin * (yy - xx) + (cos**2 - sin**2) * xy
    first = cos**2 * xx + sin**2 * yy + 2 * cos * sin * xy
    second = sin**2 * xx + cos**2 * yy - 2 * cos * sin * xy
    weight = np.sum(first * second, axis=1)
    return np.sum(cross**2, axis=1) / np.where(weight > 0, weight, 1)
