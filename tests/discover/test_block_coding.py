import numpy as np
from planted_blocks import planted_blocks

from toyfeat.discover.block_coding import Block, block_parts, code_blocks, spectrum

SIZES = [2, 2, 3, 1, 1, 1]


def blocks_of(planted):
    return [
        Block(planted.rows[planted.group == group], frozenset([group]))
        for group in np.unique(planted.group)
    ]


def planted_codes(**options):
    planted = planted_blocks(SIZES, num=600, rate=0.2, **options)
    blocks = blocks_of(planted)
    return planted, blocks, code_blocks(planted.stacks.astype(np.float32), blocks)


def test_codes_have_the_blocks_that_are_active():
    planted, _, codes = planted_codes()
    # Of what has little in an example its use is a matter of the threshold.
    sizes = np.stack(
        [
            np.linalg.norm(planted.stacks @ basis.T, axis=(1, 2))
            for basis, _ in blocks_of(planted)
        ],
        axis=1,
    )
    clear = sizes > 0.3 * np.linalg.norm(planted.stacks, axis=(1, 2))[:, None]
    assert not (codes.uses & ~planted.active).any(1).mean() > 0.01
    assert codes.uses[clear & planted.active].mean() > 0.99
    assert codes.error < 0.005


def test_residuals_are_those_of_least_squares():
    planted, blocks, codes = planted_codes()
    for example in range(0, 600, 60):
        rows = [blocks[b].basis for b in codes.index[example] if b >= 0]
        stack = planted.stacks[example]
        expected = stack
        if rows:
            rows = np.concatenate(rows)
            expected = stack - stack @ np.linalg.pinv(rows) @ rows
        np.testing.assert_allclose(codes.residual[example], expected, atol=1e-4)


def test_parts_are_what_other_blocks_leave():
    planted, blocks, codes = planted_codes()
    alone = planted.active.sum(1) == 1
    for b, block in enumerate(blocks):
        parts = block_parts(block, b, codes)
        users = np.flatnonzero(codes.uses[:, b])
        assert parts.shape == (len(users), 4, 32)
        own = alone[users]
        np.testing.assert_allclose(parts[own], planted.stacks[users[own]], atol=2e-3)


def test_a_code_spans_no_more_than_half_of_the_dimensions():
    rng = np.random.default_rng(0)
    blocks = [Block(row[None], frozenset([i])) for i, row in enumerate(np.eye(8))]
    codes = code_blocks(rng.normal(size=(50, 3, 8)).astype(np.float32), blocks)
    assert np.all((codes.index >= 0).sum(1) == 4)
    for chosen in codes.index:
        assert len(set(chosen[chosen >= 0])) == 4


def test_equal_blocks_do_no_harm():
    _, blocks, codes = planted_codes()
    twice = code_blocks(codes.stacks, blocks + blocks)
    assert np.isfinite(twice.values).all()
    assert twice.error <= codes.error + 1e-6


def test_spectrum_is_that_of_the_second_moment():
    parts = np.random.default_rng(0).normal(size=(40, 3, 5)) * np.arange(1, 6)
    values, vectors = spectrum(parts)
    _, sizes, rows = np.linalg.svd(parts.reshape(-1, 5))
    np.testing.assert_allclose(values, sizes**2 / 120)
    np.testing.assert_allclose(np.abs(np.sum(vectors * rows, axis=1)), 1)
