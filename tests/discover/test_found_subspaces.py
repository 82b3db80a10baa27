import numpy as np
import pytest
from planted_atoms import unit
from planted_blocks import planted_blocks

from toyfeat.discover.subspaces import find_subspaces, subspace_supports
from toyfeat.metrics import match_mechanisms

SINGLE = [1] * 14


def score(planted, result):
    """Match subspaces and the directions that are left to the planted mechanisms."""
    left = planted.directions[~result.inside]
    rows = np.concatenate([result.rows, left])
    group = np.append(result.group, len(result.rows) + np.arange(len(left)))
    return match_mechanisms(rows, planted.rows, group=group, truth_group=planted.group)


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("extra", [0, 1])
def test_planes_of_gated_units_among_readers(seed, extra):
    planted = planted_blocks([2] * 6 + SINGLE, seed=seed, extra=extra)
    result = find_subspaces(planted.directions, [planted.stacks])
    match = score(planted, result)
    assert match.similarity.min() > 0.999
    assert (match.precision, match.num_found) == (1.0, 20)
    assert result.inside.tolist() == (planted.owner < 6).tolist()


def test_subspaces_of_more_dimensions_grow():
    planted = planted_blocks([3, 4, 2, 3, *SINGLE], dim=40, extra=2)
    match = score(planted, find_subspaces(planted.directions, [planted.stacks]))
    assert match.similarity.min() > 0.99
    assert match.precision == 1.0


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.06, 0.2])
def test_readers_are_no_planes_though_they_come_together(seed, rate):
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    for together in [], pairs:
        planted = planted_blocks([1] * 24, seed=seed, rate=rate, together=together)
        result = find_subspaces(planted.directions, [planted.stacks])
        assert result.rows.shape == (0, 32)
        assert not result.inside.any()


def test_readers_that_a_linear_readout_blurs_are_no_plane_where_another_is_sparse():
    dense = planted_blocks([1] * 8, rate=1.0, linear=True)
    sparse = planted_blocks([1] * 8, readouts=1)
    for tables in [dense.stacks, sparse.stacks], [sparse.stacks, dense.stacks]:
        result = find_subspaces(dense.directions, tables)
        assert len(result.rows) == 0


def test_subspaces_that_are_read_linearly():
    planted = planted_blocks([2, 2, *SINGLE], rate=0.3, linear=True, num=4000)
    match = score(planted, find_subspaces(planted.directions, [planted.stacks]))
    assert match.similarity.min() > 0.99
    assert match.precision == 1.0


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(2))
def test_mixtures_of_two_subspaces_are_no_mechanisms(seed):
    sizes = {"rate": 0.3, "linear": True, "num": 4000}
    planted = planted_blocks([2, 2, *SINGLE], seed=seed, **sizes)
    rng = np.random.default_rng(seed)
    # Six directions of each plane, and what dictionaries share of examples in which
    # both are active.
    circle = unit(rng.normal(size=(4, 6, 2)))
    first, second, *parts = circle @ planted.rows[[[0, 1], [2, 3]] * 2]
    turns = np.deg2rad(rng.uniform(35, 55, (6, 1)))
    mixed = unit(np.cos(turns) * parts[0] + np.sin(turns) * parts[1])
    directions = np.concatenate([first, second, planted.rows[4:], mixed])
    result = find_subspaces(directions, [planted.stacks])
    match = score(planted._replace(directions=directions), result)
    assert match.similarity.min() > 0.99
    assert (match.precision, match.num_found) == (1.0, 16)
    assert result.inside.tolist() == [True] * 12 + [False] * 14 + [True] * 6


def test_a_rotation_of_rows_rotates_subspaces():
    planted = planted_blocks([2] * 4 + SINGLE)
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(32, 32)))[0]
    plain = find_subspaces(planted.directions, [planted.stacks])
    turned = find_subspaces(planted.directions @ turn, [planted.stacks @ turn])
    assert plain.group.tolist() == turned.group.tolist()
    assert plain.inside.tolist() == turned.inside.tolist()
    for group in range(4):
        basis, other = (part.rows[part.group == group] for part in (plain, turned))
        np.testing.assert_allclose(
            other.T @ other, turn.T @ basis.T @ basis @ turn, atol=1e-4
        )


def test_rows_are_orthonormal_and_the_most_used_come_first():
    planted = planted_blocks([2] * 4 + SINGLE)
    result = find_subspaces(planted.directions, [planted.stacks])
    for group in range(4):
        basis = result.rows[result.group == group]
        np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-9)
    assert np.all(np.diff(result.uses) <= 0)
    some = planted.active.any(1).mean()
    rates = np.sort(planted.active[:, :4].mean(0))[::-1] / some
    np.testing.assert_allclose(result.uses[::2], rates, atol=0.02)


def test_one_readout_per_example_tells_nothing():
    planted = planted_blocks([2] * 4 + SINGLE, readouts=1)
    assert len(find_subspaces(planted.directions, [planted.stacks]).rows) == 0


def test_directions_that_do_not_explain_the_gradients_are_no_subspaces():
    planted = planted_blocks([2] * 4 + SINGLE)
    noise = np.random.default_rng(3).normal(size=planted.stacks.shape)
    assert len(find_subspaces(planted.directions, [noise]).rows) == 0


def test_little_to_look_at():
    planted = planted_blocks([2, 2])
    for directions, tables in [
        (planted.directions, []),
        (planted.directions, [np.zeros((5, 4, 32))]),
        (planted.directions, [planted.stacks[:3]]),
        (planted.directions[:1], [planted.stacks]),
        (planted.directions[:0], [planted.stacks]),
    ]:
        result = find_subspaces(directions, tables)
        assert result.rows.shape == (0, 32)
        assert result.inside.tolist() == [False] * len(directions)
        assert result.group.shape == result.uses.shape == (0,)


def test_arguments_are_not_written_to():
    planted = planted_blocks([2, 2, 1, 1])
    before = planted.directions.copy(), planted.stacks.copy()
    find_subspaces(planted.directions, [planted.stacks])
    np.testing.assert_array_equal(planted.directions, before[0])
    np.testing.assert_array_equal(planted.stacks, before[1])


@pytest.mark.parametrize("shape", [(5, 32), (5, 4, 31)])
def test_shapes_are_checked(shape):
    with pytest.raises(ValueError, match=r"find_subspaces: wanted .* \[N, K, R\], got"):
        find_subspaces(np.eye(32), [np.zeros(shape)])


def test_supports_count_the_dictionaries_whose_atoms_span():
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.normal(size=(9, 5)))[0].T
    group = np.array([0, 0, 1, 1, 1])
    spread = rows[0] * 0.8 + rows[1] * 0.6
    near = rows[0] * 0.99 + rows[1] * 0.99**0.5 * 0.1
    dictionaries = [
        rows,
        np.stack([rows[0], spread, rows[2], rows[3]]),
        np.stack([rows[0], near / np.linalg.norm(near), *rows[2:]]),
        rows[2:3],
    ]
    supports = subspace_supports(dictionaries, rows, group)
    assert supports.tolist() == [2, 2, 2, 2, 2]
    assert subspace_supports(dictionaries, rows[:0], group[:0]).shape == (0,)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    planted = planted_blocks([2, 2, *SINGLE])
    plain = find_subspaces(planted.directions, [planted.stacks])
    scaled = find_subspaces(planted.directions, [planted.stacks * scale])
    np.testing.assert_allclose(scaled.rows, plain.rows, atol=1e-5)
    assert len(plain.rows) == 4
