import numpy as np
import pytest
from planted_atoms import planted, turned, unit

from toyfeat.discover.sparse_coding import (
    matching_pursuit,
    mod_step,
    needed_atoms,
    pursuit_errors,
)


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


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("num", "k"), [(3, 1), (3, 2), (6, 1), (6, 4), (15, 1), (15, 2), (15, 4)]
)
def test_the_pursuit_equals_least_squares_in_loops(num, k):
    rng = np.random.default_rng(num)
    atoms, rows = unit(rng.normal(size=(num, 6))), rng.normal(size=(1200, 6))
    codes = matching_pursuit(rows, atoms, k)
    oracle = np.stack([by_loops(row, atoms, k) for row in rows])
    assert codes.index.shape == codes.values.shape == (1200, k)
    assert all(len(set(index)) == k for index in codes.index.tolist())
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(codes.matrix(num).toarray(), oracle, **close)
    np.testing.assert_allclose(codes.reconstruct(atoms), oracle @ atoms, **close)


@pytest.mark.parametrize("num", [3, 6, 15])
def test_errors_of_a_pursuit_are_those_of_its_codes(num):
    """Also beyond the dimension, where nothing is left to explain."""
    rng = np.random.default_rng(num)
    atoms, rows = unit(rng.normal(size=(num, 4))), rng.normal(size=(900, 4))
    most = min(num, 6)
    found = pursuit_errors(rows, atoms, most)
    for k in range(1, most + 1):
        left = rows - matching_pursuit(rows, atoms, k).reconstruct(atoms)
        np.testing.assert_allclose(
            found[k - 1], np.sum(left**2) / np.sum(rows**2), atol=2e-6
        )
    assert pursuit_errors(np.zeros((3, 4)), atoms, 2).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"k in 1 \.\. "):
        pursuit_errors(rows, atoms, num + 1)


def test_codes_of_orthonormal_atoms_are_the_largest_projections():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 5))
    codes = matching_pursuit(rows, np.eye(5), 2).matrix(5).toarray()
    least = np.sort(np.abs(rows), axis=1)[:, -2:-1]
    np.testing.assert_allclose(codes, np.where(np.abs(rows) >= least, rows, 0))


def test_rows_of_zeros_have_no_codes():
    assert not matching_pursuit(np.zeros((3, 4)), np.eye(4), 3).values.any()
    none = matching_pursuit(np.zeros((0, 4)), np.eye(4), 3)
    assert none.index.shape == none.values.shape == (0, 3)
    assert none.matrix(4).shape == none.reconstruct(np.eye(4)).shape == (0, 4)


def test_a_duplicated_atom_gives_finite_codes():
    atoms = np.eye(2)[[0, 0, 1]]
    codes = matching_pursuit(np.array([[2.0, 1.0]]), atoms, 3)
    assert np.isfinite(codes.values).all()
    np.testing.assert_allclose(codes.reconstruct(atoms), [[2.0, 1.0]], atol=1e-6)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_must_be_in_range(k):
    with pytest.raises(ValueError, match=rf"k in 1 \.\. 3, .* got {k}"):
        matching_pursuit(np.ones((2, 5)), np.eye(5)[:3], k)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (2, 3)), ((2, 3), (3,))])
def test_rows_and_atoms_have_one_width(shapes):
    with pytest.raises(ValueError, match=r"rows \[N, D\] and atoms \[M, D\], got"):
        matching_pursuit(*map(np.ones, shapes), 1)


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num", "active"), [(20, 2), (40, 2), (30, 3)])
def test_mod_steps_recover_the_atoms_from_near_ones(seed, num, active):
    atoms, _, rows = planted(seed, num=num, active=active)
    near = turned(atoms, 0.2)
    moved, left = near, 1.0
    for _ in range(30):
        moved, left = mod_step(rows, moved, active)
    assert np.abs(np.sum(moved * atoms, axis=1)).min() > 0.9999
    assert left < 1e-3
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, rtol=1e-9)


def test_true_atoms_stay_and_explain_all():
    atoms, _, rows = planted()
    moved, left = mod_step(rows, atoms, 2)
    np.testing.assert_allclose(np.abs(np.sum(moved * atoms, axis=1)), 1, atol=1e-6)
    assert left < 1e-6


def test_the_error_is_that_of_least_squares_on_the_codes():
    _, _, rows = planted()
    near = unit(np.random.default_rng(3).normal(size=(5, 32)))
    moved, left = mod_step(rows, near, 2)
    codes = matching_pursuit(rows, near, 2).matrix(5).toarray()
    fit, residual, *_ = np.linalg.lstsq(codes, rows, rcond=None)
    assert left == pytest.approx(residual.sum() / np.sum(rows**2), rel=1e-6)
    np.testing.assert_allclose(moved, unit(fit), atol=1e-6)


