"""Fits of directions to rows that are sparse in them, with as few codes as will do."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from toyfeat.discover.gradients import row_span
from toyfeat.discover.sparse_coding import mod_step, pursuit_errors
from toyfeat.types import ArrayLike

# Steps of the method of optimal directions.  docs/research.md, section 10.
_MOD_STEPS = 8

# Share of a table's sum of squares that may stay unexplained where directions are said
# to explain it.  docs/research.md, section 10, where one percent was too lax.
MAX_ERROR = 0.005

# Most directions per row that are tried.  Not swept.
_MAX_CODES = 32

# Where a step leaves more than this share of the error of the last one, and the error
# is still too large, more steps would not explain the table.  Not swept.
_MIN_GAIN = 0.9

# Errors before any step above so many times the largest that counts are not fitted:
# directions within a |cos| of .95 leave a tenth.
HOPELESS_CURVE = 20

# Rows on which codes are counted before any step.
CURVE_ROWS = 1000

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

# Least length of the median direction in the span of a table that may refine it: a
# table without a gradient along some dimension pulls all directions out of it, in
# twenty dimensions to a cosine of .975.  The median shared direction had .9997 and more
# where nothing was lacking, .9962 and less elsewhere (docs/research.md, section 13).
_MIN_INSIDE = 0.999

# Rows on which the number of codes and the table are chosen (docs/research.md, section
# 10).
CHOICE_ROWS = 6000

# How many times as far as in another table the median direction may move in the first
# one.  docs/research.md, section 11, "Which readout, again"; 3 was worse.
_MOVE_RATIO = 1.5


class SparseFit(NamedTuple):
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


def next_count(k: int) -> int:
    """Return the number of codes that is tried after ``k``."""
    return k + max(1, k // 2)  # 1, 2, 3, 4, 6, 9, 13, ...


def spread_rows(rows: ArrayLike, num: int) -> np.ndarray:
    """Take at most ``num`` evenly spaced rows."""
    rows = np.asarray(rows)
    index = np.linspace(0, len(rows) - 1, min(len(rows), num)).astype(int)
    return rows[index].astype(np.float64)


def fit_sparsely(table: ArrayLike, directions: np.ndarray) -> SparseFit | None:
    """Fit directions with the fewest codes that explain a table."""
    rows = spread_rows(table, CHOICE_ROWS)
    inside = np.linalg.norm(directions @ row_span(rows).T, axis=1)
    if not len(directions) or np.median(inside) < _MIN_INSIDE:
        return None
    dim = _effective_rank(rows)
    most = min(len(directions), dim, max(1, dim // 2), _MAX_CODES)
    counts = _candidates(rows, directions, dim, most)
    for k in counts:
        atoms, error = run_mod(rows, directions, k)
        if error <= MAX_ERROR:
            return SparseFit(table, rows, dim, most, MAX_ERROR, k, atoms)
    # The last code that is worth it may leave a remainder that nothing sparse explains.
    if counts and counts[-1] < most and error <= _MAX_REMAINDER:
        limit = _REMAINDER_RATIO * error
        return SparseFit(table, rows, dim, most, limit, counts[-1], atoms)
    return None


def fit_tables(
    directions: np.ndarray, tables: Sequence[ArrayLike]
) -> dict[int, SparseFit]:
    """Fit all tables that are sparse in directions, by their places."""
    found = [fit_sparsely(table, directions) for table in tables]
    return {i: fit for i, fit in enumerate(found) if fit}


def order_fits(directions: np.ndarray, fits: Mapping[int, SparseFit]) -> list[int]:
    """Return the places of the tables that may refine directions, the best first."""
    # Those that are explained whole come before those that leave a remainder.
    least = min(fit.limit for fit in fits.values())
    best = {i: fit for i, fit in fits.items() if fit.limit in (least, MAX_ERROR)}
    # Those that need all codes that count as few come last.
    best = {i: fit for i, fit in best.items() if is_clear(fit)} or best

    # The table in which directions move least; the first one has an advantage.
    first = min(best)
    moves = {
        i: (1 - np.median(abs_cosines(fit.atoms, directions)))
        / (_MOVE_RATIO if i == first else 1)
        for i, fit in best.items()
    }
    return sorted(moves, key=moves.__getitem__)


def is_clear(fit: SparseFit) -> bool:
    """Tell whether fewer codes explain a table than still count as few.

    With codes for half of its dimensions nearly any directions explain it; one code is
    few in any number of them.
    """
    return fit.k < fit.most or fit.most == 1


def explains(fit: SparseFit, directions: np.ndarray) -> bool:
    """Tell whether few directions per row explain a table, where they stand."""
    few = min(fit.most, len(directions))
    return bool(few and pursuit_errors(fit.rows, directions, few)[-1] <= fit.limit)


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
    errors = pursuit_errors(spread_rows(rows, CURVE_ROWS), directions, most)
    log = np.log(max(_MIN_FOR_LIMIT, len(directions)))
    largest = 2 * log - np.log(log) - np.log(np.pi) + 2 * np.euler_gamma
    chance = min(_MAX_CHANCE, largest / dim)
    by_chance = np.flatnonzero(errors > (1 - chance) * np.append(1, errors[:-1]))
    last = most if not len(by_chance) else max(1, int(by_chance[0]))
    counts, k = [], 1
    while k < last:
        counts.append(k)
        k = next_count(k)
    # A fit cannot mend all of the error.
    return [k for k in [*counts, last] if errors[k - 1] <= HOPELESS_CURVE * MAX_ERROR]


def run_mod(rows: np.ndarray, atoms: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Run the method of optimal directions; return atoms and unexplained share."""
    error = 1.0
    for _ in range(_MOD_STEPS):
        last, last_error = atoms, error
        atoms, error = mod_step(rows, atoms, k)
        moves = 1 - abs_cosines(atoms, last)
        converged = np.quantile(moves, _MOVING_SHARE) < _MIN_MOVE
        if converged or error > max(MAX_ERROR, _MIN_GAIN * last_error):
            break
    return atoms, error


def abs_cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return ``|cos|`` of each unit row with the other one at its place."""
    return np.abs(np.sum(rows * others, axis=1))


def _effective_rank(rows: np.ndarray) -> int:
    """Count the dimensions that explain a table up to ``MAX_ERROR``; 0 for zeros."""
    explained = np.cumsum(np.linalg.eigvalsh(rows.T @ rows)[::-1])
    num = int(np.sum(explained < (1 - MAX_ERROR) * explained[-1])) + 1
    return num if np.any(rows) else 0
