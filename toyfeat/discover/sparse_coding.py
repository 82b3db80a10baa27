"""Sparse codes of rows, the atoms that fit them best, and which atoms rows need.

Orthogonal matching pursuit, the method of optimal directions and backward elimination,
in float64 on the host.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from toyfeat.types import ArrayLike

if TYPE_CHECKING:
    from scipy import sparse

# Products of atoms that are held at once, 2 MiB in single precision, which a cache
# holds.
_MAX_PRODUCTS = 2**19

# Ridge, as a share of an atom's square: two atoms may become one, and their Gram matrix
# singular.  Far above float64 rounding and far below what any test can see.
_RIDGE = 1e-9

# Square of an atom's part that no other chosen atom has; below it the atom is a sum of
# them, up to single precision.
_MIN_SQUARE = np.float32(1e-5)

# Energy (sum of squared codes), as a share of the largest, up to which an atom counts
# as unused and stays as it is.  Below it a fit is rounding.
_UNUSED_ENERGY = 1e-9

# Square of a code, as a share of its row's square, from which the row counts as using
# the atom: a hundredth of the length.  Not swept.
_USED_SHARE = 1e-4

# Error that rows may gain without an atom, as a share of the atom's energy in them.
# docs/research.md, section 11.
_MAX_ADDED_ERROR = 0.04


class SparseCodes(NamedTuple):
    """Codes of rows, ``k`` of each.

    Attributes:
      index: ``[N, k]`` int, the atoms of each row, all different.
      values: ``[N, k]`` float64, their codes.
    """

    index: np.ndarray
    values: np.ndarray

    def matrix(self, num_atoms: int) -> sparse.csr_array:
        """Return the codes as a sparse matrix ``[N, num_atoms]``."""
        from scipy import sparse

        num, k = self.index.shape
        starts = np.arange(num + 1) * k
        entries = self.values.ravel(), self.index.ravel(), starts
        return sparse.csr_array(entries, shape=(num, num_atoms))

    def reconstruct(self, atoms: np.ndarray) -> np.ndarray:
        """Return the sums of atoms ``[N, D]`` that the codes stand for."""
        return self.matrix(len(atoms)) @ atoms


def matching_pursuit(rows: ArrayLike, atoms: ArrayLike, k: int) -> SparseCodes:
    r"""Find sparse codes by orthogonal matching pursuit.

    The atom with the largest :math:`|r \cdot a_j|` of the residual :math:`r` is added
    and all codes are fitted again, ``k`` times.

    Args:
      rows: ``[N, D]``.
      atoms: ``[M, D]``, of unit length.
      k: atoms per row, 1 .. M.

    Returns:
      Codes of ``k`` atoms per row.

    Raises:
      ValueError: if the shapes do not fit or ``k`` is out of range.

    Example:
      >>> import numpy as np
      >>> matching_pursuit([[3.0, 4.0]], np.eye(2), 1).matrix(2).toarray()
      array([[0., 4.]])

    References:
      Pati, Rezaiifar and Krishnaprasad (1993), "Orthogonal matching pursuit".
    """
    rows, atoms = _check_shapes(rows, atoms, k)
    index = np.zeros((len(rows), k), int)
    values = np.zeros((len(rows), k))
    gram = atoms @ atoms.T
    # Single precision chooses the atoms; their codes are exact.
    single_gram, single_atoms = gram.astype(np.float32), atoms.astype(np.float32)
    gram += _RIDGE * np.eye(len(atoms))
    for batch in _batches(len(rows), len(atoms), k):
        scores = rows[batch].astype(np.float32) @ single_atoms.T
        index[batch], _ = _choose_atoms(scores, single_gram, k)
        chosen = index[batch]
        # Solve the normal equations of the chosen atoms, row by row.
        chosen_gram = gram[chosen[:, :, None], chosen[:, None, :]]
        products = np.matmul(atoms[chosen], rows[batch, :, None])
        values[batch] = np.linalg.solve(chosen_gram, products)[:, :, 0]
    return SparseCodes(index, values)


def _check_shapes(
    rows: ArrayLike, atoms: ArrayLike, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 if their shapes fit, and ``k`` to them."""
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
    return rows, atoms


