import numpy as np
import pytest
from planted_atoms import planted, turned, unit

from toyfeat.discover.refinement import _most_supported, refine_directions
from toyfeat.discover.sparse_coding import needed_atoms
from toyfeat.discover.sparse_fit import fit_sparsely, fit_tables, order_fits


def dense(atoms):
    return np.random.default_rng(5).normal(size=(800, len(atoms))) @ atoms


def with_sums(atoms, num=10):
    """Unit sums of neighbours after the atoms themselves."""
    return np.concatenate([atoms, unit(atoms[:num] + atoms[1 : num + 1])])


def test_arguments_are_not_written_to():
    atoms, _, rows = planted()
    near = turned(atoms, 0.2)
    before = near.copy()
    refine_directions(near, [rows], cosine=0.9)
    np.testing.assert_array_equal(near, before)


def test_elimination_keeps_directions_of_a_support_close_to_the_largest():
    atoms, _, rows = planted()
    every = with_sums(atoms)
    assert not refine_directions(every, [rows], cosine=0.9).kept[40:].any()
    supports = np.full(50, 5)
    supports[48:] = 7, 10
    kept = refine_directions(every, [rows], cosine=0.9, supports=[supports]).kept
    assert kept.tolist() == [True] * 40 + [False] * 8 + [True] * 2


def most_supported(directions, rows, supports):
    """The directions that are chosen, and the fit of them."""
    fit = fit_sparsely(rows, directions)
    part, chosen = _most_supported(fit, directions, np.asarray(supports), 0.9)
    assert part.atoms.shape == directions[chosen].shape
    assert part.k <= fit.most
    return chosen, part


@pytest.mark.parametrize(("often", "rarely"), [(10, 2), (3, 2), (100, 99)])
def test_sums_of_low_support_are_left_out(often, rarely):
    atoms, _, rows = planted()
    every = with_sums(atoms)
    supports = [often] * 40 + [rarely] * 10
    chosen, fit = most_supported(every, rows, supports)
    assert chosen.tolist() == [True] * 40 + [False] * 10
    assert fit.k == 2
    found = refine_directions(every, [rows], cosine=0.9, supports=[supports])
    assert found.kept.tolist() == chosen.tolist()
    assert np.abs(np.sum(found.directions * atoms, axis=1)).min() > 0.9999


def test_sums_of_low_support_are_left_out_though_they_save_a_code():
    """A third of the rows are multiples of a sum, and most have one atom."""
    basis = np.eye(16)
    sums = unit(basis[0::2] + basis[1::2])
    rows = np.concatenate([np.repeat(basis, 20, axis=0), np.repeat(sums, 20, axis=0)])
    every = np.concatenate([basis, sums])
    chosen, fit = most_supported(every, rows, [10] * 16 + [2] * 8)
    assert chosen.tolist() == [True] * 16 + [False] * 8
    assert (fit_sparsely(rows, every).k, fit.k) == (1, 2)


@pytest.mark.parametrize(("of_rare", "sums"), [(3, 0), (2, 10)])
def test_a_rare_direction_of_low_support_is_kept_for_its_rows(of_rare, sums):
    """Five of 3000 rows have it; with sums, if their support is as high."""
    atoms, _, rows = planted(dim=80)
    rare = unit(np.random.default_rng(7).normal(size=(1, 80)))
    rows[:5] = atoms[:5] + rare
    every = np.concatenate([with_sums(atoms), rare])
    supports = [10] * 40 + [2] * 10 + [of_rare]
    chosen, _ = most_supported(every, rows, supports)
    assert (chosen[:40].all(), chosen[40:50].sum(), chosen[50]) == (True, sums, True)
    kept = refine_directions(every, [rows], cosine=0.9, supports=[supports]).kept
    assert kept.tolist() == [True] * 40 + [False] * 10 + [True]


