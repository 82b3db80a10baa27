"""Sparse codes of examples with blocks: directions, planes and subspaces."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Share of an example's sum of squares that its code may leave, as in refinement.
_MAX_ERROR = 0.005

# Most dimensions of a code, and as a share of those of the rows, as in refinement.
_MAX_CODES = 32
_MAX_CODE_SHARE = 0.5

# Share of an example's sum of squares from which it uses a block: a tenth of the
# length, as in refinement.
_USED_SHARE = 1e-2

# Ridge of the fit of codes, for blocks that overlap, and the length from which a row
# adds to the span of others: well above rounding in float32.
_RIDGE = 1e-4
_MIN_NEW = 1e-3

# Entries of scores and of spans that are held at once, 4 MiB.  Memory only.
_MAX_ENTRIES = 2**20


class Block(NamedTuple):
    """A direction or a subspace.

    Attributes:
      basis: ``[m, R]``, orthonormal rows.
      members: directions that it was made of.
    """

    basis: np.ndarray
    members: frozenset[int]


class BlockCodes(NamedTuple):
    """Codes of examples, all readouts of one with the same blocks.

    Attributes:
      stacks: ``[n, K, R]``, what is coded.
      index: ``[n, s]`` int, blocks of each example, -1 for none.
      values: ``[n, K, s, m]``, coefficients of the rows of each.
      residual: ``[n, K, R]``.
      uses: ``[n, B]`` bool, which examples use which block.
    """

    stacks: np.ndarray
    index: np.ndarray
    values: np.ndarray
    residual: np.ndarray
    uses: np.ndarray

    @property
    def error(self) -> float:
        """Share of the sum of squares that is left."""
        return float(np.sum(self.residual**2) / np.sum(self.stacks**2))


def code_blocks(stacks: np.ndarray, blocks: Sequence[Block]) -> BlockCodes:
    """Code examples by block orthogonal matching pursuit.

    The block with the largest part of all readouts of an example is added and all
    coefficients are fitted again, until the code leaves half a percent or spans half of
    the dimensions.

    Args:
      stacks: ``[n, K, R]`` float32, the readouts of each example.
      blocks: orthonormal rows each.

    Returns:
      :class:`BlockCodes`.

    References:
      Eldar, Kuppinger and Bölcskei (2010), "Block-sparse signals: uncertainty relations
      and efficient recovery"; Tropp, Gilbert and Strauss (2006), "Algorithms for
      simultaneous sparse approximation", for readouts that share a code.
    """
    size = max(len(block.basis) for block in blocks)
    bases = np.stack(
        [np.pad(b.basis, ((0, size - len(b.basis)), (0, 0))) for b in blocks]
    )
    entries = size * max(stacks.shape[1] * len(blocks), _MAX_CODES * stacks.shape[2])
    bases = bases.astype(np.float32)
    batch_size = max(1, _MAX_ENTRIES // entries)
    batches = [
        _pursue(stacks[start : start + batch_size], bases)
        for start in range(0, len(stacks), batch_size)
    ]
    index, values, residual = (
        np.concatenate(part) for part in zip(*batches, strict=True)
    )

    # Examples that use a block: the length of its part of the code.
    uses = np.zeros((len(stacks), len(blocks)), bool)
    square = np.sum(values**2, axis=(1, 3))
    floor = _USED_SHARE * np.sum(stacks**2, axis=(1, 2))
    n, s = np.nonzero((index >= 0) & (square > floor[:, None]))
    uses[n, index[n, s]] = True
    return BlockCodes(stacks, index, values, residual, uses)


def _pursue(
    stacks: np.ndarray, bases: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run the pursuit on a batch; return index, values and residuals of the codes."""
    num, k, dim = stacks.shape
    num_blocks, size, _ = bases.shape
    most = min(_MAX_CODES, max(1, int(_MAX_CODE_SHARE * dim)))
    dims = np.any(bases, axis=2).sum(1)
    steps = min(num_blocks, most)
    index, used = np.full((num, steps), -1), np.zeros(num, int)
    span, residual = np.zeros((num, steps * size, dim), np.float32), stacks.copy()
    floor = _MAX_ERROR * np.sum(stacks**2, axis=(1, 2))
    for step in range(steps):
        left = np.sum(residual**2, axis=(1, 2)) > floor
        active = np.flatnonzero(left & (used < most))
        if not len(active):
            break
        # The block with the largest part of all readouts of the example.
        scores = (residual[active] @ bases.reshape(-1, dim).T) ** 2
        scores = scores.reshape(-1, k, num_blocks, size).sum((1, 3))
        np.put_along_axis(scores, index[active, :step], -1.0, axis=1)
        index[active, step] = chosen = scores.argmax(1)
        used[active] += dims[chosen]

        # What its rows add to the span of the code, taken out of the residual.
        for j in range(size):
            place = step * size + j
            old, new = span[active, :place], bases[chosen, j][:, None]
            for _ in range(2):  # twice is enough for orthogonality
                new = new - new @ old.transpose(0, 2, 1) @ old
            length = np.linalg.norm(new, axis=2, keepdims=True)
            new = np.where(length > _MIN_NEW, new / np.maximum(length, _MIN_NEW), 0)
            span[active, place] = new[:, 0]
            residual[active] -= residual[active] @ new.transpose(0, 2, 1) @ new

    # Coefficients of all blocks of an example, by the normal equations.
    values = np.zeros((num, k, steps, size), np.float32)
    longest = int((index >= 0).sum(1).max(initial=0))
    rows = np.where((index >= 0)[..., None, None], bases[index], 0)[:, :longest]
    rows = rows.reshape(num, longest * size, dim)
    ridge = _RIDGE * np.eye(longest * size, dtype=rows.dtype)
    gram = rows @ rows.transpose(0, 2, 1) + ridge
    code = np.linalg.solve(gram, rows @ stacks.transpose(0, 2, 1)).transpose(0, 2, 1)
    values[:, :, :longest] = code.reshape(num, k, longest, size)
    return index, values, residual


def block_parts(block: Block, b: int, codes: BlockCodes) -> np.ndarray:
    """Return what the other blocks leave of examples that use block ``b``.

    Args:
      block: the block.
      b: its place among the blocks that were coded with.
      codes: of these blocks.

    Returns:
      ``[u, K, R]`` float64: its own part and the residual.
    """
    examples = np.flatnonzero(codes.uses[:, b])
    step = np.argmax(codes.index[examples] == b, axis=1)
    values = codes.values[examples, :, step, : len(block.basis)]
    return values.astype(np.float64) @ block.basis + codes.residual[examples]


def spectrum(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues of the second moment, the largest first, and eigenvectors.

    Args:
      parts: ``[..., R]``.

    Returns:
      ``[R]`` eigenvalues, and ``[R, R]`` with an eigenvector per row.
    """
    rows = parts.reshape(-1, parts.shape[-1])
    eigenvalues, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    return eigenvalues[::-1], vectors.T[::-1]
