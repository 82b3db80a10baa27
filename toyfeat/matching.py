"""One-to-one assignment of directions to truths, of which some are subspaces."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

_CANDIDATES = 8
_SWEEPS = 10


class Subspace(NamedTuple):
    """Truths that share a group; a truth of its own is a subspace of one.

    Attributes:
      members: indices of the truths.
      basis: ``[rank, D]``, orthonormal rows.
    """

    members: np.ndarray
    basis: np.ndarray

    def shared(self, unit: np.ndarray, chosen: np.ndarray) -> float:
        """Sum of principal cosines with the span of the rows its members got."""
        rows = chosen[self.members]
        rows = unit[rows[rows >= 0]]
        if not len(rows):
            return 0.0
        overlap = orthonormal_rows(rows) @ self.basis.T
        return float(np.clip(np.linalg.svd(overlap, compute_uv=False), 0, 1).sum())


def subspaces(true: np.ndarray, groups: np.ndarray) -> list[Subspace]:
    """Collect the truths of each group.

    Args:
      true: ``[F, D]`` unit rows.
      groups: ``[F]``.

    Returns:
      One subspace per distinct group.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    return [Subspace(m, orthonormal_rows(true[m])) for m in members]


def assignment(unit: np.ndarray, spaces: list[Subspace], num: int) -> np.ndarray:
    """Give each truth at most one row, and each row at most one truth.

    Args:
      unit: ``[R, D]`` unit rows.
      spaces: from :func:`subspaces`.
      num: number of truths ``F``.

    Returns:
      ``[F]``, the row of each truth, -1 for none.
    """
    score = np.zeros((len(unit), num))
    alone, grouped = _apart(spaces)
    score[:, [space.members[0] for space in alone]] = _cosines(unit, alone)
    for space in grouped:
        score[:, space.members] = _place_scores(unit @ space.basis.T, space)
    rows, slots = linear_sum_assignment(score, maximize=True)
    chosen = np.full(num, -1)
    useful = score[rows, slots] > 0
    chosen[slots[useful]] = rows[useful]
    if not grouped:
        return chosen
    return _exchanged(unit, spaces, chosen)


def nearest(unit: np.ndarray, spaces: list[Subspace]) -> np.ndarray:
    """``[R]``, the cosine of each unit row with the subspace nearest to it."""
    alone, grouped = _apart(spaces)
    best = np.max(_cosines(unit, alone), axis=1, initial=0.0)
    for space in grouped:
        best = np.maximum(best, np.linalg.norm(unit @ space.basis.T, axis=1))
    return best


def _apart(spaces: list[Subspace]) -> tuple[list[Subspace], list[Subspace]]:
    """Truths that stand alone, and the others."""
    alone = [space for space in spaces if len(space.members) == 1]
    return alone, [space for space in spaces if len(space.members) > 1]


def _cosines(unit: np.ndarray, alone: list[Subspace]) -> np.ndarray:
    """``[R, len(alone)]``, in one product: there may be thousands."""
    rows = [space.basis for space in alone]
    return np.abs(unit @ np.concatenate([np.zeros((0, unit.shape[1])), *rows]).T)


def _place_scores(coordinates: np.ndarray, space: Subspace) -> np.ndarray:
    """Scores ``[R, places]`` of rows for the places in a subspace.

    Place 0 scores the norm of the projection; place ``i`` what is left of it
    after the best rows of the places before, so that two copies of one direction
    do not fill a plane.
    """
    scores, rest = [], coordinates.copy()
    for _ in space.members:
        norms = np.linalg.norm(rest, axis=1)
        scores.append(norms)
        if norms.size and norms.max() > 1e-12:
            pivot = rest[norms.argmax()] / norms.max()
            rest = rest - np.outer(rest @ pivot, pivot)
    return np.stack(scores, axis=1)


def _exchanged(
    unit: np.ndarray, spaces: list[Subspace], chosen: np.ndarray
) -> np.ndarray:
    """Exchange rows of grouped truths while that raises the summed similarity."""
    owner = {int(m): space for space in spaces for m in space.members}
    grouped = [space for space in spaces if len(space.members) > 1]
    for _ in range(_SWEEPS):
        improved = False
        for space in grouped:
            near = np.argsort(-np.linalg.norm(unit @ space.basis.T, axis=1))
            for member in space.members:
                for row in near[: max(_CANDIDATES, 2 * len(space.members))]:
                    trial = _exchange(chosen, member, row)
                    touched = {id(s): s for s in _owners(owner, chosen, trial)}
                    gain = sum(
                        s.shared(unit, trial) - s.shared(unit, chosen)
                        for s in touched.values()
                    )
                    if gain > 1e-9:
                        chosen, improved = trial, True
        if not improved:
            break
    return chosen


def _exchange(chosen: np.ndarray, member: int, row: int) -> np.ndarray:
    trial = chosen.copy()
    trial[chosen == row] = chosen[member]
    trial[member] = row
    return trial


def _owners(
    owner: dict[int, Subspace], before: np.ndarray, after: np.ndarray
) -> list[Subspace]:
    return [owner[int(m)] for m in np.flatnonzero(before != after)]


def orthonormal_rows(rows: np.ndarray) -> np.ndarray:
    """Orthonormal rows with the same span, as many as the rank."""
    if len(rows) == 1:
        return rows
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    return vt[s > 1e-6 * s[0]]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
