"""One-to-one assignment of directions to truths, some of which are subspaces."""

from typing import NamedTuple

import numpy as np

# Nearest rows that an exchange tries for every place in a subspace; twice as many as it
# has members if that is more.  Farther rows hardly ever raise a sum of cosines, and
# tests compare small cases with a search of all assignments.
_CANDIDATES = 8

# Most rounds of exchanges; they end earlier where none helps.  Not tuned.
_MAX_ROUNDS = 10

# Gain in summed cosines from which an exchange counts: above float64 rounding, so that
# exchanges of equals do not go round in circles.
_MIN_GAIN = 1e-9

# Norm up to which what is left of a unit row is rounding.
_MIN_REMAINDER = 1e-12

# Smallest singular value of unit rows that counts in their rank, as a share of the
# largest: true directions that are the same to float32 rounding are one dimension.
_MIN_SINGULAR_VALUE = 1e-6


class Subspace(NamedTuple):
    """Truths that share a group; a truth of its own is a subspace of one.

    Attributes:
      members: indices of the truths.
      basis: ``[rank, D]``, orthonormal rows.
    """

    members: np.ndarray
    basis: np.ndarray

    def summed_cosines(self, rows: np.ndarray, assigned: np.ndarray) -> float:
        """Sum the principal cosines with the span of the rows assigned to it."""
        own = assigned[self.members]
        own_rows = rows[own[own >= 0]]
        if not len(own_rows):
            return 0.0
        overlap = orthonormal_rows(own_rows) @ self.basis.T
        return float(np.clip(np.linalg.svd(overlap, compute_uv=False), 0, 1).sum())


def group_subspaces(truth: np.ndarray, groups: np.ndarray) -> list[Subspace]:
    """Collect the truths of each group.

    Args:
      truth: ``[F, D]`` unit rows.
      groups: ``[F]``.

    Returns:
      One subspace per distinct group.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    return [Subspace(m, orthonormal_rows(truth[m])) for m in members]


def best_pairs(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns, one to one, so that the sum of scores is largest.

    Args:
      scores: ``[R, F]``.

    Returns:
      Row and column of each of the ``min(R, F)`` pairs, by row.

    References:
      Kuhn (1955), "The Hungarian method for the assignment problem".
    """
    # Imported here: it takes longer than all of toyfeat does.
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(scores, maximize=True)


def assign_rows(rows: np.ndarray, spaces: list[Subspace], num: int) -> np.ndarray:
    """Give each truth at most one row, and each row at most one truth.

    Args:
      rows: ``[R, D]`` unit rows.
      spaces: from :func:`group_subspaces`.
      num: number of truths ``F``.

    Returns:
      ``[F]``, the row of each truth, -1 for none.
    """
    # Scores of every row for every truth, or for every place in a subspace.
    scores = np.zeros((len(rows), num))
    lines, planes = _split_spaces(spaces)
    scores[:, [space.members[0] for space in lines]] = _line_cosines(rows, lines)
    for space in planes:
        scores[:, space.members] = _place_scores(rows @ space.basis.T, space)

    # The best one-to-one assignment, without pairs that are orthogonal.
    row_index, truth_index = best_pairs(scores)
    assigned = np.full(num, -1)
    useful = scores[row_index, truth_index] > 0
    assigned[truth_index[useful]] = row_index[useful]

    # Scores of places are no sum of principal cosines, so improve on them.
    return _exchange_rows(rows, spaces, assigned) if planes else assigned


def nearest_cosines(rows: np.ndarray, spaces: list[Subspace]) -> np.ndarray:
    """Return ``[R]``, the cosine of each unit row with its nearest subspace."""
    lines, planes = _split_spaces(spaces)
    best = np.max(_line_cosines(rows, lines), axis=1, initial=0.0)
    for space in planes:
        best = np.maximum(best, np.linalg.norm(rows @ space.basis.T, axis=1))
    return best


def _split_spaces(spaces: list[Subspace]) -> tuple[list[Subspace], list[Subspace]]:
    """Split into truths that stand alone, and subspaces of several."""
    lines = [space for space in spaces if len(space.members) == 1]
    return lines, [space for space in spaces if len(space.members) > 1]


def _line_cosines(rows: np.ndarray, lines: list[Subspace]) -> np.ndarray:
    """Return ``[R, len(lines)]``, in one product: there may be thousands."""
    bases = [space.basis for space in lines]
    return np.abs(rows @ np.concatenate([np.zeros((0, rows.shape[1])), *bases]).T)


def _place_scores(coordinates: np.ndarray, space: Subspace) -> np.ndarray:
    """Score rows for the places in a subspace, ``[R, places]``.

    Place 0 scores the norm of the projection; place ``i`` what is left of it
    after the best rows of the places before, so that two copies of one direction
    do not fill a plane.
    """
    scores, remainder = [], coordinates.copy()
    for _ in space.members:
        norms = np.linalg.norm(remainder, axis=1)
        scores.append(norms)
        if norms.size and norms.max() > _MIN_REMAINDER:
            pivot = remainder[norms.argmax()] / norms.max()
            remainder = remainder - np.outer(remainder @ pivot, pivot)
    return np.stack(scores, axis=1)


def _exchange_rows(
    rows: np.ndarray, spaces: list[Subspace], assigned: np.ndarray
) -> np.ndarray:
    """Exchange rows of grouped truths while that raises the summed similarity."""
    owner = {int(m): space for space in spaces for m in space.members}
    _, planes = _split_spaces(spaces)
    for _ in range(_MAX_ROUNDS):
        improved = False
        for space in planes:
            near = np.argsort(-np.linalg.norm(rows @ space.basis.T, axis=1))
            candidates = near[: max(_CANDIDATES, 2 * len(space.members))]
            for member in space.members:
                for row in candidates:
                    # Give the member this row, and the row's truth the member's one.
                    trial = _swap(assigned, member, row)
                    changed = {
                        id(owner[int(m)]): owner[int(m)]
                        for m in np.flatnonzero(assigned != trial)
                    }
                    gain = sum(
                        s.summed_cosines(rows, trial) - s.summed_cosines(rows, assigned)
                        for s in changed.values()
                    )
                    if gain > _MIN_GAIN:
                        assigned, improved = trial, True
        if not improved:
            break
    return assigned


def _swap(assigned: np.ndarray, member: int, row: int) -> np.ndarray:
    """Assign a row to a member, and the member's row to the truth that had it."""
    trial = assigned.copy()
    trial[assigned == row] = assigned[member]
    trial[member] = row
    return trial


def orthonormal_rows(rows: np.ndarray) -> np.ndarray:
    """Return orthonormal rows with the same span, as many as the rank."""
    if len(rows) == 1:
        return rows
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    return vt[s > _MIN_SINGULAR_VALUE * s[0]]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scale rows to norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
