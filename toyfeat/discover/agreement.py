"""Directions that several dictionaries share, refined on the gradients themselves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toyfeat.discover.gradients import WhiteCoordinates
from toyfeat.discover.refinement import refine_directions
from toyfeat.types import Array, ArrayLike, Taps

# |cos| from which two directions are the same.  docs/research.md, section 3.
SAME_COSINE = 0.95

# The same between directions of a plane, where one in eight lies within this of any
# other.  At SAME_COSINE it would be one in five, and a direction between two readers
# would take both away (the pentagon in section 6 of docs/research.md).
_PLANE_SAME_COSINE = np.cos(np.pi / 16)

# Share of the largest support that a direction needs, as a divisor, and the least
# support in any case.  docs/research.md, section 8.
_SUPPORT_DIVISOR = 3
_MIN_SUPPORT = 2

# Share of the largest support above which directions may do without the others.
# docs/research.md, section 13.
_CORE_SUPPORT = 0.5

# Share of the largest support from which elimination may not remove a direction.
# docs/research.md, section 11, "A code to spare is dangerous".
_CERTAIN_SUPPORT = 0.6

# Gradients of each readout that directions are refined on.  docs/research.md,
# section 10, where it is also what this costs readers that are very rare.
_REFINE_ROWS = 6000

# Share of a direction's length in the span of the circles from which it is a mixture of
# circles.  docs/research.md, section 4, "Mixtures of circles recur".
_MIXTURE_LENGTH = 0.99

# Smallest singular value that counts in the rank of unit rows, times the root of how
# many there are.  A hundredth: trained rows of a plane leave it by noise.  Not swept.
_RANK_TOLERANCE = 1e-2


class GradientDictionaries(NamedTuple):
    """Gradients of two readouts, and the dictionaries and circles found in them.

    All rows are in the ``R`` white coordinates of the gradients along random directions
    of the output; their entries have a root mean square of 1.

    Attributes:
      dictionaries: for each setting the dictionaries of both readouts, each the unit
        rows ``[M_i, R]`` of its decoder.
      norm_grads: ``[N, R]``, gradients of half the squared norm of the output.
      direction_grads: ``[N', R]``, those along random directions of the output.
      planes: ``[2 P, R]``, circular planes of ``norm_grads``.
      coordinates: maps from the site to the white coordinates, and back.
      taps: activations, and gradients of half the squared norm of the output.
    """

    dictionaries: list[list[np.ndarray]]
    norm_grads: Array
    direction_grads: Array
    planes: np.ndarray
    coordinates: WhiteCoordinates
    taps: Taps


def agree_and_refine(
    dictionaries: Sequence[ArrayLike],
    gradients: GradientDictionaries,
    *,
    support: int | None = None,
    cosine: float = SAME_COSINE,
) -> tuple[np.ndarray, np.ndarray]:
    """Take the directions that dictionaries share, refine them, and add the circles.

    Both readouts have an equal say in what is shared.  But dictionaries with too few
    codes pull on every direction, so a shared direction is near a reader and no more;
    and sums of features that come together are shared, too.  So directions are refined
    on the gradients of the readout that is sparse in them, by
    :func:`toyfeat.discover.refinement.refine_directions`, random directions first; it
    leaves out the directions that its rows can do without, unless their support is
    close to the largest one.  Directions of no more than half the largest support are
    used only where the others do not explain that readout as well.

    Args:
      dictionaries: unit rows, one of ``gradients.dictionaries``.
      gradients: of both readouts, with their circles.
      support: as in :func:`shared_directions`.
      cosine: ``|cos|`` from which directions are the same; a direction that would move
        further stays where it is.

    Returns:
      Unit rows ``[K, D]`` in the coordinates of the site, and in how many dictionaries
      each is; the largest support first.  Two rows for every circle come last, with
      support 0.

    References:
      ``docs/research.md``, sections 10, 11 and 13.
    """
    # Directions that the dictionaries share.
    shared, supports = shared_directions(dictionaries, support=support, cosine=cosine)
    largest = supports.max(initial=0)

    # Refine them on the readout that is sparse in them, those of large support alone if
    # it needs no others, which may be sums of them.
    tables = [
        _spread_rows(grads)
        for grads in (gradients.direction_grads, gradients.norm_grads)
    ]
    directions, kept = refine_directions(
        shared,
        tables,
        cosine=cosine,
        certain=supports >= _CERTAIN_SUPPORT * largest,
        core=supports > _CORE_SUPPORT * largest if support is None else None,
    )

    # Mixtures of circles are shared as well; the circles themselves take their place.
    separate = _outside_planes(directions, gradients.planes)
    rows = np.concatenate([directions[separate], gradients.planes])
    no_support = np.zeros(len(gradients.planes), int)
    rows = gradients.coordinates.directions(rows)
    return rows, np.concatenate([supports[kept][separate], no_support])


def shared_directions(
    dictionaries: Sequence[ArrayLike],
    *,
    support: int | None = None,
    cosine: float = SAME_COSINE,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Cluster unit rows of several dictionaries into the directions that they share.

    The row whose neighbours (:math:`|\cos|` of at least ``cosine``) lie in most
    dictionaries is replaced by the leading direction of them all, and they are taken
    away; and so on.  Rows that span a plane, where every direction has near neighbours,
    need a larger cosine.

    Args:
      dictionaries: unit rows ``[M_i, D]`` each.
      support: dictionaries in which a direction has to be; ``None`` for a share of the
        largest support, as in :func:`toyfeat.discover.consensus`.
      cosine: ``|cos|`` from which two directions are the same.

    Returns:
      Unit rows ``[R, D]``, and in how many dictionaries each is, the largest first.

    Example:
      >>> import numpy as np
      >>> dictionaries = [np.eye(3)[:2], np.eye(3)[1:]]
      >>> np.abs(shared_directions(dictionaries, support=2, cosine=0.9)[0]).round(3)
      array([[0., 1., 0.]])

    References:
      ``docs/research.md``, sections 3, 6 (planes) and 8 (support).
    """
    num = len(dictionaries)
    rows = np.concatenate([np.asarray(atoms, np.float64) for atoms in dictionaries])
    source = np.repeat(np.arange(num), [len(atoms) for atoms in dictionaries])
    if np.linalg.matrix_rank(rows, tol=_RANK_TOLERANCE * len(rows) ** 0.5) == 2:
        cosine = max(cosine, _PLANE_SAME_COSINE)

    # How many neighbours each row has in every dictionary.
    near = np.abs(rows @ rows.T) >= cosine
    membership = source[:, None] == np.arange(num)[None, :]
    neighbours = near.astype(np.float32) @ membership

    directions, supports = [], []
    free = np.ones(len(rows), bool)
    while free.any():
        # The row with neighbours in most dictionaries.
        row_support = np.where(free, (neighbours > 0.5).sum(1), 0)
        best = int(row_support.argmax())
        if support is None:  # supports only fall, so the first one is the largest
            support = max(_MIN_SUPPORT, int(row_support[best]) // _SUPPORT_DIVISOR)
        if row_support[best] < support:
            break
        # The leading direction of its neighbours, with its own sign.
        cluster = free & near[best]
        _, _, vt = np.linalg.svd(rows[cluster], full_matrices=False)
        directions.append(vt[0] * np.sign(vt[0] @ rows[best]))
        supports.append(int(row_support[best]))
        # Take the cluster away from all counts.
        neighbours -= near[:, cluster].astype(np.float32) @ membership[cluster]
        free &= ~cluster
    empty = np.zeros((0, rows.shape[1]))
    return np.stack(directions) if directions else empty, np.array(supports, int)


def _spread_rows(rows: Array) -> np.ndarray:
    """Take evenly spaced rows, enough to refine directions on."""
    index = np.linspace(0, len(rows) - 1, min(len(rows), _REFINE_ROWS)).astype(int)
    return np.asarray(rows)[index].astype(np.float64)


def _outside_planes(directions: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Tell which unit rows do not lie in the span of the planes, ``[R]`` bool."""
    if not len(planes):
        return np.ones(len(directions), bool)
    inside = directions @ np.linalg.svd(planes, full_matrices=False)[2].T
    return np.linalg.norm(inside, axis=1) < _MIXTURE_LENGTH
