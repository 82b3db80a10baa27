r"""Find mechanisms that read a plane or a subspace, of which no direction recurs.

The gradient of a gated unit :math:`\phi(r \cdot a)\, \psi(g \cdot a)` is a vector in
the plane of :math:`r` and :math:`g`, at an angle that varies with the example.  Sparse
codes describe it by several directions of that plane, which rows use together.  Two
readers can come together as well.  They are told from a plane by several readouts of
the same example: to readouts :math:`u`, a unit contributes :math:`(w \cdot u)\, d`, one
direction; two readers contribute :math:`(w_1 \cdot u)\, c_1 r_1 + (w_2 \cdot u)\, c_2
r_2`, whose coefficients are those of two writers.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toyfeat.discover.block_coding import (
    Block,
    BlockCodes,
    block_parts,
    code_blocks,
    spectrum,
)
from toyfeat.discover.merging import (
    INSIDE,
    MIN_USES,
    are_mixtures,
    co_use,
    propose_merges,
    without_mixtures,
)
from toyfeat.discover.separation import is_whole
from toyfeat.types import ArrayLike

# Error of a table from which blocks do not explain it, and it says nothing.  Tables
# that tell of planes had .08 and less, a readout that blurs readers .29.
_MAX_TABLE_ERROR = 0.1

# Eigenvalue below which parts of a block are noise, as a share of the largest.
_NOISE_EIGENVALUE = 1e-2

# Fits of all subspaces together at the end.  Not swept.
_FITS = 2

# Rounds of proposals, rounds without success after which the search ends, and attempts
# at each proposal.  Not swept.
_MAX_ROUNDS = 8
_MAX_IDLE_ROUNDS = 2
_MAX_ATTEMPTS = 2


class Subspaces(NamedTuple):
    """Subspaces of :func:`find_subspaces`.

    Attributes:
      rows: ``[S, R]``, orthonormal rows of every subspace.
      group: ``[S]`` int, the subspace of each row, 0, 1, ..., the most used first.
      uses: ``[S]``, the share of the examples that use the subspace of each row.
      inside: ``[M]`` bool, the directions that lie inside of a subspace, or in the span
        of two.
    """

    rows: np.ndarray
    group: np.ndarray
    uses: np.ndarray
    inside: np.ndarray


def find_subspaces(
    directions: ArrayLike, tables: Sequence[ArrayLike], *, max_examples: int = 4000
) -> Subspaces:
    r"""Merge directions that are parts of one mechanism into planes and subspaces.

    Examples are coded sparsely with blocks, at first single directions, by block
    orthogonal matching pursuit; the readouts of an example share the blocks.  Blocks
    that examples use together are merged, with the directions in their span, fitted to
    what the other blocks leave of half of the examples, and kept if nothing separates
    them in the other half (:func:`toyfeat.discover.separation.is_whole`); and so on, so
    that subspaces grow.  Readers that always come together and that no table tells
    apart, as linear ones, are a plane as well.  Nothing is found without a table of
    ``K >= 2`` that the directions explain, up to a tenth of its sum of squares.

    Args:
      directions: ``[M, R]`` unit rows, near readers or inside of subspaces, in
        coordinates in which the gradients are about white.
      tables: gradients ``[N, K, R]`` each, ``K`` readouts per example; zeros are left
        out.
      max_examples: examples of each table that are looked at.

    Returns:
      :class:`Subspaces`; a rotation of all rows rotates the subspaces.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> import numpy as np
      >>> angle, size = np.random.default_rng(0).normal(size=(2, 500, 1))
      >>> unit = np.hstack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle])
      >>> stacks = unit[:, None] * np.array([1.0, -2.0])[:, None]
      >>> find_subspaces(np.eye(4)[:2], [stacks]).rows.shape
      (2, 4)

    References:
      Zelnik-Manor, Rosenblum and Eldar (2012), "Dictionary optimization for
      block-sparse representations", whose sparse agglomerative clustering merges atoms
      by their use as well, but takes every block that saves codes.
    """
    directions = np.asarray(directions, np.float64)
    stacks = [_examples(table, directions, max_examples) for table in tables]
    stacks = [table for table in stacks if len(table)]
    singles = [Block(row[None], frozenset([i])) for i, row in enumerate(directions)]
    if len(singles) < 2 or not stacks:
        return _collect([], np.zeros(0), directions)

    attempts: Counter[frozenset[int]] = Counter()
    idle = 0
    blocks, codes = singles, _code_tables(stacks, singles)
    for _ in range(_MAX_ROUNDS):
        if all(code.stacks.shape[1] < 2 for code in codes):  # nothing could be told
            break
        tried = {key for key, num in attempts.items() if num >= _MAX_ATTEMPTS}
        rest, proposals = propose_merges(blocks, co_use(codes), tried)
        if not proposals:
            break
        kept, failed = _try(stacks, blocks, rest, proposals)
        attempts.update(failed)
        idle = 0 if kept else idle + 1
        if idle == _MAX_IDLE_ROUNDS:
            break
        if idle:  # other proposals, of the same blocks
            continue
        # Take the others apart again; they get another chance, among other blocks.
        parts = [part for part in blocks if any(part.members <= key for key in failed)]
        blocks = without_mixtures(rest + kept + parts)
        codes = _code_tables(stacks, blocks)
    judged = _judge_again(blocks, singles, codes)
    if len(judged) > len(blocks):
        codes = _code_tables(stacks, judged)
    return _collect(*_polish(judged, codes), directions)


def subspace_supports(
    dictionaries: Sequence[ArrayLike], rows: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """Count the dictionaries with atoms that span a subspace.

    Args:
      dictionaries: unit rows ``[M_i, R]`` each.
      rows: ``[S, R]``, orthonormal rows of every subspace.
      group: ``[S]`` int, as in :class:`Subspaces`.

    Returns:
      ``[S]`` int, for the subspace of each row.

    Example:
      >>> import numpy as np
      >>> rows, group = np.eye(3)[:2], np.array([0, 0])
      >>> subspace_supports([np.eye(3), np.eye(3)[1:]], rows, group)
      array([1, 1])
    """
    supports = np.zeros(len(rows), int)
    for member in np.unique(group):
        basis = rows[group == member]
        for atoms in dictionaries:
            parts = np.asarray(atoms, np.float64) @ basis.T
            parts = parts[np.linalg.norm(parts, axis=1) >= INSIDE]
            # Two atoms of the same direction have less as their smallest.
            sizes = np.linalg.svd(parts, compute_uv=False)
            spans = len(parts) >= len(basis) and sizes[-1] > (1 - INSIDE) ** 0.5
            supports[group == member] += spans
    return supports


def _examples(table: ArrayLike, directions: np.ndarray, num: int) -> np.ndarray:
    """Take at most ``num`` evenly spaced examples that are not zero."""
    table = np.asarray(table)
    if table.ndim != 3 or directions.ndim != 2 or table.shape[2] != directions.shape[1]:
        raise ValueError(
            "find_subspaces: wanted directions [M, R] and tables [N, K, R], got shapes "
            f"{directions.shape} and {table.shape}"
        )
    nonzero = np.flatnonzero(np.any(table, axis=(1, 2)))
    place = np.linspace(0, len(nonzero) - 1, min(len(nonzero), num)).astype(int)
    examples = table[nonzero[place]]
    # In units of the largest entry: squares of tiny or huge ones have no float32.
    return (examples / np.abs(examples).max(initial=1e-300)).astype(np.float32)


def _collect(
    blocks: Sequence[Block], uses: np.ndarray, directions: np.ndarray
) -> Subspaces:
    """Collect the blocks of several dimensions, the most used first."""
    order = np.argsort(-uses, kind="stable").tolist()
    order = [b for b in order if len(blocks[b].basis) > 1]
    bases = [blocks[b].basis for b in order]
    sizes = [len(basis) for basis in bases]
    singles = [Block(row[None], frozenset([i])) for i, row in enumerate(directions)]
    inside = are_mixtures([*singles, *(blocks[b] for b in order)])[: len(directions)]
    for basis in bases:
        inside |= np.linalg.norm(directions @ basis.T, axis=1) >= INSIDE
    return Subspaces(
        rows=np.concatenate([np.zeros((0, directions.shape[1])), *bases]),
        group=np.repeat(np.arange(len(order)), sizes),
        uses=np.repeat(uses[order], sizes),
        inside=inside,
    )


def _judge_again(
    blocks: Sequence[Block], singles: Sequence[Block], codes: Sequence[BlockCodes]
) -> list[Block]:
    """Take subspaces apart that are separated, now that all others are known."""
    judged = []
    for b, block in enumerate(blocks):
        parts = _held_out(block, b, block.basis, codes)
        if len(block.basis) == 1 or is_whole(parts):
            judged.append(block)
        else:
            judged += [singles[i] for i in sorted(block.members)]
    return judged


def _try(
    stacks: Sequence[np.ndarray],
    blocks: Sequence[Block],
    rest: list[Block],
    proposals: list[Block],
) -> tuple[list[Block], set[frozenset[int]]]:
    """Fit all proposals at once; return those that are whole, and others' members."""
    # Mixtures would take their uses from what they are mixtures of.
    trial = without_mixtures([*rest, *proposals])
    proposed = {block.members for block in proposals}
    failed = proposed - {block.members for block in trial}
    codes = _code_tables(stacks, trial)
    kept = []
    for b, block in enumerate(trial):
        if block.members not in proposed:
            continue
        fit = _fit(block, b, codes)
        pieces = [part.basis for part in blocks if part.members <= fit.members]
        pieces = np.concatenate(sorted(pieces, key=len, reverse=True))
        parts = _held_out(block, b, fit.basis, codes)
        if len(fit.basis) > 1 and is_whole(parts, pieces @ fit.basis.T):
            kept.append(fit)
        else:
            failed.add(fit.members)
    return kept, failed