def test_without_different_supports_all_directions_are_chosen():
    atoms, _, rows = planted()
    chosen, fit = most_supported(with_sums(atoms), rows, [4] * 50)
    assert chosen.all()
    assert fit.k == 2


def test_the_most_supported_are_not_enough_if_they_leave_too_much():
    atoms, _, rows = planted()
    chosen, _ = most_supported(atoms, rows, [10] * 30 + [4] * 10)
    assert chosen.all()


@pytest.mark.parametrize("place", [0, 1])
def test_directions_are_fitted_to_the_sparse_table(place):
    atoms, _, rows = planted()
    tables = [dense(atoms)]
    tables.insert(place, rows)
    near = turned(atoms, 0.2)
    moved, kept, explain, _ = refine_directions(near, tables, cosine=0.9)
    assert explain
    assert kept.all()
    assert np.abs(np.sum(near * atoms, axis=1)).max() < 0.99
    assert np.abs(np.sum(moved * atoms, axis=1)).min() > 0.999


@pytest.mark.parametrize("place", [0, 39])
def test_directions_that_are_not_needed_are_left_out(place):
    atoms, _, rows = planted()
    near = turned(atoms, 0.1)
    more = np.insert(near, place, unit(near[3] + near[4]), axis=0)
    moved, kept, _, _ = refine_directions(more, [rows], cosine=0.9)
    assert np.flatnonzero(~kept).tolist() == [place]
    assert np.abs(np.sum(moved * atoms, axis=1)).min() > 0.9999


def test_the_first_table_counts_unless_directions_move_less_in_another():
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
        moved, *_ = refine_directions(np.eye(8), tables, cosine=0.9)
        assert np.abs(np.sum(moved * bases[counts], axis=1)).min() > 0.9999


def colours_and_shapes(colours=4, shapes=6, dim=16):
    """Parts, their sums, and rows of sums alone and of parts by any two numbers."""
    rng = np.random.default_rng(3)
    parts = unit(rng.normal(size=(colours + shapes, dim)))
    first, second = rng.integers(colours, size=2000), rng.integers(shapes, size=2000)
    pairs = parts[first], parts[colours + second]
    sums = unit((parts[:colours, None] + parts[None, colours:]).reshape(-1, dim))
    codes = rng.normal(size=(2, 2000, 1))
    return parts, sums, pairs[0] + pairs[1], codes[0] * pairs[0] + codes[1] * pairs[1]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("shapes", "parts_there"), [(2, 2), (6, 2), (6, 6)])
def test_parts_come_back_and_not_their_sums(place, shapes, parts_there):
    """Sums explain one table with a code, their parts explain both with two.

    On the table of sums they are left alone, or with the parts.
    """
    parts, sums, of_sums, of_parts = colours_and_shapes(shapes=shapes)
    near = np.concatenate([turned(parts, 0.1), sums])
    sizes = len(parts), len(sums)
    tables, supports = [of_sums], [np.repeat([parts_there, 6], sizes)]
    tables.insert(place, of_parts)
    supports.insert(place, np.repeat([6, 2], sizes))
    fits = fit_tables(near, tables)
    assert order_fits(near, fits) == [1 - place, place]  # sums did not move
    assert (fits[1 - place].k, fits[place].k) == (1, 2)
    found = refine_directions(near, tables, cosine=0.9, supports=supports)
    assert np.flatnonzero(found.kept).tolist() == list(range(len(parts)))
    assert np.abs(np.sum(found.directions * parts, axis=1)).min() > 0.9999


def test_few_directions_of_another_table_do_not_replace_what_they_do_not_explain():
    _, sums, of_sums, _ = colours_and_shapes(10, 10, dim=20)
    span = np.linalg.svd(sums, full_matrices=False)[2][:19]
    others, _, of_others = planted(9, dim=19, num=20)
    near = np.concatenate([turned(others, 0.1) @ span, sums])
    tables = [of_sums, of_others @ span]
    supports = [np.repeat(s, [20, 100]) for s in ([2, 6], [6, 2])]
    fits = fit_tables(near, tables)
    assert order_fits(near, fits) == [0, 1]
    assert (fits[0].k, fits[1].k) == (1, 2)
    found = refine_directions(near, tables, cosine=0.9, supports=supports)
    assert np.flatnonzero(found.kept).tolist() == list(range(20, 120))


