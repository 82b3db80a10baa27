import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.metrics import (
    match_features,
    random_coverage,
)


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
    assert match.num_found == num_found


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
    assert (match.mcc, match.precision, match.num_found) == (1, 1, 1)


def test_zero_rows_are_not_found():
    found = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    match = match_features(found, np.eye(3))
    assert match.index.tolist() == [-1, 1, -1]
    np.testing.assert_allclose(match.coverage, 1 / 3)
    assert (match.mcc, match.precision, match.num_found) == (1, 1, 1)


@pytest.mark.parametrize("found", [np.zeros((2, 3)), np.zeros((0, 3))])
@pytest.mark.parametrize("group", [None, np.array([0, 0, 1])])
def test_nothing_found_scores_zero(found, group):
    match = match_features(found, np.eye(3), group=group)
    assert match.index.tolist() == [-1, -1, -1]
    assert (match.coverage, match.mcc, match.precision, match.num_found) == (0, 0, 0, 0)


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


@pytest.mark.slow_cases
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
        (np.ones(5), np.ones((3, 5)), None, r"directions.*\(5,\)"),
        (np.ones((1, 2, 5)), np.ones((3, 5)), None, r"\(1, 2, 5\)"),
        (np.ones((2, 5)), np.ones(5), None, r"truth.*\(5,\)"),
        (NAN, np.eye(2), None, "directions.*finite"),
        (np.inf * NAN, np.eye(2), None, "directions.*finite"),
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


@pytest.mark.slow_cases
@pytest.mark.parametrize("num", [1, 2])
def test_random_coverage_of_one_truth_in_space_is_the_closed_form(num):
    got = random_coverage(jax.random.key(0), num, np.eye(3)[:1], draws=500)
    spread = np.sqrt(num / (num + 1) ** 2 / (num + 2) / 500)
    assert isinstance(got, float)
    assert abs(got - num / (num + 1)) < 5 * spread


@pytest.mark.slow_cases
@pytest.mark.parametrize(("num", "truths", "dim"), [(2, 4, 5), (5, 3, 6)])
def test_random_coverage_agrees_with_monte_carlo(num, truths, dim):
    truth, draws = rows(truths, dim), 300
    got = random_coverage(jax.random.key(1), num, truth, draws=draws)
    want = [
        best_sum(cosines(rows(num, dim, 1000 + i), truth)) / truths
        for i in range(draws)
    ]
    assert abs(got - np.mean(want)) < 5 * np.std(want) * np.sqrt(2 / draws)


@pytest.mark.slow
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
