"""Make directions exact that are near the atoms of a table of sparse rows."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from toyfeat.discover.peaks import with_peaks
from toyfeat.discover.sparse_coding import (
    SparseCodes,
    matching_pursuit,
    mod_step,
    needed_atoms,
    pursuit_errors,
)
from toyfeat.discover.sparse_fit import (
    CHOICE_ROWS,
    CURVE_ROWS,
    HOPELESS_CURVE,
    MAX_ERROR,
    SparseFit,
    abs_cosines,
    explains,
    fit_tables,
    is_clear,
    next_count,
    order_fits,
    run_mod,
    spread_rows,
)
from toyfeat.types import ArrayLike

# Share of the median direction's sum of squared codes below which a direction may be
# what others leave.  True ones have .28 and more, reads of single neurons that the
# network hardly uses up to .1 (docs/research.md, section 15).
_FAINT_SHARE = 0.1

# It is, with less than this share of the median's mean square per use; where other
# tables have it as well, but none of them is sparse, with less than the second share
# (docs/research.md, sections 15 and 17).
_FAINT_PER_USE = 0.5
_ABSENT_PER_USE = 1e-2

# Support in the other tables from which they have a direction.
_MIN_ELSEWHERE = 2

# Rows per direction of the last fit: each reader needs some that use it.
_ROWS_PER_DIRECTION = 30

# Share of the largest support from which elimination may not remove a direction.
# docs/research.md, section 11, "A code to spare is dangerous".
_CERTAIN_SUPPORT = 0.6

# Square of a code, as a share of its row's square, from which the row uses a direction:
# a tenth of the length.  Smaller codes are noise.
_USED_SHARE = 1e-2

# |cos| from which two directions of a plane are the same, where many are close.
_PLANE_COSINE = 0.99

# Dimensions per code from which elimination is right: with fewer, wrong directions are
# as sparse as true ones.  docs/research.md, section 11.
_MIN_DIMS_PER_CODE = 4

# Directions of another table, as a share of those of the best one, that are parts of
# sums: n + m parts have n * m sums, which with their parts are twice as many or more.
# docs/research.md, section 17.
_PARTS_SHARE = 0.5


class RefinedDirections(NamedTuple):
    """Directions after :func:`refine_directions`.

    Attributes:
      directions: ``[S, D]`` unit rows.
      kept: ``[R]`` bool, the directions that were given and are among them.
      explain: whether a table is sparse in the directions.
      clear: whether fewer codes per row explain it than still count as few.
    """

    directions: np.ndarray
    kept: np.ndarray
    explain: bool
    clear: bool


def refine_directions(
    directions: np.ndarray,
    tables: Sequence[ArrayLike],
    *,
    cosine: float,
    supports: Sequence[ArrayLike] | None = None,
) -> RefinedDirections:
    """Fit directions to the table of rows that is sparse in them, and prune them.

    A table is sparse in directions if they lie in its span, and if few of them per row
    explain it after some steps of the method of optimal directions: no more than half
    as many as it has dimensions, one at least.  Of the sparse tables the first counts,
    unless the median direction moves clearly less in a later one: directions are near
    what they should be, and rows that are made of something else move them away.

    Then directions are left out.  First those of small support, if those of large
    support explain the table with as few codes, and explain the rows that used what is
    left out.  Of the others all but one of those that have become the same; those that
    carry little in all and in every row, which fit what others leave, unless another
    table that is sparse has them, too; and those that
    the table does not need (:func:`toyfeat.discover.sparse_coding.needed_atoms`) and
    whose support is not close to the largest one; the last only where rows have two
    codes or more, since one code cannot take the place of a sum, and where there are
    enough dimensions per code.  What remains is fitted again.

    Args:
      directions: ``[R, D]`` unit rows.
      tables: rows ``[N, D]`` each.
      cosine: a direction whose ``|cos|`` with its fit is less stays where it is.
      supports: for each table ``[R]``, how sure each direction is there; ``None`` if
        all are as sure, and none so sure that it need not be needed.

    Returns:
      :class:`RefinedDirections`; all directions, unchanged, if no table is sparse in
      them.

    Example:
      >>> import numpy as np
      >>> near = np.array([[0.98, 0.199], [0.0, 1.0]])
      >>> refine_directions(near, [np.eye(2)], cosine=0.95).directions.round(3)
      array([[1., 0.],
             [0., 1.]])

    References:
      ``docs/research.md``, section 10 for the fit, section 11 for the choice of the
      table and for what is left out, sections 14 and 15 for the supports.
    """
    fits = fit_tables(directions, tables)
    if not fits:
        every = np.ones(len(directions), bool)
        return RefinedDirections(directions, every, explain=False, clear=False)
    place, *others = order_fits(directions, fits)
    refine = partial(
        _refine_on, fits=fits, directions=directions, supports=supports, cosine=cosine
    )
    best = refine(place)
    for other in others:
        if fits[other].k <= fits[place].k:  # sums take fewer codes than their parts
            continue
        parts = refine(other)
        if explains(fits[place], parts.directions) and (
            not explains(fits[other], best.directions)
            or len(parts.directions) <= _PARTS_SHARE * len(best.directions)
        ):
            best, place = parts, other
    return best


def _refine_on(
    place: int,
    *,
    fits: Mapping[int, SparseFit],
    directions: np.ndarray,
    supports: Sequence[ArrayLike] | None,
    cosine: float,
) -> RefinedDirections:
    """Refine directions on one of the tables that are sparse in them."""
    best = fits[place]
    clear = is_clear(best)

    # The directions of largest support that explain it as well.
    chosen = np.ones(len(directions), bool)
    least_per_use = np.full(len(directions), _FAINT_PER_USE)
    certain = None
    if supports is not None:
        others = [part for i, part in enumerate(supports) if i != place]
        if others:  # what they have as well is not what one table leaves
            sparse = any(is_clear(fit) for i, fit in fits.items() if i != place)
            elsewhere = np.min(others, axis=0) >= _MIN_ELSEWHERE
            least_per_use[elsewhere] = 0 if sparse else _ABSENT_PER_USE
        support = np.asarray(supports[place])
        best, chosen = _most_supported(best, directions, support, cosine)
        certain = (support >= _CERTAIN_SUPPORT * support.max())[chosen]
    directions = directions[chosen]
    refined = _limit_moves(best.atoms, directions, cosine)

    # Many directions need more rows than the choice did.
    rows = spread_rows(
        best.table, max(CHOICE_ROWS, _ROWS_PER_DIRECTION * len(directions))
    )
    if len(rows) > len(best.rows):
        refined, _ = run_mod(rows, refined, best.k)
        refined = _limit_moves(refined, directions, cosine)

    needed = _find_needed(best, rows, refined, cosine, least_per_use[chosen], certain)
    if not needed.all():
        refined, _ = run_mod(rows, refined[needed], best.k)
        refined = _limit_moves(refined, directions[needed], cosine)
        chosen[chosen] = needed
    return RefinedDirections(refined, chosen, explain=True, clear=clear)


def _find_needed(
    fit: SparseFit,
    rows: np.ndarray,
    directions: np.ndarray,
    cosine: float,
    least_per_use: np.ndarray,
    certain: np.ndarray | None,
) -> np.ndarray:
    """Tell which directions are needed, ``[R]`` bool.

    Left out are all but one of those that have become the same, what lies between
    others where rows are spread evenly, what carries little and has less than some
    share of the median's energy per use, and what the rows can do without.
    """
    needed = _distinct(directions, cosine if fit.dim > 2 else _PLANE_COSINE)
    needed[needed] = with_peaks(fit.table, directions[needed])
    codes = matching_pursuit(rows, directions[needed], fit.k)
    needed[needed] = ~_faint(codes, least_per_use[needed])
    if fit.k > 1 and _MIN_DIMS_PER_CODE * fit.k <= fit.dim:
        sure = None if certain is None else certain[needed]
        needed[needed] = needed_atoms(rows, directions[needed], fit.k, certain=sure)
    return needed


def _most_supported(
    fit: SparseFit, directions: np.ndarray, supports: np.ndarray, cosine: float
) -> tuple[SparseFit, np.ndarray]:
    """Fit the directions of largest support that explain a table as well as all do.

    Returns:
      Their fit, and ``[R]`` bool, which they are.
    """
    # With a code more as well: a sum of others takes the place of two codes.
    wholes = [fit]
    if next_count(fit.k) <= fit.most:
        k = next_count(fit.k)
        atoms, _ = mod_step(fit.rows, fit.atoms, k)
        wholes.append(fit._replace(k=k, atoms=atoms))
    sample = spread_rows(fit.rows, CURVE_ROWS)
    uses = [_errors_and_codes(whole) for whole in wholes]
    for level in np.unique(supports)[:0:-1]:
        chosen = supports >= level
        for whole, (errors, codes) in zip(wholes, uses, strict=True):
            k = min(whole.k, int(chosen.sum()))
            # A sample tells most of them, before any fit.
            hopeless = HOPELESS_CURVE * MAX_ERROR
            if pursuit_errors(sample, whole.atoms[chosen], k)[-1] > hopeless:
                continue
            atoms, error = run_mod(fit.rows, whole.atoms[chosen], k)
            near = _limit_moves(atoms, directions[chosen], cosine)
            if np.any(near != atoms):  # one has left for the place of another
                error = pursuit_errors(fit.rows, near, k)[-1]
            part = fit._replace(k=k, atoms=atoms)
            if error <= fit.limit and not np.any(
                _needed(fit.rows, codes, errors, part, chosen)
            ):
                return part, chosen
    return fit, np.ones(len(directions), bool)


def _needed(
    rows: np.ndarray,
    codes: SparseCodes,
    errors: np.ndarray,
    part: SparseFit,
    chosen: np.ndarray,
) -> np.ndarray:
    """Tell which of the directions that are not chosen the rows need, bool.

    Args:
      rows: ``[n, D]``.
      codes: of the rows by all directions.
      errors: ``[n]``, squared ones that these codes leave.
      part: the fit of those chosen.
      chosen: ``[R]`` bool.
    """
    square = codes.matrix(len(chosen)) ** 2
    energy = square.sum(0)
    uses = square[:, ~chosen] > _USED_SHARE * np.sum(rows**2, axis=1)[:, None]
    lost = uses.T @ (_errors_and_codes(part)[0] - errors)
    return lost > MAX_ERROR * np.median(energy[chosen])


def _faint(codes: SparseCodes, least_per_use: np.ndarray) -> np.ndarray:
    """Tell which directions carry little, all in all and per row, bool.

    A rare direction is large where it is used; one that fits what others leave is not.
    """
    square = codes.matrix(len(least_per_use)) ** 2
    uses = np.maximum(1, (square > 0).sum(0))
    energy = square.sum(0)
    per_use = energy / uses
    faint = energy < _FAINT_SHARE * np.median(energy)
    return faint & (per_use < least_per_use * np.median(per_use))


def _errors_and_codes(fit: SparseFit) -> tuple[np.ndarray, SparseCodes]:
    """Return the squared error of each row, and the codes."""
    codes = matching_pursuit(fit.rows, fit.atoms, fit.k)
    return np.sum((fit.rows - codes.reconstruct(fit.atoms)) ** 2, axis=1), codes


def _distinct(directions: np.ndarray, cosine: float) -> np.ndarray:
    """Tell which unit rows are not the same as an earlier one, ``[R]`` bool."""
    same = np.triu(np.abs(directions @ directions.T) >= cosine, 1)
    return ~np.any(same, axis=0)


def _limit_moves(
    refined: np.ndarray, directions: np.ndarray, cosine: float
) -> np.ndarray:
    """Put directions that moved too far back to where they were."""
    near = abs_cosines(refined, directions) >= cosine
    return np.where(near[:, None], refined, directions)