@pytest.mark.parametrize(("num", "kept"), [(7, 8), (8, 8)])
def test_nothing_is_left_out_with_fewer_than_four_dimensions_per_code(num, kept):
    """Rows are two of seven or eight; the sum of two is in the way."""
    _, codes, _ = planted(num=num)
    every = np.concatenate([np.eye(num), unit(np.eye(num)[:1] + np.eye(num)[1:2])])
    rows = np.concatenate([codes, np.tile(every[-1:], (50, 1))])
    assert not needed_atoms(rows, every, 2)[-1]
    assert refine_directions(every, [rows], cosine=0.9).kept.sum() == kept
    wide = rows @ np.eye(num, 20)
    wide += 0.01 * np.random.default_rng(2).normal(size=wide.shape)  # not dimensions
    found = refine_directions(every @ np.eye(num, 20), [wide], cosine=0.9)
    assert found.kept.sum() == kept


def test_nothing_is_left_out_where_one_code_is_enough():
    """Every row is a pair, and no row uses what pairs are made of."""
    pairs = unit(np.eye(8)[0::2] + np.eye(8)[1::2])
    every = np.concatenate([np.eye(8), pairs])
    rows = np.repeat(pairs, 50, axis=0)
    assert needed_atoms(rows, every, 1).tolist() == [False] * 8 + [True] * 4
    assert refine_directions(every, [rows], cosine=0.9).kept.all()


@pytest.mark.parametrize(("num", "dim"), [(40, 32), (300, 50), (5, 2), (3, 3)])
def test_normal_rows_explain_nothing(num, dim):
    """Each code explains what the best of so many directions does by chance."""
    rng = np.random.default_rng(num)
    rows, directions = rng.normal(size=(4000, dim)), unit(rng.normal(size=(num, dim)))
    assert fit_sparsely(rows, directions) is None


def test_supports_are_those_of_the_table_that_is_fitted():
    """Sums recur as often as directions, but not in the table of pairs."""
    atoms, _, rows = planted()
    every = with_sums(atoms)
    often, rarely = [10] * 50, [10] * 40 + [2] * 10
    for supports, tables in (
        ([rarely, often], [rows, dense(atoms)]),
        ([often, rarely], [dense(atoms), rows]),
    ):
        kept = refine_directions(every, tables, cosine=0.9, supports=supports).kept
        assert kept.tolist() == [True] * 40 + [False] * 10
    kept = refine_directions(every, [rows], cosine=0.9, supports=[often]).kept
    assert kept[:40].all()
    assert kept.sum() > 45  # all are certain, but for those that hardly any row uses


@pytest.mark.parametrize(("size", "kept"), [(1, True), (0.1, False)])
def test_what_others_leave_is_left_out(size, kept):
    """A rare direction is as long as others where it is, and is needed."""
    atoms, _, rows = planted(dim=80)
    rare = unit(np.random.default_rng(7).normal(size=(1, 80)))
    sparse = rows.copy()
    sparse[:500] += rare
    rows[:20] += size * rare
    every = np.concatenate([atoms, rare])
    support = np.full(41, 5)
    found = refine_directions(every, [rows], cosine=0.9, supports=[support])
    assert found.kept.tolist() == [True] * 40 + [kept]

    # Beside a table that is sparse and has it as well it is kept, else it is not.
    for other, kept_too in ((sparse, True), (dense(atoms), kept)):
        both = [support, support]
        found = refine_directions(every, [rows, other], cosine=0.9, supports=both)
        assert found.kept.tolist() == [True] * 40 + [kept_too]


