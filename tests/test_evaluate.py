import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from toyfeat import (
    from_split,
    gradient_pca,
    match_features,
    moments,
    output_preserved,
    pca,
    principal_angles,
    r_squared,
    random_coverage,
    variance_explained,
)
from toyfeat.types import Basis, Diagnostics, Moments, Taps


def rows(num, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(num, dim))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cosines(found, truth):
    return np.abs(unit(truth) @ unit(found).T)


def best_sum(scores):
    """Brute force: the best sum of scores [F, R] over one-to-one assignments."""
    f, r = scores.shape
    if f > r:
        return best_sum(scores.T)
    return max(
        sum(scores[i, j] for i, j in enumerate(pick))
        for pick in itertools.permutations(range(r), f)
    )


def orthonormal(x):
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    return vt[s > 1e-9 * s.max()] if len(s) and s.max() > 0 else vt[:0]


def subspace_sum(found, truth):
    """Sum of the principal cosines between two row spaces."""
    a, b = orthonormal(found), orthonormal(truth)
    return np.linalg.svd(a @ b.T)[1].sum() if len(a) and len(b) else 0.0


def best_grouped_sum(found, truth, group):
    """Brute force over which rows each group is given, at most its size."""
    groups = [np.flatnonzero(np.asarray(group) == g) for g in np.unique(group)]

    def best(i, free):
        if i == len(groups):
            return 0.0
        size = min(len(groups[i]), len(free))
        return max(
            subspace_sum(found[list(pick)], truth[groups[i]])
            + best(i + 1, [j for j in free if j not in pick])
            for n in range(size + 1)
            for pick in itertools.combinations(free, n)
        )

    return best(0, list(range(len(found))))


# --- match_features ------------------------------------------------------


@pytest.mark.parametrize(
    ("num_found", "num_truth", "dim"),
    [(1, 1, 3), (2, 4, 3), (4, 2, 3), (4, 4, 4), (5, 5, 2), (3, 6, 8), (6, 3, 8)],
)
@pytest.mark.parametrize("seed", range(4))
def test_matching_equals_brute_force(num_found, num_truth, dim, seed):
    found, truth = rows(num_found, dim, seed), rows(num_truth, dim, seed + 100)
    match, scores = match_features(found, truth), cosines(found, truth)
    matched, pairs = match.index >= 0, min(num_found, num_truth)
    assert match.index.shape == match.similarity.shape == (num_truth,)
    assert np.issubdtype(match.index.dtype, np.integer)
    assert matched.sum() == pairs == len(set(match.index[matched]))
    np.testing.assert_allclose(
        match.similarity[matched], scores[matched, match.index[matched]], atol=1e-6
    )
    assert np.all(match.index[~matched] == -1)
    assert np.all(match.similarity[~matched] == 0)
    total = best_sum(scores)
    np.testing.assert_allclose(match.similarity.sum(), total, atol=1e-6)
    np.testing.assert_allclose(match.coverage, total / num_truth, atol=1e-6)
    np.testing.assert_allclose(match.mcc, total / pairs, atol=1e-6)
    np.testing.assert_allclose(match.precision, np.mean(scores.max(0) >= 0.9))
    assert match.found == num_found


def test_the_best_assignment_is_not_the_greedy_one():
    angle = np.deg2rad([[0.0, 40.0], [10.0, 80.0]])
    found, truth = (np.stack([np.cos(a), np.sin(a)], 1) for a in angle)
    match = match_features(found, truth)
    np.testing.assert_allclose(match.coverage, best_sum(cosines(found, truth)) / 2)


def test_planted_directions_are_found_behind_any_order_sign_and_scale():
    truth = rows(6, 10)
    order = np.array([3, 0, 5, 1, 4, 2])
    factors = np.array([1e-30, -1e30, 2.0, -1e-3, 7.0, -1.0])
    match = match_features(factors[:, None] * truth[order], truth)
    np.testing.assert_array_equal(order[match.index], np.arange(6))
    np.testing.assert_allclose(match.similarity, 1, atol=1e-6)
    assert match.precision == 1


