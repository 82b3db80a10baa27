"""Sparse codes of rows, the atoms that fit them best, and which atoms rows need.

Orthogonal matching pursuit, the method of optimal directions and backward elimination,
in float64 on the host.
"""

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from scipy import sparse

from toyfeat.types import ArrayLike

# Entries of the products of rows and atoms that are held at once, 8 MiB.  Memory only;
# a sixteenth of it took a third longer.
_MAX_PRODUCTS = 2**20

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
    index = np.zeros((len(rows), k), int)
    values = np.zeros((len(rows), k))
    gram = atoms @ atoms.T + _RIDGE * np.eye(len(atoms))
    batch_size = max(1, _MAX_PRODUCTS // max(len(atoms), k * atoms.shape[1]))
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        index[batch], values[batch] = _pursue(rows[batch], atoms, gram, k)
    return SparseCodes(index, values)


def _pursue(
    rows: np.ndarray, atoms: np.ndarray, gram: np.ndarray, k: int
) -> SparseCodes:
    """Run the pursuit on one batch of rows; ``gram`` is that of the atoms."""
    index = np.zeros((len(rows), k), int)
    basis = np.zeros((len(rows), k, rows.shape[1]))
    residual = rows.copy()
    for i in range(k):
        # The atom that is closest to each residual and not chosen yet.
        size = np.abs(residual @ atoms.T)
        np.put_along_axis(size, index[:, :i], -1.0, axis=1)
        index[:, i] = size.argmax(1)
        # Its part that is orthogonal to the chosen ones (Gram and Schmidt); nothing if
        # it is one of them.
        part = atoms[index[:, i]]
        part = part - _project(part, basis[:, :i])
        square = np.sum(part**2, axis=1, keepdims=True)
        part = np.where(square > _RIDGE, part / np.sqrt(np.maximum(square, _RIDGE)), 0)
        basis[:, i] = part
        residual = residual - np.sum(residual * part, axis=1, keepdims=True) * part

    # Solve the normal equations of the chosen atoms, row by row.
    chosen_gram = gram[index[:, :, None], index[:, None, :]]
    products = np.matmul(atoms[index], rows[:, :, None])
    return SparseCodes(index, np.linalg.solve(chosen_gram, products)[:, :, 0])


def _project(vectors: np.ndarray, bases: np.ndarray) -> np.ndarray:
    """Project vectors ``[B, D]`` on the spans of orthonormal bases ``[B, i, D]``."""
    inside = np.matmul(bases, vectors[:, :, None])
    return np.matmul(inside.transpose(0, 2, 1), bases)[:, 0]


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
