r"""Match found directions to planted ones, one to one.

A direction is a *reader* (covector: the next layer takes the dot product with
it) or a *writer* (vector: the previous layer adds it).  They differ unless the
activations are white; say which one a score is about.
"""

from typing import NamedTuple

import jax
import numpy as np

from toyfeat.checks import as_host_floats, as_integers, check_int, check_key
from toyfeat.metrics.assignment import (
    assign_rows,
    group_subspaces,
    nearest_cosines,
    unit_rows,
)
from toyfeat.types import Array, ArrayLike

# |cos| with a truth from which a found direction counts as precise.
PRECISE_COSINE = 0.9


class Match(NamedTuple):
    """A one-to-one assignment of found directions to true ones.

    Attributes:
      index: ``[F]`` int, the row of ``directions`` given to each truth, -1 if none.
      similarity: ``[F]``, its ``|cos|``, 0 if none.
      coverage: mean similarity over all ``F`` truths.
      mcc: mean similarity over the ``min(R, F)`` assigned pairs.
      precision: share of the directions whose best ``|cos|`` with any truth reaches
        ``toyfeat.metrics.matching.PRECISE_COSINE``.
      num_found: ``R``, the number of directions that are not zero.
    """

    index: np.ndarray
    similarity: np.ndarray
    coverage: float
    mcc: float
    precision: float
    num_found: int


def match_features(
    directions: ArrayLike, truth: ArrayLike, *, group: ArrayLike | None = None
) -> Match:
    r"""Match found directions to true ones, one to one, on :math:`|\cos|`.

    The assignment maximises the summed similarity (Hungarian method), so no
    found direction serves two truths, unlike in a mean of maxima.  Rows of
    ``truth`` that share a ``group`` are known only up to a rotation among
    themselves: they are matched as a subspace, and each gets the mean cosine of
    the principal angles between it and the span of the rows it was given.  With
    groups the best assignment is a hard problem; the one returned is a Hungarian
    start that no exchange of two rows improves.

    Args:
      directions: ``[R, D]``, one found direction per *row*: pass ``basis.readers.T``
        or ``basis.writers``.  Zero rows count as not found.
      truth: ``[F, D]``, one direction per row.
      group: ``[F]`` int, or ``None`` if every truth stands alone.

    Returns:
      A :class:`Match`; ``coverage`` is the figure to report, next to
      :func:`random_coverage` of as many random directions.

    Raises:
      ValueError: if shapes do not fit, an entry is not finite, there is no
        truth, or a truth is zero.

    Example:
      >>> import numpy as np
      >>> match = match_features(np.array([[0.0, -2.0]]), np.eye(2))
      >>> match.index.tolist(), match.coverage, match.mcc
      ([-1, 0], 0.5, 1.0)

    References:
      Kuhn (1955), for the assignment; MCC as in SAELens' synthetic evaluation,
      where the mean runs over the assigned pairs only.
    """
    directions, truth, groups = _check_match(directions, truth, group)
    nonzero = np.flatnonzero(np.linalg.norm(directions, axis=1) > 0)
    rows, truth = unit_rows(directions[nonzero]), unit_rows(truth)

    # Assign rows to truths; truths of a group share the cosines of its subspace.
    spaces = group_subspaces(truth, groups)
    assigned = assign_rows(rows, spaces, len(truth))
    similarity = np.zeros(len(truth))
    for space in spaces:
        total = space.summed_cosines(rows, assigned)
        similarity[space.members] = total / len(space.members)

    # Count by places in ``directions``, zero rows included.
    index = np.full(len(truth), -1)
    index[assigned >= 0] = nonzero[assigned[assigned >= 0]]
    best = nearest_cosines(rows, spaces)
    num_pairs = min(len(rows), len(truth))
    return Match(
        index=index,
        similarity=similarity,
        coverage=float(similarity.mean()),
        mcc=float(similarity.sum() / num_pairs) if num_pairs else 0.0,
        precision=float(np.mean(best >= PRECISE_COSINE)) if len(rows) else 0.0,
        num_found=len(rows),
    )


def random_coverage(
    key: Array,
    num: int,
    truth: ArrayLike,
    *,
    group: ArrayLike | None = None,
    draws: int = 8,
) -> float:
    """Compute the coverage that random directions reach: the floor of every score.

    Args:
      key: random key.
      num: how many directions ``R``, as many as the method under test returned.
      truth: ``[F, D]``.
      group: as in :func:`match_features`.
      draws: how many sets of directions to average over.

    Returns:
      Mean coverage of ``draws`` sets of ``num`` uniform directions.

    Raises:
      ValueError: if ``num`` or ``draws`` is not positive.

    Example:
      >>> import jax, numpy as np
      >>> 0.2 < random_coverage(jax.random.key(0), 10, np.eye(10)[:1]) < 0.8
      True
    """
    check_key("random_coverage", key)
    num = check_int("random_coverage", "num", num)
    draws = check_int("random_coverage", "draws", draws)
    width = as_host_floats("random_coverage", "truth", truth).shape[-1:]
    if not width:
        raise ValueError(
            "random_coverage: truth must be [F, D], got one number; give one direction "
            "per row"
        )
    # Normal vectors have uniform directions.
    sets = np.asarray(jax.random.normal(key, (draws, num, *width)))
    matches = [match_features(rows, truth, group=group) for rows in sets]
    return float(np.mean([match.coverage for match in matches]))


def _check_match(
    directions: ArrayLike, truth: ArrayLike, group: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float64 directions and truth, and a group for every truth."""
    directions = as_host_floats("match_features", "directions", directions)
    truth = as_host_floats("match_features", "truth", truth)
    wide = directions.ndim == truth.ndim == 2 and directions.shape[1] == truth.shape[1]
    if not wide:
        raise ValueError(
            "match_features: wanted directions [R, D] and truth [F, D], one direction "
            f"per row, got shapes {directions.shape} and {truth.shape}; the readers of "
            "a basis are columns, pass basis.readers.T"
        )
    for name, rows in (("directions", directions), ("truth", truth)):
        if not np.all(np.isfinite(rows)):
            raise ValueError(
                f"match_features: {name} has {int(np.sum(~np.isfinite(rows)))} entries "
                "that are not finite; leave such rows out"
            )
    if not len(truth) or np.any(np.linalg.norm(truth, axis=1) == 0):
        raise ValueError(
            "match_features: truth needs at least one row and no zero rows, got "
            f"{len(truth)} rows; leave out features without a direction"
        )
    # Every truth is a direction of its own, unless groups share a subspace.
    groups = np.arange(len(truth))
    if group is not None:
        groups = np.asarray(as_integers("match_features", "group", group))
    if groups.shape != (len(truth),):
        raise ValueError(
            f"match_features: group needs one entry per truth {(len(truth),)}, got "
            f"shape {groups.shape}; equal numbers mean one subspace"
        )
    return directions, truth, groups
