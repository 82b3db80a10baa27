"""Make directions exact that are near the atoms of a table of sparse rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toyfeat.discover.gradients import row_span
from toyfeat.discover.sparse_coding import (
    SparseCodes,
    matching_pursuit,
    mod_step,
    needed_atoms,
    pursuit_errors,
)
from toyfeat.types import ArrayLike

# Share of the median direction's sum of squared codes, and of its mean square per row,
# below which a direction is what others leave.  True ones have .28 and more of the
# first, reads of single neurons that the network hardly uses up to .1
# (docs/research.md, section 15).
_FAINT_SHARE = 0.1
_FAINT_PER_USE = 0.5

# Steps of the method of optimal directions.  docs/research.md, section 10.
_MOD_STEPS = 8

# Share of a table's sum of squares that may stay unexplained where directions are said
# to explain it.  docs/research.md, section 10, where one percent was too lax.
_MAX_ERROR = 0.005

# Most directions per row that are tried.  Not swept.
_MAX_CODES = 32

# Rows on which the number of codes and the table are chosen (docs/research.md, section
# 10), and rows per direction of the last fit: each reader needs some that use it.
_CHOICE_ROWS = 6000
_ROWS_PER_DIRECTION = 30

# Share of the largest support from which elimination may not remove a direction.
# docs/research.md, section 11, "A code to spare is dangerous".
_CERTAIN_SUPPORT = 0.6

# Square of a code, as a share of its row's square, from which the row uses a direction:
# a tenth of the length.  Smaller codes are noise.
_USED_SHARE = 1e-2

# Where a step leaves more than this share of the error of the last one, and the error
# is still too large, more steps would not explain the table.  Not swept.
_MIN_GAIN = 0.9

# The same before any step, where directions are near what they should be: within a
# cosine of .975.
_HOPELESS_CURVE = 10

# Rows on which codes are counted before any step.
_CURVE_ROWS = 1000

# Largest remainder that nothing sparse explains, where directions are still said to
# explain the rest: between what a trained residual layer leaves, 1.3 %, and what the
# control leaves that computes fewer functions than it has features, 3 %
# (docs/research.md, section 15).  What others of its size may leave, as a ratio.
_MAX_REMAINDER = 0.02
_REMAINDER_RATIO = 1.25

# Fewest directions for which the law of the largest of many holds.
_MIN_FOR_LIMIT = 3

# Largest share of a row that a code is taken to explain by chance.
_MAX_CHANCE = 0.95

# Directions have converged where nine in ten move less, in 1 - |cos|, at a step: an
# angle of a milliradian.  Not swept.
_MOVING_SHARE = 0.9
_MIN_MOVE = 1e-6

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


class RefinedDirections(NamedTuple):
    """Directions after :func:`refine_directions`.

    Attributes:
      directions: ``[S, D]`` unit rows.
      kept: ``[R]`` bool, the directions that were given and are among them.
      explain: whether a table is sparse in the directions.
    """

    directions: np.ndarray
    kept: np.ndarray
    explain: bool


class _SparseFit(NamedTuple):
    """A table that few directions per row explain.

    Attributes:
      table: ``[N, D]``, all of its rows.
      rows: ``[n, D]``, those that were fitted.
      dim: its effective rank.
      most: directions per row that count as few.
      limit: largest share of its sum of squares that may stay unexplained.
      k: the fewest directions per row that explain it.
      atoms: ``[R, D]``, the directions after the fit.
    """

    table: ArrayLike
    rows: np.ndarray
    dim: int
    most: int
    limit: float
    k: int
    atoms: np.ndarray


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
    left out.  Of the others those that the table does not need
    (:func:`toyfeat.discover.sparse_coding.needed_atoms`) and whose support is not close
    to the largest one; this only where rows have two codes or more, since one code
    cannot take the place of a sum, and where there are enough dimensions per code.
    What remains is fitted again.

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
      table and for what is left out, section 14 for the supports.
    """
    found = [_fit_sparsely(table, directions) for table in tables]
    fits = {i: fit for i, fit in enumerate(found) if fit}
    # Those that are explained whole come before those that leave a remainder.
    least = min((fit.limit for fit in fits.values()), default=0)
    fits = {i: f for i, f in fits.items() if f.limit in (least, _MAX_ERROR)}
    if not fits:
        return RefinedDirections(directions, np.ones(len(directions), bool), False)

    # The table in which directions move least; the first one has an advantage.
    first = next(iter(fits))
    moves = {
        i: (1 - np.median(_abs_cosines(fit.atoms, directions)))
        / (_MOVE_RATIO if i == first else 1)
        for i, fit in fits.items()
    }
    place = min(moves, key=moves.__getitem__)
    best = fits[place]

    # The directions of largest support that explain it as well.
    chosen = np.ones(len(directions), bool)
    certain = None
    if supports is not None:
        support = np.asarray(supports[place])
        best, chosen = _most_supported(best, directions, support)
        certain = (support >= _CERTAIN_SUPPORT * support.max())[chosen]
    directions = directions[chosen]
    refined = _limit_moves(best.atoms, directions, cosine)

    # Many directions need more rows than the choice did.
    rows = _spread(best.table, max(_CHOICE_ROWS, _ROWS_PER_DIRECTION * len(directions)))
    if len(rows) > len(best.rows):
        refined, _ = _run_mod(rows, refined, best.k)
        refined = _limit_moves(refined, directions, cosine)

    # Leave out what only the last percent of the rows has, and what they do not need.
    needed = ~_faint(matching_pursuit(rows, refined, best.k), len(refined))
    if best.k > 1 and _MIN_DIMS_PER_CODE * best.k <= best.dim:
        if certain is not None:
            certain = certain[needed]
        needed[needed] = needed_atoms(rows, refined[needed], best.k, certain=certain)
    if not needed.all():
        refined, _ = _run_mod(rows, refined[needed], best.k)
        refined = _limit_moves(refined, directions[needed], cosine)
        chosen[chosen] = needed
    return RefinedDirections(refined, chosen, explain=True)


