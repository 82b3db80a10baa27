import numpy as np
import pytest

from toyfeat.pursuit import matching_pursuit, needed, optimal_directions, sharpened


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def planted(seed=0, *, dim=32, num=40, active=2, rows=3000):
    """Unit atoms and rows that are combinations of ``active`` of them."""
    rng = np.random.default_rng(seed)
    atoms = unit(rng.normal(size=(num, dim)))
    chosen = rng.permuted(np.tile(np.arange(num), (rows, 1)), axis=1)[:, :active]
    codes = np.zeros((rows, num))
    values = rng.choice([-1, 1], (rows, active)) * rng.uniform(0.5, 2, (rows, active))
    np.put_along_axis(codes, chosen, values, axis=1)
    return atoms, codes, codes @ atoms


def turned(atoms, angle, seed=1):
    """Every atom by the same angle, in a direction of its own."""
    beside = np.random.default_rng(seed).normal(size=atoms.shape)
    beside = unit(beside - np.sum(beside * atoms, axis=1, keepdims=True) * atoms)
    return np.cos(angle) * atoms + np.sin(angle) * beside


def by_loops(row, atoms, k):
    """One row, with a least-squares fit at every step."""
    chosen, residual, fit = [], row, np.zeros(0)
    for _ in range(k):
        products = np.abs(atoms @ residual)
        products[chosen] = -1
        chosen.append(int(np.argmax(products)))
        fit = np.linalg.lstsq(atoms[chosen].T, row, rcond=None)[0]
        residual = row - fit @ atoms[chosen]
    codes = np.zeros(len(atoms))
    codes[chosen] = fit
    return codes


@pytest.mark.parametrize(
    ("num", "k"), [(3, 1), (3, 2), (6, 1), (6, 4), (15, 1), (15, 2), (15, 4)]
)
def test_codes_are_those_of_loops(num, k):
    rng = np.random.default_rng(num)
    atoms, rows = unit(rng.normal(size=(num, 6))), rng.normal(size=(1200, 6))
    codes = matching_pursuit(rows, atoms, k)
    oracle = np.stack([by_loops(row, atoms, k) for row in rows])
    np.testing.assert_allclose(codes, oracle, rtol=1e-5, atol=1e-6)
    assert np.all(np.sum(codes != 0, axis=1) <= k)


def test_codes_of_orthonormal_atoms_are_the_largest_projections():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 5))
    codes = matching_pursuit(rows, np.eye(5), 2)
    least = np.sort(np.abs(rows), axis=1)[:, -2:-1]
    np.testing.assert_allclose(codes, np.where(np.abs(rows) >= least, rows, 0))


def test_rows_of_nothing_have_no_codes():
    assert not matching_pursuit(np.zeros((3, 4)), np.eye(4), 3).any()
    assert matching_pursuit(np.zeros((0, 4)), np.eye(4), 3).shape == (0, 4)


def test_an_atom_that_is_there_twice_does_no_harm():
    codes = matching_pursuit(np.array([[2.0, 1.0]]), np.eye(2)[[0, 0, 1]], 3)
    assert np.isfinite(codes).all()
    np.testing.assert_allclose(codes @ np.eye(2)[[0, 0, 1]], [[2.0, 1.0]], atol=1e-6)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_codes_are_of_some_atoms(k):
    with pytest.raises(ValueError, match=rf"k in 1 \.\. 3, .* got {k}"):
        matching_pursuit(np.ones((2, 5)), np.eye(5)[:3], k)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (2, 3)), ((2, 3), (3,))])
def test_rows_and_atoms_have_one_width(shapes):
    with pytest.raises(ValueError, match=r"rows \[N, D\] and atoms \[M, D\], got"):
        matching_pursuit(*map(np.ones, shapes), 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num", "active"), [(20, 2), (40, 2), (30, 3)])
def test_near_atoms_become_those_that_rows_are_made_of(seed, num, active):
    atoms, _, rows = planted(seed, num=num, active=active)
    near = turned(atoms, 0.2)
    moved, left = near, 1.0
    for _ in range(30):
        moved, left = optimal_directions(rows, moved, active)
    assert np.abs(np.sum(moved * atoms, axis=1)).min() > 0.9999
    assert left < 1e-3
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, rtol=1e-9)


def test_true_atoms_stay_and_leave_nothing():
    atoms, _, rows = planted()
    moved, left = optimal_directions(rows, atoms, 2)
    np.testing.assert_allclose(np.abs(np.sum(moved * atoms, axis=1)), 1, atol=1e-6)
    assert left < 1e-6


def test_what_is_left_is_of_the_best_fit_to_the_codes():
    _, _, rows = planted()
    near = unit(np.random.default_rng(3).normal(size=(5, 32)))
    moved, left = optimal_directions(rows, near, 2)
    codes = matching_pursuit(rows, near, 2)
    fit, residual, *_ = np.linalg.lstsq(codes, rows, rcond=None)
    assert left == pytest.approx(residual.sum() / np.sum(rows**2), rel=1e-6)
    np.testing.assert_allclose(moved, unit(fit), atol=1e-6)


