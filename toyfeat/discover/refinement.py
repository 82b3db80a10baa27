"""Make directions exact that are near the atoms of a table of sparse rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toyfeat.discover.gradients import row_span
from toyfeat.discover.sparse_coding import mod_step, needed_atoms
from toyfeat.types import ArrayLike

# Steps of the method of optimal directions.  docs/research.md, section 10.
_MOD_STEPS = 8

# Share of a table's sum of squares that may stay unexplained where directions are said
# to explain it.  docs/research.md, section 10, where one percent was too lax.
_MAX_ERROR = 0.005

# Most directions per row that are tried; a pursuit takes time with the cube of it.
_MAX_CODES = 32

# How many times as far as in another table the median direction may move in the first
# one.  docs/research.md, section 11, "Which readout, again"; 3 was worse.
_MOVE_RATIO = 1.5

# Least length of the median direction in the span of a table that may refine it: a
# table without a gradient along some dimension pulls all directions out of it, in
# twenty dimensions to a cosine of .975.  The median shared direction had .9997 and more
# where nothing was lacking, .9962 and less elsewhere (docs/research.md, section 13).
_MIN_INSIDE = 0.999

# Dimensions per code from which elimination is right: with fewer, wrong directions are
# as sparse as true ones.  docs/research.md, section 11.
_MIN_DIMS_PER_CODE = 4


def refine_directions(
    directions: np.ndarray,
    tables: Sequence[ArrayLike],
    *,
    cosine: float,
    certain: ArrayLike | None = None,
    core: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit directions to the table of rows that is sparse in them, and prune them.

    A table is sparse in directions if they lie in its span, and if few of them per row
    explain it after some steps of the method of optimal directions: no more than half
    as many as it has dimensions, one at least.  Of the sparse tables the first counts,
    unless the median direction moves clearly less in a later one: directions are near
    what they should be, and rows that are made of something else move them away.

    If the core explains a table with as few codes as all directions do, the others are
    left out.  So are directions of the core that the table does not need
    (:func:`toyfeat.discover.sparse_coding.needed_atoms`), and what remains is fitted
    again.  The latter is done only where rows have two codes or more, since one code
    cannot take the place of a sum, and where there are enough dimensions per code.

    Args:
      directions: ``[R, D]`` unit rows.
      tables: rows ``[N, D]`` each.
      cosine: a direction whose ``|cos|`` with its fit is less stays where it is.
      certain: ``[R]`` bool, directions that the table need not need; ``None`` for none.
      core: ``[R]`` bool, directions that may do without the others; ``None`` for all.

    Returns:
      Unit rows ``[S, D]``, and ``[R]`` bool, the directions that were kept.  All of
      them, unchanged, if no table is sparse in them.

    Example:
      >>> import numpy as np
      >>> near = np.array([[0.98, 0.199], [0.0, 1.0]])
      >>> refine_directions(near, [np.eye(2)], cosine=0.95)[0].round(3)
      array([[1., 0.],
             [0., 1.]])

    References:
      ``docs/research.md``, section 10 for the fit, section 11 for the choice of the
      table and for what is left out, section 13 for the core.
    """
    rows = [np.asarray(table, float) for table in tables]
    chosen = np.ones(len(directions), bool)
    fits: list[_SparseFit] = []

    # Use the core where no fewer codes of all directions explain the same table.
    if core is not None and not np.all(core):
        core_fits = [_fit_sparsely(table, directions[core]) for table in rows]
        fits = [
            fit
            for fit in core_fits
            if fit and not _fit_sparsely(fit.rows, directions, below=fit.k)
        ]
        if fits:
            chosen = np.array(core, bool)
    if not fits:
        fits = [fit for table in rows if (fit := _fit_sparsely(table, directions))]
    if not fits:
        return directions, chosen
    directions = directions[chosen]

    # The table in which directions move least; the first one has an advantage.
    moves = [1 - np.median(_abs_cosines(fit.atoms, directions)) for fit in fits]
    moves[0] /= _MOVE_RATIO
    best = fits[int(np.argmin(moves))]
    refined = _limit_moves(best.atoms, directions, cosine)

    # Leave out the directions that its rows do not need.
    needed = np.ones(len(directions), bool)
    if best.k > 1 and _MIN_DIMS_PER_CODE * best.k <= best.dim:
        keep = None if certain is None else np.asarray(certain)[chosen]
        needed = needed_atoms(best.rows, refined, best.k, certain=keep)
    if not needed.all():
        refined, _ = _run_mod(best.rows, refined[needed], best.k)
        refined = _limit_moves(refined, directions[needed], cosine)
        chosen[chosen] = needed
    return refined, chosen


class _SparseFit(NamedTuple):
    """A table that few directions per row explain.

    Attributes:
      rows: ``[N, D]``, the table.
      dim: its effective rank.
      k: the fewest directions per row that explain it.
      atoms: ``[R, D]``, the directions after the fit.
    """

    rows: np.ndarray
    dim: int
    k: int
    atoms: np.ndarray


def _fit_sparsely(
    rows: np.ndarray, directions: np.ndarray, *, below: int | None = None
) -> _SparseFit | None:
    """Fit directions with the fewest codes that explain a table, ``below`` a number."""
    inside = np.linalg.norm(directions @ row_span(rows).T, axis=1)
    if not len(directions) or np.median(inside) < _MIN_INSIDE:
        return None
    dim = _effective_rank(rows)
    most = min(len(directions), dim, max(1, dim // 2), _MAX_CODES)
    if below is not None:
        most = min(most, below - 1)
    k = 1
    while k <= most:
        atoms, error = _run_mod(rows, directions, k)
        if error <= _MAX_ERROR:
            return _SparseFit(rows, dim, k, atoms)
        k += max(1, k // 2)  # 1, 2, 3, 4, 6, 9, 13, ...
    return None


def _run_mod(rows: np.ndarray, atoms: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Run the method of optimal directions; return atoms and unexplained share."""
    error = 1.0
    for _ in range(_MOD_STEPS):
        atoms, error = mod_step(rows, atoms, k)
    return atoms, error


def _abs_cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return ``|cos|`` of each unit row with the other one at its place."""
    return np.abs(np.sum(rows * others, axis=1))


def _limit_moves(
    refined: np.ndarray, directions: np.ndarray, cosine: float
) -> np.ndarray:
    """Put directions that moved too far back to where they were."""
    near = _abs_cosines(refined, directions) >= cosine
    return np.where(near[:, None], refined, directions)


def _effective_rank(rows: np.ndarray) -> int:
    """Count the dimensions that explain a table up to ``_MAX_ERROR``; 0 for zeros."""
    explained = np.cumsum(np.linalg.eigvalsh(rows.T @ rows)[::-1])
    num = int(np.sum(explained < (1 - _MAX_ERROR) * explained[-1])) + 1
    return num if np.any(rows) else 0