def _most_supported(
    fit: _SparseFit, directions: np.ndarray, supports: np.ndarray
) -> tuple[_SparseFit, np.ndarray]:
    """Fit the directions of largest support that explain a table as well as all do.

    Returns:
      Their fit, and ``[R]`` bool, which they are.
    """
    # With a code more as well: a sum of others takes the place of two codes.
    wholes = [fit]
    if _next(fit.k) <= fit.most:
        k = _next(fit.k)
        atoms, _ = mod_step(fit.rows, fit.atoms, k)
        wholes.append(fit._replace(k=k, atoms=atoms))
    sample = _spread(fit.rows, _CURVE_ROWS)
    uses = [_errors_and_codes(whole) for whole in wholes]
    for level in np.unique(supports)[:0:-1]:
        chosen = supports >= level
        for whole, (errors, codes) in zip(wholes, uses, strict=True):
            k = min(whole.k, int(chosen.sum()))
            # A sample tells most of them, before any fit.
            hopeless = _HOPELESS_CURVE * _MAX_ERROR
            if pursuit_errors(sample, whole.atoms[chosen], k)[-1] > hopeless:
                continue
            atoms, error = _run_mod(fit.rows, whole.atoms[chosen], k)
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
    part: _SparseFit,
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
    return lost > _MAX_ERROR * np.median(energy[chosen])


def _faint(codes: SparseCodes, num: int) -> np.ndarray:
    """Tell which of ``num`` directions carry little, all in all and per row, bool.

    A rare direction is large where it is used; one that fits what others leave is not.
    """
    square = codes.matrix(num) ** 2
    uses = np.maximum(1, (square > 0).sum(0))
    energy = square.sum(0)
    per_use = energy / uses
    faint = energy < _FAINT_SHARE * np.median(energy)
    return faint & (per_use < _FAINT_PER_USE * np.median(per_use))


