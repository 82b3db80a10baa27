"""Directions that several dictionaries share, refined on the gradients themselves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toyfeat.discover.refinement import refine_directions
from toyfeat.discover.tables import GradientTables
from toyfeat.types import ArrayLike

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

# The same share where directions do not explain the gradients and cannot be pruned.
_UNEXPLAINED_SHARE = 1 / 2

# Share of all dictionaries that a direction needs, as a divisor.  In a random network
# nothing is in more than a ninth of 36; readers that only one readout and half of the
# numbers of codes see are in a fourth (docs/research.md, section 14).
_SHARE_DIVISOR = 6

# Products of rows that are held at once when near ones are looked for.  Memory only.
_MAX_PRODUCTS = 2**25

# Share of a direction's length in the span of the circles from which it is a mixture of
# circles.  docs/research.md, section 4, "Mixtures of circles recur".
_MIXTURE_LENGTH = 0.99

# Smallest singular value that counts in the rank of unit rows, times the root of how
# many there are.  A hundredth: trained rows of a plane leave it by noise.  Not swept.
_RANK_TOLERANCE = 1e-2


class Agreement(NamedTuple):
    """Directions that dictionaries share, after :func:`agree_and_refine`.

    Attributes:
      rows: ``[K, D]`` unit rows in the coordinates of the site; two rows for every
        circle come last.
      supports: ``[K]`` int, in how many dictionaries each is, the largest first; 0 for
        circles.
      explain: whether the gradients of a readout are sparse in the directions.
      clear: whether fewer codes explain them than still count as few.
    """

    rows: np.ndarray
    supports: np.ndarray
    explain: bool
    clear: bool


def agree_and_refine(
    dictionaries: Sequence[ArrayLike],
    tables: GradientTables,
    *,
    of_norm: ArrayLike | None = None,
    support: int | None = None,
    cosine: float = SAME_COSINE,
) -> Agreement:
    """Take the directions that dictionaries share, refine them, and add the circles.

    Both readouts have an equal say in what is shared.  But dictionaries with too few
    codes pull on every direction, so a shared direction is near a reader and no more;
    and sums of features that come together are shared, too.  So directions are refined
    on the gradients of the readout that is sparse in them, by
    :func:`toyfeat.discover.refinement.refine_directions`, random directions first; it
    leaves out the directions that its rows can do without, unless their support is
    close to the largest one, and those of small support where the others explain that
    readout as well.  Where no readout is sparse in them, only what dictionaries of both
    readouts share is kept, with half of the largest support: each readout alone has
    directions that recur and are no readers, such as what the active readers of one
    example add up to.

    Args:
      dictionaries: unit rows ``[M_i, R]`` each, in white coordinates.
      tables: gradients of both readouts, with their circles.
      of_norm: ``[num]`` bool, which dictionaries are of the squared norm; ``None``
        keeps what only one readout has.
      support: as in :func:`shared_directions`.
      cosine: ``|cos|`` from which directions are the same; a direction that would move
        further stays where it is.

    Returns:
      :class:`Agreement`.

    References:
      ``docs/research.md``, sections 10, 11 and 14.
    """
    # Directions that the dictionaries share.
    shared, supports = shared_directions(dictionaries, support=support, cosine=cosine)

    # Refine them on the readout that is sparse in them, where the dictionaries of that
    # readout say how sure each direction is.
    own = None
    if of_norm is not None:
        own = _count_supports(shared, dictionaries, of_norm, cosine)
    refined = refine_directions(
        shared,
        [tables.direction_grads, tables.norm_grads],
        cosine=cosine,
        supports=[supports, supports] if own is None else list(own),
    )

    # Mixtures of circles are shared as well; the circles themselves take their place.
    separate = _outside_planes(refined.directions, tables.planes)
    # Where nothing is explained, what recurs in one readout alone may be anything.
    if own is not None and not refined.explain:
        least = max(_MIN_SUPPORT, len(dictionaries) // 2 // _SHARE_DIVISOR)
        separate &= own.min(0, initial=len(dictionaries)) >= least
        separate &= supports >= _UNEXPLAINED_SHARE * supports.max(initial=0)
    rows = np.concatenate([refined.directions[separate], tables.planes])
    no_support = np.zeros(len(tables.planes), int)
    return Agreement(
        rows=tables.coordinates.directions(rows),
        supports=np.concatenate([supports[refined.kept][separate], no_support]),
        explain=refined.explain,
        clear=refined.clear,
    )


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
      support: dictionaries in which a direction has to be; ``None`` for a third of the
        largest support, and a sixth of the dictionaries at least.
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

    # Near rows of every row, and how many of them lie in each dictionary.
    near = _near_rows(rows, cosine)
    neighbours = np.zeros((len(rows), num), int)
    for i, others in enumerate(near):
        np.add.at(neighbours[i], source[others], 1)
    row_support = (neighbours > 0).sum(1)

    directions, supports = [], []
    free = np.ones(len(rows), bool)
    while free.any():
        # The row with neighbours in most dictionaries.
        best = int(row_support.argmax())
        if support is None:  # supports only fall, so the first one is the largest
            least = max(_MIN_SUPPORT, num // _SHARE_DIVISOR)
            support = max(least, int(row_support[best]) // _SUPPORT_DIVISOR)
        if row_support[best] < support:
            break
        # The leading direction of its neighbours, with its own sign.
        cluster = near[best][free[near[best]]]
        _, _, vt = np.linalg.svd(rows[cluster], full_matrices=False)
        directions.append(vt[0] * np.sign(vt[0] @ rows[best]))
        supports.append(int(row_support[best]))
        # Take the cluster away from the counts of all rows near it.
        for i in cluster:
            neighbours[near[i], source[i]] -= 1
        free[cluster] = False
        changed = np.unique(np.concatenate([near[i] for i in cluster]))
        row_support[changed] = (neighbours[changed] > 0).sum(1) * free[changed]
    empty = np.zeros((0, rows.shape[1]))
    return np.stack(directions) if directions else empty, np.array(supports, int)


def _count_supports(
    directions: np.ndarray,
    dictionaries: Sequence[ArrayLike],
    of_norm: ArrayLike,
    cosine: float,
) -> np.ndarray:
    """Count the dictionaries of random directions and of the norm that have unit rows.

    Returns:
      ``[2, R]`` int.
    """
    counts = np.zeros((2, len(directions)), int)
    for atoms, norm in zip(dictionaries, np.asarray(of_norm), strict=True):
        near = np.abs(directions @ np.asarray(atoms).T) >= cosine
        counts[int(norm)] += near.any(1)
    return counts


def _near_rows(rows: np.ndarray, cosine: float) -> list[np.ndarray]:
    """Return for each unit row the indices of rows within a ``|cos|``, its own too."""
    single = rows.astype(np.float32)
    batch_size = max(1, _MAX_PRODUCTS // max(1, len(rows)))
    near = []
    for start in range(0, len(rows), batch_size):
        products = single[start : start + batch_size] @ single.T
        near += [np.flatnonzero(np.abs(row) >= cosine) for row in products]
    return near


def _outside_planes(directions: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Tell which unit rows do not lie in the span of the planes, ``[R]`` bool."""
    if not len(planes):
        return np.ones(len(directions), bool)
    inside = directions @ np.linalg.svd(planes, full_matrices=False)[2].T
    return np.linalg.norm(inside, axis=1) < _MIXTURE_LENGTH