def test_a_table_at_the_limit_of_what_is_few_comes_last():
    """With codes for half of the dimensions nearly any directions explain a table."""
    atoms = np.eye(16)
    at_limit, pairs = (planted(dim=16, num=16, active=num)[1] for num in (8, 2))
    largest_first = np.argsort(np.argsort(-np.abs(at_limit)))
    at_limit *= 0.78**largest_first  # every code takes two fifths of what is left
    for tables, place in (([at_limit, pairs], 1), ([pairs, at_limit], 0)):
        fits = fit_tables(atoms, tables)
        assert (order_fits(atoms, fits), fits[place].k) == ([place], 2)
    fits = fit_tables(atoms, [at_limit])
    assert order_fits(atoms, fits) == [0]
    assert fits[0].k == fits[0].most == 8
    for rows, clear in ((at_limit, False), (pairs, True)):
        refined = refine_directions(atoms, [rows], cosine=0.9)
        assert (refined.explain, refined.clear) == (True, clear)


def test_a_direction_of_small_support_is_kept_if_another_would_take_its_place():
    """It would move to the reader that is missing, further than may be."""
    atoms, _, rows = planted(num=20, active=1)
    every = np.concatenate([atoms, turned(atoms[19:], 0.4)])
    support = [6] * 19 + [5, 6]
    found = refine_directions(every, [rows], cosine=0.95, supports=[support])
    assert np.abs(found.directions @ atoms.T).max(0).min() > 0.999


def test_two_near_one_direction_become_one():
    atoms, _, rows = planted()
    every = np.concatenate([turned(atoms, 0.1), turned(atoms[:2], 0.1, seed=9)])
    found = refine_directions(every, [rows], cosine=0.9, supports=[np.full(42, 5)])
    assert len(found.directions) == found.kept.sum() == 40
    assert np.abs(found.directions @ atoms.T).max(0).min() > 0.9999


def test_directions_stay_where_no_table_is_sparse():
    atoms, _, _ = planted()
    near = turned(atoms, 0.2)
    for tables in ([dense(atoms)], [], [np.zeros((5, 32))]):
        moved, kept, explain, _ = refine_directions(near, tables, cosine=0.9)
        assert not explain
        np.testing.assert_array_equal(moved, near)
        assert kept.all()
    none, kept, _, _ = refine_directions(np.zeros((0, 32)), [dense(atoms)], cosine=0.9)
    assert (none.shape, kept.shape) == ((0, 32), (0,))


def test_a_table_of_zeros_does_not_count():
    atoms, _, rows = planted()
    near = turned(atoms, 0.2)
    alone, *_ = refine_directions(near, [rows], cosine=0.9)
    assert np.any(alone != near)
    both, *_ = refine_directions(near, [np.zeros((5, 32)), rows], cosine=0.9)
    np.testing.assert_array_equal(both, alone)


def test_a_direction_that_would_move_too_far_stays():
    rows = np.repeat(np.eye(4), 50, axis=0)
    near = turned(np.eye(4), 0.1)
    near[0] = unit(np.array([0.8, 0.6, 0.0, 0.0]))
    moved, *_ = refine_directions(near, [rows], cosine=0.95)
    np.testing.assert_array_equal(moved[0], near[0])
    np.testing.assert_allclose(np.abs(moved[1:]), np.eye(4)[1:], atol=1e-6)


@pytest.mark.parametrize(
    ("noise", "moves"), [(0.001, True), (0.015, True), (0.03, False), (0.1, False)]
)
def test_a_table_is_sparse_if_two_percent_are_left_that_nothing_explains(noise, moves):
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(32), 100, axis=0)
    rows += noise**0.5 * unit(rng.normal(size=rows.shape))  # nearly all of it is left
    near = turned(np.eye(32), 0.2)
    found = refine_directions(near, [rows], cosine=0.9)
    assert found.explain == moves
    assert np.any(found.directions != near) == moves
