"""Match found mechanisms to planted ones: directions and planes to their like.

A *mechanism* is the span of the rows that share a group: a direction, a plane (a gated
unit, a circle) or a subspace.  What is inside of it has no rows of its own, so a plane
is found by a plane only.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from toyfeat.checks import as_host_floats, as_integers, check_int, check_key
from toyfeat.metrics.assignment import Subspace, best_pairs, group_subspaces, unit_rows
from toyfeat.metrics.matching import PRECISE_COSINE
from toyfeat.types import Array, ArrayLike

_KINDS = {1: "direction", 2: "plane"}


class MechanismMatch(NamedTuple):
    r"""A one-to-one assignment of found mechanisms to true ones.

    The similarity of two mechanisms of the *same* dimension is their smallest principal
    cosine, the cosine of the largest angle between the subspaces; of directions it is
    :math:`|\cos|`.  It is 0 if the dimensions differ.

    Attributes:
      index: ``[G]`` int, the found mechanism of each true one, -1 if none; both are
        numbered in the order of their first rows.
      similarity: ``[G]``, its similarity, 0 if none.
      coverage: mean similarity over all ``G`` true mechanisms.
      found: share of the true mechanisms whose similarity reaches
        ``toyfeat.metrics.matching.PRECISE_COSINE``.
      precision: share of the found mechanisms whose best similarity with any true one
        reaches it.
      inside: share of the found mechanisms that are not precise but lie within a true
        one of more dimensions (their smallest principal cosine with it reaches it):
        directions of true planes.  They count in neither coverage nor precision.
      num_found: how many mechanisms were found.
    """

    index: np.ndarray
    similarity: np.ndarray
    coverage: float
    found: float
    precision: float
    inside: float
    num_found: int


def mechanism_kinds(readers: ArrayLike, group: ArrayLike | None = None) -> list[str]:
    """Name the mechanisms of rows: ``"direction"``, ``"plane"`` or ``"subspace"``.

    Args:
      readers: ``[R, D]``; rows of 0 count as nothing.
      group: ``[R]`` int, rows that share a value are one mechanism; ``None`` if every
        row stands alone.

    Returns:
      A name per mechanism, from the dimension of its span, in the order of first rows.

    Example:
      >>> import numpy as np
      >>> mechanism_kinds(np.eye(5)[[0, 1, 2]], np.array([7, 3, 7]))
      ['plane', 'direction']
    """
    spaces = _mechanisms("mechanism_kinds", readers, group)
    return [_KINDS.get(len(space.basis), "subspace") for space in spaces]


def match_mechanisms(
    readers: ArrayLike,
    truth: ArrayLike,
    *,
    group: ArrayLike | None = None,
    truth_group: ArrayLike | None = None,
) -> MechanismMatch:
    r"""Match found mechanisms to true ones, one to one, by smallest principal cosines.

    The assignment maximises the summed similarity (Hungarian method).  With directions
    alone on both sides coverage and precision are those of
    :func:`toyfeat.metrics.match_features`.  That function credits a plane for any rows
    that span it; this one wants them returned as one mechanism.

    Args:
      readers: ``[R, D]``, found rows; rows of 0 are left out.
      truth: ``[F, D]``, true rows; without any all scores are 0.
      group: ``[R]`` int, found rows that share a value are one mechanism; ``None`` if
        every row stands alone.
      truth_group: ``[F]`` int, likewise.

    Returns:
      A :class:`MechanismMatch`.

    Raises:
      ValueError: if shapes do not fit, or an entry is not finite.

    Example:
      >>> import numpy as np
      >>> plane = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
      >>> truth, pair = np.eye(3)[:2], np.array([0, 0])
      >>> match = match_mechanisms(plane, truth, group=pair, truth_group=pair)
      >>> round(match.coverage, 6), match.precision
      (1.0, 1.0)
      >>> alone = match_mechanisms(plane, truth, truth_group=pair)
      >>> alone.coverage, alone.precision, alone.inside
      (0.0, 0.0, 1.0)

    References:
      Björck and Golub (1973), for principal angles; Kuhn (1955), for the assignment.
    """
    found = _mechanisms("match_mechanisms", readers, group)
    true = _mechanisms("match_mechanisms", truth, truth_group)
    if found and true and found[0].basis.shape[1] != true[0].basis.shape[1]:
        raise ValueError(
            "match_mechanisms: readers and truth must have one width, got "
            f"{found[0].basis.shape[1]} and {true[0].basis.shape[1]}; give one row per "
            "direction"
        )
    # Similarities of equal dimensions, and what lies within more dimensions.
    scores = np.zeros((len(found), len(true)))
    within = np.zeros((len(found), len(true)))
    for rows, cosines in _blocks(found, true):
        same = len(found[rows[0][0]].basis) == len(true[rows[1][0]].basis)
        (scores if same else within)[np.ix_(*rows)] = cosines

    # One to one; a pair of orthogonal subspaces is none.
    index = np.full(len(true), -1)
    first, second = best_pairs(scores)
    useful = scores[first, second] > 0
    index[second[useful]] = first[useful]
    similarity = np.zeros(len(true))
    similarity[second[useful]] = scores[first[useful], second[useful]]
    precise = scores.max(axis=1, initial=0.0) >= PRECISE_COSINE
    inside = within.max(axis=1, initial=0.0) >= PRECISE_COSINE
    return MechanismMatch(
        index=index,
        similarity=similarity,
        coverage=_mean(similarity),
        found=_mean(similarity >= PRECISE_COSINE),
        precision=_mean(precise),
        inside=_mean(inside & ~precise),
        num_found=len(found),
    )


def random_mechanism_coverage(
    key: Array,
    num: int,
    truth: ArrayLike,
    *,
    group: ArrayLike | None = None,
    truth_group: ArrayLike | None = None,
    draws: int = 8,
) -> float:
    """Compute the coverage that random mechanisms of the same sizes reach.

    Args:
      key: random key.
      num: how many rows ``R``.
      truth: ``[F, D]``.
      group: ``[R]`` int, as in :func:`match_mechanisms`.
      truth_group: ``[F]`` int, likewise.
      draws: how many sets to average over.

    Returns:
      Mean coverage of ``draws`` sets of ``num`` uniform rows.

    Raises:
      ValueError: if ``num`` or ``draws`` is not positive.
    """
    check_key("random_mechanism_coverage", key)
    num = check_int("random_mechanism_coverage", "num", num)
    draws = check_int("random_mechanism_coverage", "draws", draws)
    sets = np.asarray(jax.random.normal(key, (draws, num, np.shape(truth)[1])))
    pairs = {"group": group, "truth_group": truth_group}
    return _mean(
        np.array([match_mechanisms(rows, truth, **pairs).coverage for rows in sets])
    )


def _mechanisms(name: str, rows: ArrayLike, group: ArrayLike | None) -> list[Subspace]:
    """Return a subspace per mechanism, in the order of first rows."""
    rows = as_host_floats(name, "rows", rows)
    if rows.ndim != 2 or not np.all(np.isfinite(rows)):
        raise ValueError(
            f"{name}: wanted finite rows [R, D], got shape {rows.shape} and "
            f"{int(np.sum(~np.isfinite(rows)))} entries that are not finite; leave "
            "such rows out"
        )
    groups = np.arange(len(rows))
    if group is not None:
        groups = np.asarray(as_integers(name, "group", group))
    if groups.shape != (len(rows),):
        raise ValueError(
            f"{name}: group needs one entry per row {(len(rows),)}, got shape "
            f"{groups.shape}; equal numbers mean one mechanism"
        )
    nonzero = np.linalg.norm(rows, axis=1) > 0
    spaces = group_subspaces(unit_rows(rows[nonzero]), groups[nonzero])
    return sorted(spaces, key=lambda space: int(space.members[0]))


def _blocks(
    found: list[Subspace], true: list[Subspace]
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Yield pairs of dimensions: their places, and smallest principal cosines.

    Only where the found mechanisms have no more dimensions than the true ones.
    """
    sizes = [np.array([len(space.basis) for space in side]) for side in (found, true)]
    for small in np.unique(sizes[0]):
        for large in np.unique(sizes[1][sizes[1] >= small]):
            rows = np.flatnonzero(sizes[0] == small), np.flatnonzero(sizes[1] == large)
            a = np.stack([found[i].basis for i in rows[0]])
            b = np.stack([true[j].basis for j in rows[1]])
            overlap = np.einsum("isd,jld->ijsl", a, b, optimize=True)
            # Of a direction the one singular value is a norm, of thousands in one go.
            cosines = (
                np.linalg.norm(overlap[:, :, 0], axis=-1)
                if small == 1
                else np.linalg.svd(overlap, compute_uv=False)[..., -1]
            )
            yield rows, np.clip(cosines, 0, 1)


def _mean(values: np.ndarray) -> float:
    """Return the mean; 0 where there are no values."""
    return float(np.mean(values)) if len(values) else 0.0