def _errors_and_codes(fit: _SparseFit) -> tuple[np.ndarray, SparseCodes]:
    """Return the squared error of each row, and the codes."""
    codes = matching_pursuit(fit.rows, fit.atoms, fit.k)
    return np.sum((fit.rows - codes.reconstruct(fit.atoms)) ** 2, axis=1), codes


def _next(k: int) -> int:
    """Return the number of codes that is tried after ``k``."""
    return k + max(1, k // 2)  # 1, 2, 3, 4, 6, 9, 13, ...


def _spread(rows: ArrayLike, num: int) -> np.ndarray:
    """Take at most ``num`` evenly spaced rows."""
    rows = np.asarray(rows)
    index = np.linspace(0, len(rows) - 1, min(len(rows), num)).astype(int)
    return rows[index].astype(np.float64)


def _fit_sparsely(table: ArrayLike, directions: np.ndarray) -> _SparseFit | None:
    """Fit directions with the fewest codes that explain a table."""
    rows = _spread(table, _CHOICE_ROWS)
    inside = np.linalg.norm(directions @ row_span(rows).T, axis=1)
    if not len(directions) or np.median(inside) < _MIN_INSIDE:
        return None
    dim = _effective_rank(rows)
    most = min(len(directions), dim, max(1, dim // 2), _MAX_CODES)
    counts = _candidates(rows, directions, dim, most)
    for k in counts:
        atoms, error = _run_mod(rows, directions, k)
        if error <= _MAX_ERROR:
            return _SparseFit(table, rows, dim, most, _MAX_ERROR, k, atoms)
    # The last code that is worth it may leave a remainder that nothing sparse explains.
    if counts and counts[-1] < most and error <= _MAX_REMAINDER:
        limit = _REMAINDER_RATIO * error
        return _SparseFit(table, rows, dim, most, limit, counts[-1], atoms)
    return None


def _candidates(
    rows: np.ndarray, directions: np.ndarray, dim: int, most: int
) -> list[int]:
    r"""List the numbers of codes that may explain rows, the fewest first.

    Each code has to explain more than it would by chance, of rows that are made of
    nothing sparse: of ``M`` directions the best one has
    :math:`\cos^2 \approx E_M / D` with a normal row of ``D`` dimensions, where
    :math:`E_M = 2 \ln M - \ln \ln M - \ln \pi + 2 \gamma` is the mean of the largest of
    ``M`` squared normal numbers.

    References:
      Embrechts, Klüppelberg and Mikosch (1997), "Modelling extremal events", table
      3.4.4, for the largest of squared normal numbers, which have a gamma distribution.
    """
    errors = pursuit_errors(_spread(rows, _CURVE_ROWS), directions, most)
    log = np.log(max(_MIN_FOR_LIMIT, len(directions)))
    largest = 2 * log - np.log(log) - np.log(np.pi) + 2 * np.euler_gamma
    chance = min(_MAX_CHANCE, largest / dim)
    by_chance = np.flatnonzero(errors > (1 - chance) * np.append(1, errors[:-1]))
    last = most if not len(by_chance) else max(1, int(by_chance[0]))
    counts, k = [], 1
    while k < last:
        counts.append(k)
        k = _next(k)
    # A fit cannot mend all of the error.
    return [k for k in [*counts, last] if errors[k - 1] <= _HOPELESS_CURVE * _MAX_ERROR]


def _run_mod(rows: np.ndarray, atoms: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Run the method of optimal directions; return atoms and unexplained share."""
    error = 1.0
    for _ in range(_MOD_STEPS):
        last, last_error = atoms, error
        atoms, error = mod_step(rows, atoms, k)
        moves = 1 - _abs_cosines(atoms, last)
        converged = np.quantile(moves, _MOVING_SHARE) < _MIN_MOVE
        if converged or error > max(_MAX_ERROR, _MIN_GAIN * last_error):
            break
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