@pytest.mark.parametrize("scale", [1e-30, -1.0, 1e30])
def test_scale_and_sign_of_either_side_change_nothing(scale):
    found, truth = rows(4, 5), rows(4, 5, 1)
    plain = match_features(found, truth)
    for other in (
        match_features(scale * found, truth),
        match_features(found, scale * truth),
    ):
        np.testing.assert_array_equal(other.index, plain.index)
        np.testing.assert_allclose(other.similarity, plain.similarity, atol=1e-6)


def test_float32_and_jax_arrays_are_welcome():
    found, truth = rows(4, 5), rows(3, 5, 1)
    want = match_features(found, truth).coverage
    for cast in (jnp.asarray, np.float32):
        got = match_features(cast(found), cast(truth))
        np.testing.assert_allclose(got.coverage, want, atol=1e-6)
        assert isinstance(got.coverage, float)


def test_copies_of_one_direction_do_not_serve_two_truths():
    match = match_features(np.array([[1.0, 0.0], [2.0, 0.0]]), np.eye(2))
    assert (match.coverage, match.mcc, match.precision) == (0.5, 0.5, 1.0)


def test_unmatched_truths_have_index_minus_one_and_similarity_zero():
    match = match_features(np.array([[0.0, -3.0, 0.0]]), np.eye(3))
    assert match.index.tolist() == [-1, 0, -1]
    assert match.similarity.tolist() == [0, 1, 0]
    np.testing.assert_allclose(match.coverage, 1 / 3)
    assert (match.mcc, match.precision, match.found) == (1, 1, 1)


def test_zero_rows_are_not_found():
    found = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    match = match_features(found, np.eye(3))
    assert match.index.tolist() == [-1, 1, -1]
    np.testing.assert_allclose(match.coverage, 1 / 3)
    assert (match.mcc, match.precision, match.found) == (1, 1, 1)


@pytest.mark.parametrize("found", [np.zeros((2, 3)), np.zeros((0, 3))])
@pytest.mark.parametrize("group", [None, np.array([0, 0, 1])])
def test_nothing_found_scores_zero(found, group):
    match = match_features(found, np.eye(3), group=group)
    assert match.index.tolist() == [-1, -1, -1]
    assert (match.coverage, match.mcc, match.precision, match.found) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("cosine", "precision"), [(0.95, 1.0), (0.901, 1.0), (0.899, 0.5), (0.5, 0.5)]
)
def test_precision_counts_found_rows_whose_best_cosine_reaches_nine_tenths(
    cosine, precision
):
    off = [cosine, 0.0, np.sqrt(1 - cosine**2)]
    found = np.array([[1.0, 0.0, 0.0], off])
    match = match_features(found, np.eye(3)[:2])
    assert match.precision == precision


# --- groups --------------------------------------------------------------


def rotated(pair, angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]]) @ pair


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4, 1.2])
@pytest.mark.parametrize("group", [[0, 0, 1], [7, 7, -2], [3, 3, 3 << 20]])
def test_a_plane_is_matched_by_any_rotated_pair(angle, group):
    truth = unit(rows(3, 6))
    truth[1] -= truth[1] @ truth[0] * truth[0]
    truth = unit(truth)
    found = np.concatenate([5 * rotated(truth[:2], angle), -truth[2:]])
    match = match_features(found, truth, group=np.array(group))
    np.testing.assert_allclose(match.similarity, 1, atol=1e-6)
    assert sorted(match.index[:2]) == [0, 1]
    assert match.index[2] == 2
    np.testing.assert_allclose([match.coverage, match.mcc], 1, atol=1e-6)
    assert match.precision == 1


