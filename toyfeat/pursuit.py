"""Directions that rows are sparse combinations of, made exact from near ones."""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from toyfeat.types import ArrayLike

_CHUNK = 1000
_RIDGE = 1e-9  # of a unit atom's square: two atoms may become one
_UNUSED = 1e-9  # of the largest energy, below which an atom stays as it was
_FEW = 4  # dimensions per code, from where on the directions that are needed are told
_USED = 1e-4  # of a row's square, above which a code counts
_CLEARLY = 1.5  # times as far as in another table, up to which the first one counts
_LOSS = 0.04  # of an atom's energy, up to which rows can do without it
_ROUNDS = 8
_LEFT = 0.005  # of a table's sum of squares, with which it is explained
_MOST = 32  # directions per row; a pursuit takes the cube of it


def matching_pursuit(rows: ArrayLike, atoms: ArrayLike, k: int) -> np.ndarray:
    r"""Sparse codes by orthogonal matching pursuit.

    The atom with the largest :math:`|r \cdot a_j|` of the residual :math:`r` is added
    and all codes are fitted again, ``k`` times.

    Args:
      rows: ``[N, D]``.
      atoms: ``[M, D]``, of unit length.
      k: atoms per row, 1 .. M.

    Returns:
      ``[N, M]`` float64 codes, at most ``k`` of a row not 0.

    Raises:
      ValueError: if the shapes do not fit or ``k`` is out of range.

    Example:
      >>> import numpy as np
      >>> matching_pursuit([[3.0, 4.0]], np.eye(2), 1)
      array([[0., 4.]])

    References:
      Pati, Rezaiifar and Krishnaprasad (1993), "Orthogonal matching pursuit".
    """
    rows, atoms = np.asarray(rows, np.float64), np.asarray(atoms, np.float64)
    if rows.ndim != 2 or atoms.ndim != 2 or rows.shape[1] != atoms.shape[1]:
        raise ValueError(
            "matching_pursuit: wanted rows [N, D] and atoms [M, D], got shapes "
            f"{rows.shape} and {atoms.shape}"
        )
    if not 1 <= k <= len(atoms):
        raise ValueError(
            f"matching_pursuit: wanted k in 1 .. {len(atoms)}, the number of atoms, "
            f"got {k}"
        )
    gram = atoms @ atoms.T + _RIDGE * np.eye(len(atoms))
    codes = np.zeros((len(rows), len(atoms)))
    for start in range(0, len(rows), _CHUNK):
        here = slice(start, start + _CHUNK)
        codes[here] = _pursued(rows[here], atoms, gram, k)
    return codes


def _pursued(
    rows: np.ndarray, atoms: np.ndarray, gram: np.ndarray, k: int
) -> np.ndarray:
    products = rows @ atoms.T
    codes = np.zeros_like(products)
    chosen = np.zeros((len(rows), 0), int)
    for _ in range(k):
        size = np.abs((rows - codes @ atoms) @ atoms.T)
        np.put_along_axis(size, chosen, -1.0, axis=1)
        chosen = np.concatenate([chosen, size.argmax(1)[:, None]], axis=1)
        square = gram[chosen[:, :, None], chosen[:, None, :]]
        wanted = np.take_along_axis(products, chosen, axis=1)
        fitted = np.linalg.solve(square, wanted[:, :, None])[:, :, 0]
        np.put_along_axis(codes, chosen, fitted, axis=1)
    return codes


