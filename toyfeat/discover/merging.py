"""Propose subspaces: blocks that examples use together, less mixtures of others."""

from collections.abc import Sequence, Set
from itertools import combinations

import numpy as np

from toyfeat.discover.block_coding import Block, BlockCodes

# Fewest examples, of half of them, to judge a block on.  Not swept.
MIN_USES = 20

# Length in a block from which a direction is inside: |cos| of equal directions.
INSIDE = 0.95

# Share of the uses of the rarer of two blocks in which both are used, from which they
# are tried as one.  Planes had .4 and more, readers .34 and less.
_MIN_CO_USE = 0.2

# The same where one of them is a subspace already: blocks that are parts of a larger
# subspace come together nearly always.  Not swept.
_MIN_GROWTH_CO_USE = 0.5

# Length in the span of two subspaces from which a direction is a mixture of both: those
# of two heads' values had .999 and more, what is none .91 and less.
_MIXTURE_LENGTH = 0.99


def co_use(codes: Sequence[BlockCodes]) -> np.ndarray:
    """Measure how often blocks are used together.

    Args:
      codes: of several tables with the same blocks.

    Returns:
      ``[B, B]``, the share of the uses of the rarer of two blocks in which both are
      used: the least of all tables in which they are used often enough.
    """
    least = np.full((codes[0].uses.shape[1],) * 2, np.inf)
    for code in codes:
        uses = code.uses.astype(np.float32)
        both, rarer = uses.T @ uses, np.minimum.outer(uses.sum(0), uses.sum(0))
        share = np.where(rarer >= 2 * MIN_USES, both / np.maximum(rarer, 1), np.inf)
        least = np.minimum(least, share)
    return np.where(np.isfinite(least), least, 0)


def propose_merges(
    blocks: Sequence[Block], together: np.ndarray, tried: Set[frozenset[int]]
) -> tuple[list[Block], list[Block]]:
    """Merge blocks that come together, the surest first.

    Args:
      blocks: what may be merged.
      together: ``[B, B]``, as of :func:`co_use`.
      tried: members of merges that are not proposed again.

    Returns:
      The blocks that stay as they are, and those that are merged.
    """
    first, second = np.triu_indices(len(blocks), 1)
    often = np.flatnonzero(together[first, second] >= _MIN_CO_USE)
    order = often[np.argsort(-together[first[often], second[often]], kind="stable")]
    free = np.ones(len(blocks), bool)
    rows = np.concatenate([block.basis for block in blocks])
    starts = np.cumsum([0] + [len(block.basis) for block in blocks[:-1]])
    merged = []
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        size = len(blocks[a].basis) + len(blocks[b].basis)
        seldom = size > 2 and together[a, b] < _MIN_GROWTH_CO_USE
        # More than half of the dimensions are hardly a subspace.
        if seldom or 2 * size > rows.shape[1] or not (free[a] and free[b]):
            continue
        # The span of both, with all other blocks that lie in it.
        both = np.concatenate([blocks[a].basis, blocks[b].basis])
        basis = np.linalg.svd(both, full_matrices=False)[2]
        lengths = np.linalg.norm(rows @ basis.T, axis=1)
        inside = np.minimum.reduceat(lengths, starts) >= INSIDE
        inside[[a, b]] = True
        inside = np.flatnonzero(inside & free).tolist()
        members = frozenset().union(*(blocks[c].members for c in inside))
        if members not in tried:
            free[inside] = False
            merged.append(Block(basis, members))
    return [blocks[c] for c in np.flatnonzero(free).tolist()], merged


def are_mixtures(blocks: Sequence[Block]) -> np.ndarray:
    """Tell which blocks lie in the span of two subspaces of more members each.

    Two that span more than half of the dimensions are left aside: in so large a span a
    direction may lie by chance.

    Args:
      blocks: in any order.

    Returns:
      ``[B]`` bool.
    """
    spaces = [block for block in blocks if len(block.basis) > 1]
    mixture = np.zeros(len(blocks), bool)
    if len(spaces) < 2:
        return mixture
    rows = np.concatenate([block.basis for block in blocks])
    starts = np.cumsum([0] + [len(block.basis) for block in blocks[:-1]])
    members = np.array([len(block.members) for block in blocks])
    for first, second in combinations(spaces, 2):
        both = np.concatenate([first.basis, second.basis])
        fewer = members < min(len(first.members), len(second.members))
        if 2 * len(both) <= rows.shape[1] and fewer.any():
            span = np.linalg.svd(both, full_matrices=False)[2]
            lengths = np.linalg.norm(rows @ span.T, axis=1)
            inside = np.minimum.reduceat(lengths, starts) >= _MIXTURE_LENGTH
            mixture |= inside & fewer
    return mixture


def without_mixtures(blocks: Sequence[Block]) -> list[Block]:
    """Leave out the blocks that are mixtures of two subspaces."""
    mixture = are_mixtures(blocks)
    return [block for block, mixed in zip(blocks, mixture, strict=True) if not mixed]