def test_a_plane_may_be_spanned_by_rows_that_are_not_orthogonal():
    found = np.array([[1.0, 0.0, 0.0], [1.0, 0.05, 0.0]])
    match = match_features(found, np.eye(3)[:2], group=np.zeros(2, int))
    np.testing.assert_allclose(match.similarity, 1, atol=1e-6)
    truth = np.array([[1.0, 0.0, 0.0], [1.0, 0.05, 0.0]])
    match = match_features(np.eye(3)[:2], truth, group=np.zeros(2, int))
    np.testing.assert_allclose(match.similarity, 1, atol=1e-6)


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4])
def test_two_copies_of_one_direction_fill_half_a_plane(angle):
    row = np.array([[np.cos(angle), np.sin(angle), 0.0]])
    found = np.concatenate([row, -2 * row])
    match = match_features(found, np.eye(3)[:2], group=np.zeros(2, int))
    np.testing.assert_allclose(match.coverage, 0.5, atol=1e-6)
    np.testing.assert_allclose(match.similarity, 0.5, atol=1e-6)


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4])
def test_one_direction_inside_a_plane_covers_half_of_it(angle):
    row = np.array([[np.cos(angle), np.sin(angle), 0.0]])
    match = match_features(row, np.eye(3)[:2], group=np.zeros(2, int))
    np.testing.assert_allclose(match.coverage, 0.5, atol=1e-6)


def test_no_credit_is_given_for_the_axes_inside_a_plane():
    truth, group = np.eye(5)[:4], np.array([0, 0, 1, 1])
    found = rows(4, 5)
    turned = truth.copy()
    turned[:2], turned[2:] = rotated(truth[:2], 0.7), rotated(truth[2:], 0.2)
    plain = match_features(found, truth, group=group)
    other = match_features(found, turned, group=group)
    for name in ("coverage", "mcc", "precision"):
        np.testing.assert_allclose(
            getattr(other, name), getattr(plain, name), atol=1e-6
        )


def test_a_copy_does_not_push_the_second_direction_out_of_a_plane():
    found = np.array([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [0.1, 0.6, 0, 0.8]])
    match = match_features(found, np.eye(4)[:2], group=np.zeros(2, int))
    want = best_grouped_sum(found, np.eye(4)[:2], [0, 0]) / 2
    np.testing.assert_allclose(match.coverage, want, atol=1e-6)
    assert 2 in match.index


def test_a_third_row_is_given_where_it_helps():
    found = np.array([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 1.0]])
    match = match_features(found, np.eye(3), group=np.array([0, 0, 1]))
    np.testing.assert_allclose(match.similarity, [1, 1, np.sqrt(0.5)], atol=1e-6)
    assert sorted(match.index[:2]) == [0, 1]


def test_a_plane_and_a_line_do_not_share_a_row():
    match = match_features(np.eye(3)[:2], np.eye(3), group=np.array([0, 0, 1]))
    np.testing.assert_allclose(match.similarity, [1, 1, 0], atol=1e-6)
    assert match.index[2] == -1


@pytest.mark.parametrize("group", [[0, 1, 0, 1], [5, 5, 2, 2], [2, 9, 9, 2]])
def test_groups_may_be_interleaved(group):
    group = np.array(group)
    truth = np.eye(6)[:4]
    found = truth.copy()
    for g in np.unique(group):
        found[group == g] = rotated(truth[group == g], 0.6)
    match = match_features(found, truth, group=group)
    np.testing.assert_allclose(match.similarity, 1, atol=1e-6)
    for g in np.unique(group):
        got = np.sort(match.index[group == g])
        np.testing.assert_array_equal(got, np.flatnonzero(group == g))


def test_groups_of_one_are_no_groups():
    found, truth = rows(4, 5), rows(5, 5, 1)
    plain = match_features(found, truth)
    match = match_features(found, truth, group=np.array([4, 0, 9, -1, 2]))
    np.testing.assert_array_equal(match.index, plain.index)
    np.testing.assert_allclose(match.similarity, plain.similarity, atol=1e-6)


GROUPED = [
    (2, 3, [0, 0]),
    (3, 4, [0, 0]),
    (3, 3, [0, 0, 1]),
    (4, 5, [0, 0, 1, 1]),
    (5, 4, [0, 0, 1]),
    (3, 5, [0, 0, 1, 1]),
    (4, 6, [0, 0, 0, 1]),
]