def _polish(
    blocks: list[Block], codes: Sequence[BlockCodes]
) -> tuple[list[Block], np.ndarray]:
    """Fit subspaces again to the best table; return blocks and the share of uses."""
    spaces = [b for b, block in enumerate(blocks) if len(block.basis) > 1]
    if not spaces or not codes:
        return blocks, np.zeros(len(blocks))
    code = codes[0]
    for _ in range(_FITS):
        for b in spaces:
            parts = block_parts(blocks[b], b, code)
            if len(parts) >= MIN_USES:
                basis = spectrum(parts)[1][: len(blocks[b].basis)]
                blocks[b] = blocks[b]._replace(basis=basis)
        code = code_blocks(code.stacks, blocks)
    return blocks, code.uses.mean(0)


def _code_tables(
    stacks: Sequence[np.ndarray], blocks: Sequence[Block]
) -> list[BlockCodes]:
    """Code the tables; return codes of those that blocks explain, the best first."""
    codes = [code_blocks(table, blocks) for table in stacks]
    explained = [code for code in codes if code.error <= _MAX_TABLE_ERROR]
    return sorted(explained, key=lambda code: code.error)


def _fit(block: Block, b: int, codes: Sequence[BlockCodes]) -> Block:
    """Fit a block to what the others leave, and choose its dimension by the spectrum.

    On every second example of the table with most readouts, which are white: those of
    half the squared norm weigh the dimensions of a subspace.
    """
    code = max(codes, key=lambda code: code.stacks.shape[1], default=None)
    parts = block_parts(block, b, code)[::2] if code else np.zeros(0)
    if len(parts) < MIN_USES:
        return block
    eigenvalues, vectors = spectrum(parts)
    # The largest gap of eigenvalues, down to noise.
    noise = _NOISE_EIGENVALUE * eigenvalues[0] + np.finfo(float).tiny
    level = np.log(eigenvalues.clip(0) + noise)
    size = 1 + int(np.argmax((level[:-1] - level[1:])[: len(block.basis)]))
    return block._replace(basis=vectors[:size])


def _held_out(
    block: Block, b: int, basis: np.ndarray, codes: Sequence[BlockCodes]
) -> list[np.ndarray]:
    """Return parts in a basis, of the other half of the examples of every table."""
    parts = [block_parts(block, b, code)[1::2] @ basis.T for code in codes]
    return [part for part in parts if len(part) >= MIN_USES]