def _batches(num_rows: int, num_atoms: int, k: int) -> list[slice]:
    """Cut rows into batches whose products with atoms fit into a cache."""
    size = max(1, _MAX_PRODUCTS // (num_atoms * k))
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def pursuit_errors(rows: ArrayLike, atoms: ArrayLike, k: int) -> np.ndarray:
    """Return the share of rows that :func:`matching_pursuit` leaves unexplained.

    Args:
      rows: ``[N, D]``.
      atoms: ``[M, D]``, of unit length.
      k: most atoms per row.

    Returns:
      ``[k]``: shares of the rows' sum of squares, with one to ``k`` atoms per row, in
      single precision.

    Raises:
      ValueError: as :func:`matching_pursuit`.

    Example:
      >>> import numpy as np
      >>> pursuit_errors([[3.0, 4.0]], np.eye(2), 2).round(4)
      array([0.36, 0.  ], dtype=float32)
    """
    rows, atoms = _check_shapes(rows, atoms, k)
    rows, atoms = rows.astype(np.float32), atoms.astype(np.float32)
    gram = atoms @ atoms.T
    gains = np.zeros(k, np.float32)
    for batch in _batches(len(rows), len(atoms), k):
        gains += _choose_atoms(rows[batch] @ atoms.T, gram, k)[1]
    return np.maximum(0, 1 - np.cumsum(gains) / (np.sum(rows**2) or 1))


def _choose_atoms(
    scores: np.ndarray, gram: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose ``k`` atoms per row by their scores, the products of rows and atoms.

    Residuals are never formed: with the products of all atoms, scores of residuals
    follow from those of the rows, whatever the dimension is.

    Returns:
      Atoms ``[B, k]``, and ``[k]``, the sum of squares that each round explains.

    References:
      Rubinstein, Zibulevsky and Elad (2008), "Efficient implementation of the K-SVD
      algorithm using batch orthogonal matching pursuit".
    """
    each = np.arange(len(scores))
    index = np.zeros((len(scores), k), int)
    gains = np.zeros(k, scores.dtype)
    parts = np.zeros((len(scores), k, len(gram)), scores.dtype)
    for i in range(k):
        # The atom that is closest to each residual and not chosen yet.
        size = np.abs(scores)
        np.put_along_axis(size, index[:, :i], -1.0, axis=1)
        index[:, i] = atom = size.argmax(1)
        # Products of all atoms with its part that is orthogonal to the chosen ones, at
        # unit length (Gram and Schmidt); zeros if it is one of them.
        part = gram[atom]
        if i:
            inside = parts[each, :i, atom]
            part -= np.matmul(inside[:, None, :], parts[:, :i])[:, 0]
        square = part[each, atom, None]
        length = np.sqrt(np.maximum(square, _MIN_SQUARE))
        part *= (square > _MIN_SQUARE) / length
        parts[:, i] = part
        # Take that part away from the residuals.
        codes = (square > _MIN_SQUARE) * scores[each, atom, None] / length
        scores = scores - codes * part
        gains[i] = np.sum(codes**2)
    return index, gains


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
    codes = matching_pursuit(rows, atoms, k).matrix(len(atoms))

    # Fit the atoms in use to the codes, by least squares with a ridge.
    gram = (codes.T @ codes).toarray()
    energy = np.diag(gram)
    used = energy > _UNUSED_ENERGY * energy.max(initial=0.0)
    gram = gram[np.ix_(used, used)] + _RIDGE * np.diag(energy[used])
    fitted = np.linalg.solve(gram, (codes.T @ rows)[used])

    error = np.sum((rows - codes[:, used] @ fitted) ** 2) / (np.sum(rows**2) or 1.0)
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
        removal = _code_without(j, rows, atoms, codes, remaining)
        if queue and removal.added_error > queue[0][0]:
            heappush(queue, (removal.added_error, j))  # another atom may add less
        elif removal.added_error <= _MAX_ADDED_ERROR * removal.energy:
            codes.index[removal.users] = removal.codes.index
            codes.values[removal.users] = removal.codes.values
            codes.values[codes.index == j] = 0  # of rows that hardly used it
            remaining[j] = False
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
    codes: SparseCodes
    added_error: float
    energy: float


def _code_without(
    j: int,
    rows: np.ndarray,
    atoms: np.ndarray,
    codes: SparseCodes,
    remaining: np.ndarray,
) -> _Removal:
    """Code the rows that use atom ``j`` again, with the other remaining atoms."""
    own = np.where(codes.index == j, codes.values, 0).sum(1)
    users = np.flatnonzero(own**2 > _USED_SHARE * np.sum(rows**2, axis=1))
    others = np.flatnonzero(remaining & (np.arange(len(atoms)) != j))
    rows, codes = rows[users], SparseCodes(*(part[users] for part in codes))
    new_codes = matching_pursuit(rows, atoms[others], codes.index.shape[1])
    new_codes = new_codes._replace(index=others[new_codes.index])
    added_error = np.sum((rows - new_codes.reconstruct(atoms)) ** 2) - np.sum(
        (rows - codes.reconstruct(atoms)) ** 2
    )
    return _Removal(
        users=users,
        codes=new_codes,
        added_error=float(added_error),
        energy=float(np.sum(own**2)),
    )