def test_unused_atoms_stay_as_they_are():
    rows = np.array([[1.0, 0.1, 0.0], [2.0, 0.2, 0.0]])
    moved, left = mod_step(rows, np.eye(3), 1)
    np.testing.assert_allclose(moved[0], unit(rows[0]), atol=1e-9)
    np.testing.assert_array_equal(moved[1:], np.eye(3)[1:])
    assert left < 1e-12
    same, left = mod_step(np.zeros((2, 3)), np.eye(3), 1)
    np.testing.assert_array_equal(same, np.eye(3))
    assert left == 0


def test_arguments_are_not_written_to():
    atoms, _, rows = planted()
    near = turned(atoms, 0.2)
    before = near.copy()
    mod_step(rows, near, 2)
    np.testing.assert_array_equal(near, before)


def with_sums(atoms, num=10):
    """Unit sums of neighbours after the atoms themselves."""
    return np.concatenate([atoms, unit(atoms[:num] + atoms[1 : num + 1])])


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("active", [2, 3])
def test_atoms_are_needed_and_their_sums_are_not(seed, active):
    atoms, codes, rows = planted(seed, active=active)
    kept = needed_atoms(rows, with_sums(atoms), active)
    assert kept[:40].all()
    assert kept[40:].sum() <= 2  # a greedy code may need one where atoms overlap
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(60, 40)))[0].T
    every = with_sums(basis)
    kept = needed_atoms(np.concatenate([codes @ basis, every]), every, active)
    assert kept.tolist() == [True] * 40 + [False] * 10


def test_of_two_near_duplicates_the_better_one_is_needed():
    atoms, _, rows = planted()
    twice = np.concatenate([turned(atoms, 0.1)[:5], atoms])
    assert needed_atoms(rows, twice, 2).tolist() == [False] * 5 + [True] * len(atoms)
    again = needed_atoms(rows, np.concatenate([atoms, atoms[:5], atoms[:5]]), 2)
    assert np.all(again[:5].astype(int) + again[40:45] + again[45:] == 1)
    assert again[5:40].all()


def test_unused_atoms_do_not_protect_a_sum():
    """Directions near sums, which rows would use if the sums were gone."""
    basis = np.eye(24)[:16]
    sums = unit(basis[0::2] + basis[1::2])
    near = 0.93 * sums + (1 - 0.93**2) ** 0.5 * np.eye(24)[16:]
    rows = np.concatenate([planted(num=16)[1] @ basis, np.repeat(sums, 20, axis=0)])
    kept = needed_atoms(rows, np.concatenate([basis, sums, near]), 2)
    assert kept.tolist() == [True] * 16 + [False] * 16


def test_certain_atoms_are_kept():
    atoms, _, rows = planted()
    every = with_sums(atoms)
    certain = np.arange(50) >= 48
    assert not needed_atoms(rows, every, 2)[48:].any()
    assert needed_atoms(rows, every, 2, certain=certain)[48:].all()
    assert not needed_atoms(rows, every, 2, certain=certain)[40:48].all()


def test_needed_atoms_explain_as_much_as_all():
    atoms, _, rows = planted()
    every = with_sums(atoms)
    kept = needed_atoms(rows, every, 2)
    left = [
        np.sum((rows - matching_pursuit(rows, some, 2).reconstruct(some)) ** 2)
        / np.sum(rows**2)
        for some in (every, every[kept], every[kept][1:])
    ]
    assert left[1] <= left[0] + 1e-6
    assert left[2] > left[1] + 0.01


def test_an_atom_of_few_rows_is_needed():
    """Five of 3000 have it, and sums have many more."""
    atoms, _, rows = planted(dim=80)
    rare = unit(np.random.default_rng(7).normal(size=80))
    rows[:5] = atoms[:5] + rare
    every = np.concatenate([with_sums(atoms), rare[None]])
    kept = needed_atoms(np.concatenate([rows, every[:-1]]), every, 2)
    assert kept.tolist() == [True] * len(atoms) + [False] * 10 + [True]


def test_unused_atoms_go_but_k_atoms_stay():
    rows = np.array([[1.0, 0.1, 0.0], [0.1, 2.0, 0.0]])
    assert needed_atoms(rows, np.eye(3), 1).tolist() == [True, True, False]
    assert needed_atoms(rows, np.eye(3), 2).tolist() == [True, True, False]
    assert needed_atoms(rows, np.eye(3), 3).all()
    assert needed_atoms(np.zeros((4, 3)), np.eye(3), 2).sum() == 2
    assert needed_atoms(np.zeros((0, 3)), np.eye(3), 2).sum() == 2
    same = np.eye(3)[[0, 0]]
    assert needed_atoms(rows, same, 1).sum() == 1
    assert needed_atoms(rows, same, 2).all()
    with pytest.raises(ValueError, match=r"wanted k in 1 \.\. 3"):
        needed_atoms(rows, np.eye(3), 4)
