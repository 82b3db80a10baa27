import numpy as np
from planted_atoms import unit

from toyfeat.discover.block_coding import Block, code_blocks
from toyfeat.discover.merging import (
    are_mixtures,
    co_use,
    propose_merges,
    without_mixtures,
)


def block(basis, *members):
    return Block(np.atleast_2d(basis), frozenset(members))


def axes(*numbers, dim=12):
    return np.eye(dim)[list(numbers)]


def test_uses_are_counted_against_the_rarer_block():
    examples = np.zeros((200, 1, 12), np.float32)
    examples[:150, 0, 0] = 1
    examples[100:, 0, 1] = 1
    codes = code_blocks(examples, [block(row, i) for i, row in enumerate(axes(0, 1))])
    np.testing.assert_allclose(co_use([codes]), [[1, 0.5], [0.5, 1]])
    # The least of the tables in which both are used at all.
    apart = np.concatenate([examples[:100], examples[150:]])
    other = code_blocks(apart, [block(row, i) for i, row in enumerate(axes(0, 1))])
    assert co_use([codes, other])[0, 1] == 0


def test_blocks_that_come_together_are_merged_with_all_in_their_span():
    rows = np.concatenate([axes(0, 1, 2, 3), unit(axes(0) + axes(1))])
    blocks = [block(row, i) for i, row in enumerate(rows)]
    together = np.eye(5)
    together[0, 1] = together[1, 0] = 0.5
    rest, merged = propose_merges(blocks, together, tried=set())
    assert [part.members for part in merged] == [{0, 1, 4}]
    assert [part.members for part in rest] == [{2}, {3}]
    assert propose_merges(blocks, together, {merged[0].members})[1] == []


def test_mixtures_lie_in_the_span_of_two_subspaces_of_more_members():
    first, second = block(axes(0, 1), 0, 1, 2), block(axes(2, 3), 3, 4, 5)
    mixed = unit(axes(0) + axes(2))
    plane = np.concatenate([mixed, unit(axes(1) - axes(3))])
    outside = unit(axes(0) + axes(2) + 0.3 * axes(4))
    blocks = [first, second, block(mixed, 6), block(plane, 7, 8), block(outside, 9)]
    assert are_mixtures(blocks).tolist() == [False, False, True, True, False]
    assert [part.members for part in without_mixtures(blocks)] == [
        {0, 1, 2},
        {3, 4, 5},
        {9},
    ]
    # As many members as either of both: which of the three is mixed cannot be told.
    three = [first, second, block(plane, 6, 7, 8)]
    assert not are_mixtures(three).any()


def test_two_subspaces_of_more_than_half_of_the_dimensions_have_no_mixtures():
    first, second = (block(axes(*pair, dim=6), *pair) for pair in [(0, 1), (2, 3)])
    mixed = block(unit(axes(0, dim=6) + axes(2, dim=6)), 4)
    assert not are_mixtures([first, second, mixed]).any()
    assert not are_mixtures([mixed]).any()
    assert are_mixtures([]).shape == (0,)