def test_atoms_that_no_row_uses_stay():
    rows = np.array([[1.0, 0.1, 0.0], [2.0, 0.2, 0.0]])
    moved, left = optimal_directions(rows, np.eye(3), 1)
    np.testing.assert_allclose(moved[0], unit(rows[0]), atol=1e-9)
    np.testing.assert_array_equal(moved[1:], np.eye(3)[1:])
    assert left < 1e-12
    same, left = optimal_directions(np.zeros((2, 3)), np.eye(3), 1)
    np.testing.assert_array_equal(same, np.eye(3))
    assert left == 0


def test_what_is_given_is_not_written_to():
    atoms, _, rows = planted()
    near = turned(atoms, 0.2)
    before = near.copy()
    optimal_directions(rows, near, 2)
    sharpened(near, [rows], cosine=0.9)
    np.testing.assert_array_equal(near, before)


def dense(atoms):
    return np.random.default_rng(5).normal(size=(800, len(atoms))) @ atoms


def with_sums(atoms, num=10):
    """Unit sums of neighbours after the atoms themselves."""
    return np.concatenate([atoms, unit(atoms[:num] + atoms[1 : num + 1])])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("active", [2, 3])
def test_sums_are_not_needed_and_what_rows_are_made_of_is(seed, active):
    atoms, codes, rows = planted(seed, active=active)
    kept = needed(rows, with_sums(atoms), active)
    assert kept[:40].all()
    assert kept[40:].sum() <= 2  # a greedy code may need one where atoms overlap
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(60, 40)))[0].T
    every = with_sums(basis)
    kept = needed(np.concatenate([codes @ basis, every]), every, active)
    assert kept.tolist() == [True] * 40 + [False] * 10


def test_of_two_that_are_nearly_the_same_the_truer_one_is_needed():
    atoms, _, rows = planted()
    twice = np.concatenate([turned(atoms, 0.1)[:5], atoms])
    assert needed(rows, twice, 2).tolist() == [False] * 5 + [True] * len(atoms)
    again = needed(rows, np.concatenate([atoms, atoms[:5], atoms[:5]]), 2)
    assert np.all(again[:5].astype(int) + again[40:45] + again[45:] == 1)
    assert again[5:40].all()


def test_what_no_row_uses_does_not_protect_a_sum():
    """Directions near sums, which rows would use if the sums were gone."""
    basis = np.eye(24)[:16]
    sums = unit(basis[0::2] + basis[1::2])
    near = 0.93 * sums + (1 - 0.93**2) ** 0.5 * np.eye(24)[16:]
    rows = np.concatenate([planted(num=16)[1] @ basis, np.repeat(sums, 20, axis=0)])
    kept = needed(rows, np.concatenate([basis, sums, near]), 2)
    assert kept.tolist() == [True] * 16 + [False] * 16


def test_atoms_that_are_sure_are_kept():
    atoms, _, rows = planted()
    every = with_sums(atoms)
    sure = np.arange(50) >= 48
    assert not needed(rows, every, 2)[48:].any()
    assert needed(rows, every, 2, sure=sure)[48:].all()
    assert not needed(rows, every, 2, sure=sure)[40:48].all()
    assert sharpened(every, [rows], cosine=0.9, sure=sure)[1][48:].all()
    assert not sharpened(every, [rows], cosine=0.9)[1][48:].any()


def test_what_is_needed_explains_as_much():
    atoms, _, rows = planted()
    every = with_sums(atoms)
    kept = needed(rows, every, 2)
    left = [
        np.sum((rows - matching_pursuit(rows, some, 2) @ some) ** 2) / np.sum(rows**2)
        for some in (every, every[kept], every[kept][1:])
    ]
    assert left[1] <= left[0] + 1e-6
    assert left[2] > left[1] + 0.01


def test_an_atom_that_few_rows_use_is_needed():
    """Five of 3000 have it, and sums have many more."""
    atoms, _, rows = planted(dim=80)
    rare = unit(np.random.default_rng(7).normal(size=80))
    rows[:5] = atoms[:5] + rare
    every = np.concatenate([with_sums(atoms), rare[None]])
    kept = needed(np.concatenate([rows, every[:-1]]), every, 2)
    assert kept.tolist() == [True] * len(atoms) + [False] * 10 + [True]


def test_atoms_that_no_row_uses_go_and_as_many_as_a_row_has_stay():
    rows = np.array([[1.0, 0.1, 0.0], [0.1, 2.0, 0.0]])
    assert needed(rows, np.eye(3), 1).tolist() == [True, True, False]
    assert needed(rows, np.eye(3), 2).tolist() == [True, True, False]
    assert needed(rows, np.eye(3), 3).all()
    assert needed(np.zeros((4, 3)), np.eye(3), 2).sum() == 2
    assert needed(np.zeros((0, 3)), np.eye(3), 2).sum() == 2
    same = np.eye(3)[[0, 0]]
    assert needed(rows, same, 1).sum() == 1
    assert needed(rows, same, 2).all()
    with pytest.raises(ValueError, match=r"wanted k in 1 \.\. 3"):
        needed(rows, np.eye(3), 4)