def optimal_directions(
    rows: ArrayLike, atoms: ArrayLike, k: int
) -> tuple[np.ndarray, float]:
    r"""Atoms that fit best to the sparse codes of others.

    Codes :math:`C` by :func:`matching_pursuit`, then
    :math:`(C^\top C)^{-1} C^\top X`, at unit length.

    Args:
      rows: ``[N, D]``.
      atoms: ``[M, D]``, of unit length.
      k: atoms per row.

    Returns:
      Unit atoms ``[M, D]``, those that no row uses as they were, and the share of the
      rows' sum of squares that the fit leaves.

    Raises:
      ValueError: as :func:`matching_pursuit`.

    Example:
      >>> import numpy as np
      >>> near = np.array([[0.8, 0.6], [0.0, 1.0]])
      >>> atoms, left = optimal_directions(np.eye(2), near, 1)
      >>> np.abs(atoms).round(3)
      array([[1., 0.],
             [0., 1.]])

    References:
      Engan, Aase and Husøy (1999), "Method of optimal directions for frame design".
    """
    rows, atoms = np.asarray(rows, np.float64), np.array(atoms, np.float64)
    codes = matching_pursuit(rows, atoms, k)
    energy = np.sum(codes**2, axis=0)
    used = energy > _UNUSED * energy.max(initial=0.0)
    codes = codes[:, used]
    square = codes.T @ codes
    square += _RIDGE * np.diag(np.diag(square))
    fitted = np.linalg.solve(square, codes.T @ rows)
    left = np.sum((rows - codes @ fitted) ** 2) / (np.sum(rows**2) or 1.0)
    atoms[used] = fitted / np.linalg.norm(fitted, axis=1, keepdims=True)
    return atoms, float(left)


def needed(
    rows: ArrayLike, atoms: ArrayLike, k: int, *, sure: ArrayLike | None = None
) -> np.ndarray:
    r"""Which atoms rows cannot do without.

    Rows that use an atom (more than a hundredth of their length) are coded again by
    :func:`matching_pursuit` without it.  If that leaves no more than before, up to a
    twenty-fifth of the sum of squares of its codes there, it can be spared:
    sums of two atoms can, either of two that are nearly the same, and what no row uses.
    Atoms go one after the other, the one that leaves least more first, as far as was
    known when it was last asked; what cannot be spared is not asked again.

    Args:
      rows: ``[N, D]``.
      atoms: ``[M, D]``, of unit length.
      k: atoms per row.
      sure: ``[M]`` bool, atoms that are kept in any case; ``None`` for none.

    Returns:
      ``[M]`` bool, of which at least ``k`` are true.

    Raises:
      ValueError: as :func:`matching_pursuit`.

    Example:
      >>> import numpy as np
      >>> atoms = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
      >>> rows = np.array([[1.0, 0.1], [0.1, 1.0], [2.0, 0.0], [0.0, 3.0], [0.6, 0.8]])
      >>> needed(rows, atoms, 2)
      array([ True,  True, False])

    References:
      Backward elimination, as of regressors: Miller (2002), "Subset selection in
      regression", section 3.4.
    """
    rows, atoms = np.asarray(rows, np.float64), np.asarray(atoms, np.float64)
    codes = matching_pursuit(rows, atoms, k)
    kept = np.ones(len(atoms), bool)
    unsure = np.flatnonzero(kept if sure is None else np.logical_not(sure))
    # What an atom costs mostly grows as others go, so old costs tell whom to ask next.
    waiting = [(-np.inf, int(j)) for j in unsure]
    while waiting and kept.sum() > k:
        _, j = heappop(waiting)
        now = _without(j, rows, atoms, codes, kept, k)
        if waiting and now.lost > waiting[0][0]:
            heappush(waiting, (now.lost, j))
        elif now.lost <= _LOSS * now.energy:
            codes[:, j] = 0
            codes[now.users], kept[j] = now.codes, False
    return kept


class _Spared(NamedTuple):
    """Rows that use an atom, their codes without it, and what that leaves more."""

    users: np.ndarray
    codes: np.ndarray
    lost: float
    energy: float