@pytest.mark.parametrize(("num", "dim", "group"), GROUPED)
@pytest.mark.parametrize("seed", range(4))
def test_a_group_scores_the_mean_principal_cosine_with_the_rows_it_was_given(
    num, dim, group, seed
):
    group = np.array(group)
    found, truth = rows(num, dim, seed), rows(len(group), dim, seed + 50)
    match = match_features(found, truth, group=group)
    given = match.index[match.index >= 0]
    assert len(set(given)) == len(given) == min(num, len(group))
    for g in np.unique(group):
        index = match.index[group == g]
        want = subspace_sum(found[index[index >= 0]], truth[group == g])
        np.testing.assert_allclose(match.similarity[group == g].sum(), want, atol=1e-6)
    np.testing.assert_allclose(match.coverage, match.similarity.mean(), atol=1e-9)


@pytest.mark.parametrize(("num", "dim", "group"), GROUPED)
@pytest.mark.parametrize("seed", range(4))
def test_grouped_matching_is_within_one_percent_of_brute_force(num, dim, group, seed):
    found, truth = rows(num, dim, seed), rows(len(group), dim, seed + 50)
    match = match_features(found, truth, group=np.array(group))
    want = best_grouped_sum(found, truth, group) / len(group)
    # Random rows lie in no group: as hard as it gets.
    assert 0.99 * want <= match.coverage <= want + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_planes_found_up_to_noise_and_a_turn_match_as_in_brute_force(seed):
    group = np.array([0, 0, 1, 1, 2])
    truth = np.linalg.qr(rows(7, 7, seed))[0][:5]
    found = truth.copy()
    found[:2], found[2:4] = rotated(truth[:2], 0.4), rotated(truth[2:4], 0.9)
    found = found[[4, 2, 0, 3, 1]] + 0.15 * rows(5, 7, seed + 10)
    match = match_features(found, truth, group=group)
    want = best_grouped_sum(found, truth, group) / 5
    np.testing.assert_allclose(match.coverage, want, atol=1e-6)


# --- errors --------------------------------------------------------------

NAN = np.array([[1.0, np.nan]])


@pytest.mark.parametrize(
    ("found", "truth", "group", "match"),
    [
        (np.ones((5, 2)), np.ones((3, 5)), None, r"\(5, 2\).*\(3, 5\)|transpose|\.T"),
        (np.ones(5), np.ones((3, 5)), None, r"found.*\(5,\)"),
        (np.ones((1, 2, 5)), np.ones((3, 5)), None, r"\(1, 2, 5\)"),
        (np.ones((2, 5)), np.ones(5), None, r"truth.*\(5,\)"),
        (NAN, np.eye(2), None, "found.*finite"),
        (np.inf * NAN, np.eye(2), None, "found.*finite"),
        (np.eye(2), NAN, None, "truth.*finite"),
        (np.eye(2), np.array([[1.0, 0.0], [0.0, 0.0]]), None, "truth.*zero"),
        (np.eye(2), np.zeros((0, 2)), None, r"truth"),
        (np.eye(2), np.eye(2), np.zeros(3, int), r"group.*\(3,\)"),
        (np.eye(2), np.eye(2), np.zeros((2, 1), int), r"group.*\(2, 1\)"),
    ],
)
def test_bad_input_to_match_features_raises(found, truth, group, match):
    with pytest.raises(ValueError, match=rf"(?s)match_features.*({match})"):
        match_features(found, truth, group=group)


# --- random_coverage -----------------------------------------------------


@pytest.mark.parametrize("num", [1, 2])
def test_random_coverage_of_one_truth_in_space_is_the_closed_form(num):
    got = random_coverage(jax.random.key(0), num, np.eye(3)[:1], draws=500)
    spread = np.sqrt(num / (num + 1) ** 2 / (num + 2) / 500)
    assert isinstance(got, float)
    assert abs(got - num / (num + 1)) < 5 * spread


@pytest.mark.parametrize(("num", "truths", "dim"), [(2, 4, 5), (5, 3, 6)])
def test_random_coverage_agrees_with_monte_carlo(num, truths, dim):
    truth, draws = rows(truths, dim), 300
    got = random_coverage(jax.random.key(1), num, truth, draws=draws)
    want = [
        best_sum(cosines(rows(num, dim, 1000 + i), truth)) / truths
        for i in range(draws)
    ]
    assert abs(got - np.mean(want)) < 5 * np.std(want) * np.sqrt(2 / draws)