@pytest.mark.parametrize("place", [0, 1])
def test_directions_are_fitted_to_the_sparse_table(place):
    atoms, _, rows = planted()
    tables = [dense(atoms)]
    tables.insert(place, rows)
    near = turned(atoms, 0.2)
    moved, kept = sharpened(near, tables, cosine=0.9)
    assert kept.all()
    assert np.abs(np.sum(near * atoms, axis=1)).max() < 0.99
    assert np.abs(np.sum(moved * atoms, axis=1)).min() > 0.999


@pytest.mark.parametrize("place", [0, 39])
def test_what_is_not_needed_is_left_out(place):
    atoms, _, rows = planted()
    near = turned(atoms, 0.1)
    more = np.insert(near, place, unit(near[3] + near[4]), axis=0)
    moved, kept = sharpened(more, [rows], cosine=0.9)
    assert np.flatnonzero(~kept).tolist() == [place]
    assert np.abs(np.sum(moved * atoms, axis=1)).min() > 0.9999


def test_the_table_counts_in_which_directions_move_clearly_less_and_else_the_first():
    angles = {"near": 0.15, "far": 0.2, "nearly as far": 0.18}
    bases = {name: turned(np.eye(8), angle) for name, angle in angles.items()}
    codes = planted(active=2, num=8)[1]
    for names, counts in {
        ("far", "near"): "near",
        ("near", "far"): "near",
        ("far", "nearly as far"): "far",
        ("far", "nearly as far", "near"): "near",
    }.items():
        tables = [codes @ bases[name] for name in names]
        moved, _ = sharpened(np.eye(8), tables, cosine=0.9)
        assert np.abs(np.sum(moved * bases[counts], axis=1)).min() > 0.9999


@pytest.mark.parametrize(("num", "kept"), [(7, 8), (8, 8)])
def test_nothing_is_left_out_with_fewer_than_four_dimensions_per_code(num, kept):
    """Rows are two of seven or eight; the sum of two is in the way."""
    _, codes, _ = planted(num=num)
    every = np.concatenate([np.eye(num), unit(np.eye(num)[:1] + np.eye(num)[1:2])])
    rows = np.concatenate([codes, np.tile(every[-1:], (50, 1))])
    assert not needed(rows, every, 2)[-1]
    assert sharpened(every, [rows], cosine=0.9)[1].sum() == kept
    wide = rows @ np.eye(num, 20)
    wide += 0.01 * np.random.default_rng(2).normal(size=wide.shape)  # not dimensions
    assert sharpened(every @ np.eye(num, 20), [wide], cosine=0.9)[1].sum() == kept


def test_nothing_is_left_out_where_one_code_is_enough():
    """Every row is a pair, and no row uses what pairs are made of."""
    pairs = unit(np.eye(8)[0::2] + np.eye(8)[1::2])
    every = np.concatenate([np.eye(8), pairs])
    rows = np.repeat(pairs, 50, axis=0)
    assert needed(rows, every, 1).tolist() == [False] * 8 + [True] * 4
    assert sharpened(every, [rows], cosine=0.9)[1].all()


def test_where_no_table_is_sparse_directions_stay():
    atoms, _, _ = planted()
    near = turned(atoms, 0.2)
    for tables in ([dense(atoms)], [], [np.zeros((5, 32))]):
        moved, kept = sharpened(near, tables, cosine=0.9)
        np.testing.assert_array_equal(moved, near)
        assert kept.all()
    none, kept = sharpened(np.zeros((0, 32)), [dense(atoms)], cosine=0.9)
    assert (none.shape, kept.shape) == ((0, 32), (0,))


def test_a_table_without_rows_of_length_does_not_count():
    atoms, _, rows = planted()
    near = turned(atoms, 0.2)
    alone, _ = sharpened(near, [rows], cosine=0.9)
    assert np.any(alone != near)
    both, _ = sharpened(near, [np.zeros((5, 32)), rows], cosine=0.9)
    np.testing.assert_array_equal(both, alone)


def test_a_direction_that_would_move_too_far_stays():
    rows = np.repeat(np.eye(4), 50, axis=0)
    near = turned(np.eye(4), 0.1)
    near[0] = unit(np.array([0.8, 0.6, 0.0, 0.0]))
    moved, _ = sharpened(near, [rows], cosine=0.95)
    np.testing.assert_array_equal(moved[0], near[0])
    np.testing.assert_allclose(np.abs(moved[1:]), np.eye(4)[1:], atol=1e-6)


@pytest.mark.parametrize(("noise", "moves"), [(0.001, True), (0.1, False)])
def test_a_table_is_sparse_if_half_a_percent_is_left(noise, moves):
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(32), 100, axis=0)
    rows += noise**0.5 * unit(rng.normal(size=rows.shape))  # nearly all of it is left
    near = turned(np.eye(32), 0.2)
    assert np.any(sharpened(near, [rows], cosine=0.9)[0] != near) == moves
