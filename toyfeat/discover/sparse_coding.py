"""Sparse codes of rows, the atoms that fit them best, and which atoms rows need.

Orthogonal matching pursuit, the method of optimal directions and backward elimination,
in float64 on the host.
"""

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from toyfeat.types import ArrayLike

# Rows per pursuit.  Memory only.
_BATCH_SIZE = 1000

# Ridge, as a share of an atom's square: two atoms may become one, and their Gram matrix
# singular.  Far above float64 rounding and far below what any test can see.
_RIDGE = 1e-9

# Energy (sum of squared codes), as a share of the largest, up to which an atom counts
# as unused and stays as it is.  Below it a fit is rounding.
_UNUSED_ENERGY = 1e-9

# Square of a code, as a share of its row's square, from which the row counts as using
# the atom: a hundredth of the length.  Not swept.
_USED_SHARE = 1e-4

# Error that rows may gain without an atom, as a share of the atom's energy in them.
# docs/research.md, section 11.
_MAX_ADDED_ERROR = 0.04


def matching_pursuit(rows: ArrayLike, atoms: ArrayLike, k: int) -> np.ndarray:
    r"""Find sparse codes by orthogonal matching pursuit.

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
    for start in range(0, len(rows), _BATCH_SIZE):
        batch = slice(start, start + _BATCH_SIZE)
        codes[batch] = _pursue(rows[batch], atoms, gram, k)
    return codes


def _pursue(
    rows: np.ndarray, atoms: np.ndarray, gram: np.ndarray, k: int
) -> np.ndarray:
    """Run the pursuit on one batch of rows; ``gram`` is that of the atoms."""
    products = rows @ atoms.T
    codes = np.zeros_like(products)
    chosen = np.zeros((len(rows), 0), int)
    for _ in range(k):
        # Add the atom that is closest to each residual and not chosen yet.
        size = np.abs((rows - codes @ atoms) @ atoms.T)
        np.put_along_axis(size, chosen, -1.0, axis=1)
        chosen = np.concatenate([chosen, size.argmax(1)[:, None]], axis=1)
        # Solve the normal equations of the chosen atoms, row by row.
        chosen_gram = gram[chosen[:, :, None], chosen[:, None, :]]
        chosen_products = np.take_along_axis(products, chosen, axis=1)
        fitted = np.linalg.solve(chosen_gram, chosen_products[:, :, None])[:, :, 0]
        np.put_along_axis(codes, chosen, fitted, axis=1)
    return codes


def mod_step(rows: ArrayLike, atoms: ArrayLike, k: int) -> tuple[np.ndarray, float]:
    r"""Take one step of the method of optimal directions.

    Codes :math:`C` by :func:`matching_pursuit`, then the atoms that fit best to them,
    :math:`(C^\top C)^{-1} C^\top X`, at unit length.

    Args:
      rows: ``[N, D]``.
      atoms: ``[M, D]``, of unit length.
      k: atoms per row.

    Returns:
      Unit atoms ``[M, D]``, those that no row uses unchanged, and the share of the
      rows' sum of squares that the fit does not explain.

    Raises:
      ValueError: as :func:`matching_pursuit`.

    Example:
      >>> import numpy as np
      >>> near = np.array([[0.8, 0.6], [0.0, 1.0]])
      >>> atoms, error = mod_step(np.eye(2), near, 1)
      >>> np.abs(atoms).round(3)
      array([[1., 0.],
             [0., 1.]])

    References:
      Engan, Aase and Husøy (1999), "Method of optimal directions for frame design".
    """
    rows, atoms = np.asarray(rows, np.float64), np.array(atoms, np.float64)
    codes = matching_pursuit(rows, atoms, k)

    # Fit the atoms in use to the codes, by least squares with a ridge.
    energy = np.sum(codes**2, axis=0)
    used = energy > _UNUSED_ENERGY * energy.max(initial=0.0)
    codes = codes[:, used]
    gram = codes.T @ codes
    gram += _RIDGE * np.diag(np.diag(gram))
    fitted = np.linalg.solve(gram, codes.T @ rows)

    error = np.sum((rows - codes @ fitted) ** 2) / (np.sum(rows**2) or 1.0)
    atoms[used] = fitted / np.linalg.norm(fitted, axis=1, keepdims=True)
    return atoms, float(error)


def needed_atoms(
    rows: ArrayLike, atoms: ArrayLike, k: int, *, certain: ArrayLike | None = None
) -> np.ndarray:
    r"""Find the atoms that rows cannot do without, by backward elimination.

    Rows that use an atom are coded again by :func:`matching_pursuit` without it.  If
    the error that this adds is small beside the energy of the atom's codes, the atom is
    removed: a sum of two atoms, either of two that are nearly the same, and what no row
    uses.  Atoms go one after the other, the one that adds least error first, as far as
    was known when it was last tested; an atom that is needed is not tested again.

    Args:
      rows: ``[N, D]``.
      atoms: ``[M, D]``, of unit length.
      k: atoms per row.
      certain: ``[M]`` bool, atoms that are kept in any case; ``None`` for none.

    Returns:
      ``[M]`` bool, of which at least ``k`` are true.

    Raises:
      ValueError: as :func:`matching_pursuit`.

    Example:
      >>> import numpy as np
      >>> atoms = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
      >>> rows = np.array([[1.0, 0.1], [0.1, 1.0], [2.0, 0.0], [0.0, 3.0], [0.6, 0.8]])
      >>> needed_atoms(rows, atoms, 2)
      array([ True,  True, False])

    References:
      Backward elimination, as of regressors: Miller (2002), "Subset selection in
      regression", section 3.4; ``docs/research.md``, section 11.
    """
    rows, atoms = np.asarray(rows, np.float64), np.asarray(atoms, np.float64)
    codes = matching_pursuit(rows, atoms, k)
    remaining = np.ones(len(atoms), bool)
    uncertain = remaining if certain is None else np.logical_not(certain)

    # A queue by added error.  It mostly grows as other atoms go, so an old value is
    # nearly always too small, and it is enough to test the smallest one again.
    queue = [(-np.inf, int(j)) for j in np.flatnonzero(uncertain)]
    while queue and remaining.sum() > k:
        _, j = heappop(queue)
        removal = _code_without(j, rows, atoms, codes, remaining, k)
        if queue and removal.added_error > queue[0][0]:
            heappush(queue, (removal.added_error, j))  # another atom may add less
        elif removal.added_error <= _MAX_ADDED_ERROR * removal.energy:
            codes[:, j] = 0
            codes[removal.users], remaining[j] = removal.codes, False
    return remaining


class _Removal(NamedTuple):
    """Effect of removing an atom.

    Attributes:
      users: rows that use the atom.
      codes: of those rows without the atom.
      added_error: sum of squares that this leaves on top.
      energy: sum of squares of the atom's codes.
    """

    users: np.ndarray
    codes: np.ndarray
    added_error: float
    energy: float


def _code_without(
    j: int,
    rows: np.ndarray,
    atoms: np.ndarray,
    codes: np.ndarray,
    remaining: np.ndarray,
    k: int,
) -> _Removal:
    """Code the rows that use atom ``j`` again, with the other remaining atoms."""
    users = np.flatnonzero(codes[:, j] ** 2 > _USED_SHARE * np.sum(rows**2, axis=1))
    others = remaining & (np.arange(len(atoms)) != j)
    rows, codes = rows[users], codes[users]
    new_codes = np.zeros_like(codes)
    new_codes[:, others] = matching_pursuit(rows, atoms[others], k)
    new_error = np.sum((rows - new_codes @ atoms) ** 2)
    added_error = new_error - np.sum((rows - codes @ atoms) ** 2)
    return _Removal(
        users=users,
        codes=new_codes,
        added_error=float(added_error),
        energy=float(np.sum(codes[:, j] ** 2)),
    )