def test_random_coverage_of_a_plane_in_space_is_three_quarters():
    group = np.zeros(2, int)
    got = random_coverage(jax.random.key(2), 2, np.eye(3)[:2], group=group, draws=500)
    assert abs(got - 0.75) < 5 * np.sqrt(1 / 12) / 2 / np.sqrt(500)


def test_random_coverage_depends_on_the_key_only():
    truth = rows(3, 6)
    a, b, c = (random_coverage(jax.random.key(s), 4, truth) for s in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize(("num", "draws"), [(0, 8), (-1, 8), (2, 0)])
def test_random_coverage_of_no_directions_or_draws_raises(num, draws):
    with pytest.raises(ValueError, match=rf"random_coverage.*{min(num, draws)}"):
        random_coverage(jax.random.key(0), num, np.eye(3), draws=draws)


# --- principal_angles ----------------------------------------------------


angles = jax.jit(principal_angles)


def scipy_cosines(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.sort(np.cos(scipy.linalg.subspace_angles(a.T, b.T)))[::-1]


@pytest.mark.parametrize(
    ("r", "q", "dim"),
    [(1, 1, 3), (2, 2, 5), (2, 4, 5), (4, 2, 5), (3, 3, 3), (3, 1, 9)],
)
@pytest.mark.parametrize("seed", range(3))
def test_principal_angles_are_those_of_scipy(r, q, dim, seed):
    a, b = (rows(n, dim, s).astype(np.float32) for n, s in ((r, seed), (q, seed + 9)))
    got = angles(a, b)
    assert got.shape == (min(r, q),)
    assert np.all(np.diff(np.asarray(got)) <= 0)
    assert np.all((np.asarray(got) >= 0) & (np.asarray(got) <= 1))
    np.testing.assert_allclose(got, scipy_cosines(a, b), atol=1e-5)
    np.testing.assert_allclose(angles(b, a), got, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_principal_angles_do_not_depend_on_the_scale(scale):
    a, b = rows(2, 5).astype(np.float32), rows(3, 5, 1).astype(np.float32)
    want = scipy_cosines(a, b)
    a_scaled, b_scaled = (np.float32(scale) * x for x in (a, b))
    np.testing.assert_allclose(angles(a_scaled, b), want, atol=1e-5)
    np.testing.assert_allclose(angles(a, b_scaled), want, atol=1e-5)


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_principal_angles_do_not_depend_on_how_long_each_row_is(ratio):
    a, b = rows(2, 5).astype(np.float32), rows(3, 5, 1).astype(np.float32)
    want = scipy_cosines(a, b)
    a[1] *= np.float32(ratio)
    np.testing.assert_allclose(angles(a, b), want, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_dependent_rows_give_the_angles_that_there_are_and_zeros(scale):
    base, b = rows(2, 6), rows(3, 6, 1).astype(np.float32)
    a = np.stack([base[0], base[1], base[0] - 2 * base[1]]).astype(np.float32)
    want = np.append(scipy_cosines(base, b), 0)
    a = np.float32(scale) * a
    np.testing.assert_allclose(angles(a, b), want, atol=1e-5)
    np.testing.assert_allclose(angles(b, a), want, atol=1e-5)


def test_zero_rows_have_no_angles():
    got = angles(np.zeros((2, 4)), rows(3, 4))
    assert got.tolist() == [0, 0]


def test_more_rows_than_dimensions_span_everything():
    got = angles(rows(5, 3), rows(4, 3, 1))
    np.testing.assert_allclose(got, [1, 1, 1], atol=1e-6)


def test_principal_angles_eager_is_jit_and_vmap_is_a_loop():
    a = jnp.asarray(rows(12, 5), jnp.float32).reshape(4, 3, 5)
    b = jnp.asarray(rows(2, 5, 1), jnp.float32)
    batched = jax.jit(jax.vmap(principal_angles, (0, None)))(a, b)
    for i in range(4):
        eager = principal_angles(a[i], b)
        np.testing.assert_allclose(batched[i], eager, atol=1e-6)
        np.testing.assert_allclose(jax.jit(principal_angles)(a[i], b), eager, atol=1e-6)


def test_a_nan_among_the_rows_shows_in_the_cosines():
    a = rows(2, 4)
    a[0, 0] = np.nan
    assert np.isnan(principal_angles(a, rows(2, 4, 1))).any()


@pytest.mark.parametrize(
    ("a", "b"), [((2, 4), (2, 5)), ((4,), (2, 4)), ((2, 4), (1, 2, 4))]
)
def test_principal_angles_of_misfits_raise(a, b):
    match = r"principal_angles.*\(" + ", ".join(map(str, a))
    with pytest.raises(ValueError, match=match):
        principal_angles(np.ones(a), np.ones(b))


# --- r_squared -----------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_r_squared_is_that_of_numpy(mean, scale):
    rng = np.random.default_rng(0)
    target = (scale * (rng.normal(size=300) + mean)).astype(np.float32)
    noise = rng.normal(size=(300, 4)) * [0, 0.5, 2, 100]
    scores = (scale * noise + target[:, None]).astype(np.float32)
    got = jax.jit(r_squared)(scores, target)
    both = np.column_stack([scores, target]).astype(np.float64)
    want = np.corrcoef(both.T)[:-1, -1] ** 2
    assert got.shape == (4,)
    np.testing.assert_allclose(got, want, atol=1e-5)
    one = r_squared(scores[:, 1], target)
    assert one.shape == ()
    np.testing.assert_allclose(one, want[1], atol=1e-5)


def test_r_squared_does_not_see_signs():
    x = rows(1, 50)[0]
    np.testing.assert_allclose(r_squared(-3 * x + 1, x), 1, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e4 / 3])
@pytest.mark.parametrize("n", [3, 1000])
def test_constant_sides_have_no_correlation(value, n):
    vary, constant = rows(1, n)[0], np.full(n, value)
    np.testing.assert_allclose(r_squared(constant, vary), 0, atol=1e-6)
    np.testing.assert_allclose(r_squared(vary, constant), 0, atol=1e-6)
    np.testing.assert_allclose(r_squared(constant, constant), 0, atol=1e-6)
    mixed = r_squared(np.stack([vary, constant], 1), vary)
    np.testing.assert_allclose(mixed, [1, 0], atol=1e-5)


def test_r_squared_does_not_exceed_one():
    for seed in range(5):
        x = rows(1, 1000, seed)[0]
        assert float(r_squared(x, x)) <= 1


@pytest.mark.parametrize(
    ("scores", "target"), [((4,), (5,)), ((4, 2), (2,)), ((4,), (4, 1)), ((), (4,))]
)
def test_r_squared_of_misfits_raises(scores, target):
    match = r"r_squared.*\(" + ", ".join(map(str, scores))
    with pytest.raises(ValueError, match=match):
        r_squared(np.ones(scores), np.ones(target))


# --- variance_explained --------------------------------------------------


@functools.cache
def folded(dim, grads):
    acc = moments(dim, grads=grads)
    return jax.jit(lambda taps: acc.finish(acc.update(acc.init(), taps)))


def of_data(acts, grads=None, weights=None):
    n, dim = acts.shape
    weights = np.ones(n) if weights is None else weights
    taps = [
        None if x is None else jnp.asarray(x, jnp.float32)
        for x in (acts, grads, weights)
    ]
    return folded(dim, grads is not None)(Taps(*taps))


fitted_pca = jax.jit(pca, static_argnames="rank")
fitted_gradient_pca = jax.jit(gradient_pca, static_argnames="rank")
preserved = jax.jit(output_preserved, static_argnames=("probed", "site"))
explained = jax.jit(variance_explained)


def basis_of(mean, readers, writers):
    parts = [jnp.asarray(x, jnp.float32) for x in (mean, readers, writers)]
    rank = parts[1].shape[1]
    nothing = jnp.float32(0)
    return Basis(
        *parts, jnp.ones(rank), Diagnostics(jnp.int32(rank), nothing, nothing, nothing)
    )


def rebuilt64(basis, acts):
    mean, readers, writers = (np.asarray(x, np.float64) for x in basis[:3])
    return (acts - mean) @ readers @ writers + mean


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("method", ["pca", "gradient_pca", "any"])
def test_variance_explained_is_that_of_the_rebuilt_data(method, rank):
    rng = np.random.default_rng(0)
    acts = rows(200, 6) @ rows(6, 6, 1) + 5
    weights = rng.uniform(0.1, 2, 200)
    acts, weights = acts.astype(np.float32), weights.astype(np.float32)
    stats = of_data(acts, rows(200, 6, 2).reshape(200, 1, 6), weights)
    if method == "any":
        scale = 0.3
        basis = basis_of(stats.mean, rows(6, rank, 3), scale * rows(rank, 6, 4))
    else:
        basis = {"pca": fitted_pca, "gradient_pca": fitted_gradient_pca}[method](
            stats, rank=rank
        )
    acts, weights = acts.astype(np.float64), weights.astype(np.float64)
    mean = weights @ acts / weights.sum()
    lost = weights @ ((acts - rebuilt64(basis, acts)) ** 2).sum(1)
    want = 1 - lost / (weights @ ((acts - mean) ** 2).sum(1))
    got = explained(basis, stats)
    assert got.shape == ()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_basis_of_rank_zero_explains_nothing():
    stats = of_data(rows(40, 6))
    empty = basis_of(stats.mean, np.zeros((6, 2)), np.zeros((2, 6)))
    np.testing.assert_allclose(explained(empty, stats), 0, atol=1e-6)


def test_activations_that_do_not_vary_are_explained():
    stats = of_data(np.full((40, 6), 2.0))
    empty = basis_of(stats.mean, np.zeros((6, 2)), np.zeros((2, 6)))
    assert float(explained(empty, stats)) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_variance_explained_does_not_depend_on_the_scale(scale):
    stats = of_data(rows(40, 6) @ rows(6, 6, 1))
    mean = jnp.float32(scale**0.5) * stats.mean
    small = Moments(stats.weight, mean, jnp.float32(scale / 40) * stats.scatter)
    want = explained(fitted_pca(stats, rank=2), stats)
    np.testing.assert_allclose(
        explained(fitted_pca(small, rank=2), small), want, atol=1e-5
    )


def test_variance_explained_under_jit():
    stats = of_data(rows(40, 6))
    fn = lambda s: variance_explained(fitted_pca(s, rank=2), s)  # noqa: E731
    np.testing.assert_allclose(jax.jit(fn)(stats), fn(stats), atol=1e-6)


# --- output_preserved ----------------------------------------------------

W_IN, W_OUT = rows(3, 6), rows(6, 2, 1)


def model(shape):
    def prefix(params, inputs):
        return jnp.tanh(inputs @ params["in"])

    def suffix(params, acts):
        y = jnp.maximum(acts, 0) @ params["out"] + jnp.array([3.0, -7.0]).reshape(
            (1,) * (acts.ndim - 1) + (2,)
        )
        return {"vector": y, "scalar": y[..., 0]}[shape]

    params = {k: jnp.asarray(v, jnp.float32) for k, v in (("in", W_IN), ("out", W_OUT))}
    return from_split(prefix, suffix, site="hidden"), params


def model64(acts, shape):
    y = np.maximum(acts, 0) @ np.asarray(W_OUT, np.float32) + [3.0, -7.0]
    return {"vector": y, "scalar": y[..., 0]}[shape]


@pytest.mark.parametrize(
    ("shape", "lead"), [("vector", (40,)), ("scalar", (40,)), ("vector", (10, 4))]
)
@pytest.mark.parametrize("rank", [1, 6])
def test_output_preserved_is_that_of_a_hand_made_splice(rank, shape, lead):
    probed, params = model(shape)
    inputs = rows(40, 3, 5).reshape(*lead, 3).astype(np.float32)
    acts = np.tanh(inputs @ np.asarray(W_IN, np.float32)).astype(np.float64)
    basis = fitted_pca(of_data(acts.reshape(-1, 6)), rank=rank)
    got = preserved(probed, params, jnp.asarray(inputs), site="hidden", basis=basis)
    whole, spliced = (model64(a, shape) for a in (acts, rebuilt64(basis, acts)))
    lost, all_of_it = (
        ((whole - x) ** 2).sum() for x in (spliced, whole.mean(0, keepdims=True))
    )
    assert got.shape == ()
    np.testing.assert_allclose(got, 1 - lost / all_of_it, atol=2e-5)


def test_the_reader_of_a_linear_output_preserves_all_of_it():
    w = rows(1, 6)[0].astype(np.float32)
    probed = from_split(lambda p, x: x, lambda p, a: a @ p)
    inputs = (rows(200, 6, 1) @ rows(6, 6, 2)).astype(np.float32)
    stats = of_data(inputs, np.broadcast_to(w, (200, 1, 6)))
    kept = [
        float(
            preserved(
                probed, jnp.asarray(w), jnp.asarray(inputs), site="acts", basis=basis
            )
        )
        for basis in (fitted_gradient_pca(stats, rank=1), fitted_pca(stats, rank=1))
    ]
    np.testing.assert_allclose(kept[0], 1, atol=1e-6)
    assert kept[1] < 0.9


def test_a_projection_that_does_harm_preserves_less_than_nothing():
    probed = from_split(lambda p, x: x, lambda p, a: a)
    inputs = jnp.asarray(rows(20, 3), jnp.float32)
    mirror = basis_of(np.zeros(3), np.eye(3), -np.eye(3))
    got = preserved(probed, None, inputs, site="acts", basis=mirror)
    assert float(got) < -2


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_constant_outputs_are_preserved(value):
    probed = from_split(lambda p, x: x, lambda p, a: 0 * a[:, :2] + p)
    inputs = jnp.asarray(rows(30, 3), jnp.float32)
    empty = basis_of(np.zeros(3), np.zeros((3, 1)), np.zeros((1, 3)))
    got = preserved(probed, jnp.float32(value), inputs, site="acts", basis=empty)
    assert float(got) == 1


@pytest.mark.parametrize("value", [1.0, 0.1])
def test_constant_outputs_that_the_projection_moves_are_not_preserved(value):
    probed = from_split(lambda p, x: x, lambda p, a: a)
    mirror = basis_of(np.zeros(3), np.eye(3), -np.eye(3))
    inputs = jnp.full((30, 3), value, jnp.float32)
    assert preserved(probed, None, inputs, site="acts", basis=mirror) < 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_output_preserved_does_not_depend_on_the_scale_of_the_output(scale):
    probed = from_split(lambda p, x: x, lambda p, a: a * p)
    inputs = rows(40, 6)
    basis = fitted_pca(of_data(inputs), rank=2)
    kept = [
        preserved(
            probed,
            jnp.float32(s),
            jnp.asarray(inputs, jnp.float32),
            site="acts",
            basis=basis,
        )
        for s in (1.0, scale)
    ]
    np.testing.assert_allclose(kept[1], kept[0], atol=1e-5)


def test_output_preserved_under_jit():
    probed, params = model("vector")
    inputs = jnp.asarray(rows(20, 3, 5), jnp.float32)
    basis = fitted_pca(of_data(rows(40, 6)), rank=2)
    fn = functools.partial(output_preserved, probed, site="hidden", basis=basis)
    np.testing.assert_allclose(
        jax.jit(fn)(params, inputs), fn(params, inputs), atol=1e-5
    )


def test_a_basis_of_another_width_raises():
    probed, params = model("vector")
    basis = basis_of(np.zeros(5), np.ones((5, 1)), np.ones((1, 5)))
    with pytest.raises(ValueError, match=r"\b6\b.*\b5\b|\b5\b.*\b6\b"):
        output_preserved(probed, params, jnp.ones((4, 3)), site="hidden", basis=basis)


def test_an_unknown_site_raises():
    probed, params = model("vector")
    basis = basis_of(np.zeros(6), np.ones((6, 1)), np.ones((1, 6)))
    with pytest.raises(ValueError, match="nowhere"):
        output_preserved(probed, params, jnp.ones((4, 3)), site="nowhere", basis=basis)
