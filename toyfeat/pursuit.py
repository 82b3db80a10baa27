"""Directions that rows are sparse combinations of, made exact from near ones."""

from collections.abc import Sequence

import numpy as np

from toyfeat.types import ArrayLike

_CHUNK = 1000
_RIDGE = 1e-9  # of a unit atom's square: two atoms may become one
_UNUSED = 1e-9  # of the largest energy, below which an atom stays as it was
_ROUNDS = 8
_LEFT = 0.005  # of a table's sum of squares, with which it is explained
_MOST = 32  # directions per row; a pursuit takes the cube of it
_FLAT = 1e-6  # of the largest eigenvalue, below which a dimension is not there


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


def sharpened(
    directions: np.ndarray, tables: Sequence[ArrayLike], *, cosine: float
) -> np.ndarray:
    """Directions made exact with the table of rows that is sparsest in them.

    The table is the one that needs the fewest directions per row, 1, 2, 3, 4, 6, ...,
    to leave at most half a percent after eight :func:`optimal_directions`; the first of
    them if several do.  More than half as many as a table has dimensions are not sparse
    (one is, if there is one), and more than 32 are not tried.

    Args:
      directions: ``[R, D]`` unit rows.
      tables: rows ``[N, D]`` each.
      cosine: a direction that would move further stays.

    Returns:
      ``[R, D]`` unit rows; as they were if no table is sparse in them.

    Example:
      >>> import numpy as np
      >>> near = np.array([[0.98, 0.199], [0.0, 1.0]])
      >>> sharpened(near, [np.eye(2)], cosine=0.95).round(3)
      array([[1., 0.],
             [0., 1.]])
    """
    most = [_most(np.asarray(rows, np.float64)) for rows in tables]
    k = 1
    while k <= min(len(directions), max(most, default=0)):
        for rows, sparse in zip(tables, most, strict=True):
            if k > sparse:
                continue
            moved, left = directions, 1.0
            for _ in range(_ROUNDS):
                moved, left = optimal_directions(rows, moved, k)
            if left <= _LEFT:
                near = np.abs(np.sum(moved * directions, axis=1)) >= cosine
                return np.where(near[:, None], moved, directions)
        k += max(1, k // 2)
    return directions


def _most(rows: np.ndarray) -> int:
    """Directions per row that are still sparse, and tried."""
    rank = int(np.linalg.matrix_rank(rows.T @ rows, hermitian=True, rtol=_FLAT))
    return min(rank, max(1, rank // 2), _MOST)