def _without(
    j: int,
    rows: np.ndarray,
    atoms: np.ndarray,
    codes: np.ndarray,
    kept: np.ndarray,
    k: int,
) -> _Spared:
    users = np.flatnonzero(codes[:, j] ** 2 > _USED * np.sum(rows**2, axis=1))
    others = kept & (np.arange(len(atoms)) != j)
    rows, codes = rows[users], codes[users]
    again = np.zeros_like(codes)
    again[:, others] = matching_pursuit(rows, atoms[others], k)
    lost = np.sum((rows - again @ atoms) ** 2) - np.sum((rows - codes @ atoms) ** 2)
    return _Spared(users, again, float(lost), float(np.sum(codes[:, j] ** 2)))


def sharpened(
    directions: np.ndarray,
    tables: Sequence[ArrayLike],
    *,
    cosine: float,
    sure: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Directions made exact with a table of rows that is sparse in them.

    A table is sparse in them if few directions per row, 1, 2, 3, 4, 6, ..., leave at
    most half a percent after eight :func:`optimal_directions`: no more than half as
    many as there are dimensions without which more is left (one, if there is one), and
    no more than 32.  Of those tables the first counts, or a later one in which the
    median direction moves less than two thirds as far: directions are near what they
    should be, and what is made of others moves them away.  If there are four dimensions
    per code (with fewer other directions are as sparse) and two codes or more (one
    cannot take the place of a sum), those that are not :func:`needed` there are left
    out, and the rest is fitted again.

    Args:
      directions: ``[R, D]`` unit rows.
      tables: rows ``[N, D]`` each.
      cosine: a direction that would move further stays.
      sure: ``[R]`` bool, directions that are not left out; ``None`` for none.

    Returns:
      Unit rows ``[S, D]`` and ``[R]`` bool, which of the directions were kept; all of
      them, as they were, if no table is sparse in them.

    Example:
      >>> import numpy as np
      >>> near = np.array([[0.98, 0.199], [0.0, 1.0]])
      >>> sharpened(near, [np.eye(2)], cosine=0.95)[0].round(3)
      array([[1., 0.],
             [0., 1.]])
    """
    fits = [
        fit for rows in tables if (fit := _sparse(np.asarray(rows, float), directions))
    ]
    if not fits:
        return directions, np.ones(len(directions), bool)
    moves = [1 - np.median(_cosines(fit.moved, directions)) for fit in fits]
    moves[0] /= _CLEARLY
    rows, dim, k, moved = fits[int(np.argmin(moves))]
    moved = _limited(moved, directions, cosine)
    kept = np.ones(len(directions), bool)
    if k > 1 and _FEW * k <= dim:
        kept = needed(rows, moved, k, sure=sure)
    if kept.all():
        return moved, kept
    moved, _ = _fitted(rows, moved[kept], k)
    return _limited(moved, directions[kept], cosine), kept


def _cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.abs(np.sum(rows * others, axis=1))


def _limited(moved: np.ndarray, directions: np.ndarray, cosine: float) -> np.ndarray:
    near = _cosines(moved, directions) >= cosine
    return np.where(near[:, None], moved, directions)


class _Fit(NamedTuple):
    """A table, its dimensions, the fewest codes that explain it, and with what."""

    rows: np.ndarray
    dim: int
    k: int
    moved: np.ndarray


def _sparse(rows: np.ndarray, directions: np.ndarray) -> _Fit | None:
    k, dim = 1, _dimensions(rows)
    while k <= min(len(directions), dim, max(1, dim // 2), _MOST):
        moved, left = _fitted(rows, directions, k)
        if left <= _LEFT:
            return _Fit(rows, dim, k, moved)
        k += max(1, k // 2)
    return None


def _fitted(rows: np.ndarray, atoms: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Some rounds of :func:`optimal_directions`."""
    left = 1.0
    for _ in range(_ROUNDS):
        atoms, left = optimal_directions(rows, atoms, k)
    return atoms, left


def _dimensions(rows: np.ndarray) -> int:
    """That leave half a percent of the sum of squares; 0 of nothing."""
    values = np.linalg.eigvalsh(rows.T @ rows)[::-1]
    explained = np.cumsum(values)
    return int(np.sum(explained < (1 - _LEFT) * explained[-1])) + bool(np.any(rows))
