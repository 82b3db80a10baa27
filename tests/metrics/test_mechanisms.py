"""Mechanisms against planted ones: oracles by scipy's principal angles, in float64."""

import itertools

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from toyfeat.metrics import match_features, match_mechanisms, mechanism_kinds
from toyfeat.metrics.mechanisms import random_mechanism_coverage

RNG = np.random.default_rng(0)


def smallest_cosine(a, b):
    return float(np.cos(subspace_angles(a.T, b.T)).min())


def blocks(rows, group):
    return [rows[group == value] for value in dict.fromkeys(group.tolist())]


def oracle(rows, group, truth, truth_group):
    """Scores by brute force over all assignments of found to true mechanisms."""
    found, true = blocks(rows, group), blocks(truth, truth_group)
    same = np.array(
        [[smallest_cosine(a, b) * (len(a) == len(b)) for b in true] for a in found]
    )
    within = np.array(
        [[smallest_cosine(a, b) * (len(a) < len(b)) for b in true] for a in found]
    )
    places = itertools.permutations(range(max(len(found), len(true))), len(true))
    padded = np.zeros((max(same.shape), len(true)))
    padded[: len(found)] = same
    best = max(sum(padded[i, j] for j, i in enumerate(p)) for p in places)
    return (
        best / len(true),
        np.mean(same.max(1) >= 0.9),
        np.mean((within.max(1) >= 0.9) & (same.max(1) < 0.9)),
    )


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_principal_angles_and_brute_force(seed):
    rng = np.random.default_rng(seed)
    truth_group = np.array([3, 3, 0, 5, 5, 5, 1])
    truth = rng.normal(size=(7, 8))
    # Turned bases of true subspaces with some noise, one direction of a plane, others.
    noise = rng.choice([0.02, 0.3])
    turned = [rng.normal(size=(len(b), len(b))) @ b for b in blocks(truth, truth_group)]
    rows = np.concatenate([*turned[::-1], truth[:1], rng.normal(size=(2, 8))])
    rows += noise * rng.normal(size=rows.shape)
    group = np.array([9, 4, 4, 4, 2, 1, 1, 0, 7, 7])
    match = match_mechanisms(rows, truth, group=group, truth_group=truth_group)
    wanted = oracle(rows, group, truth, truth_group)
    scores = match.coverage, match.precision, match.inside
    np.testing.assert_allclose(scores, wanted, atol=1e-9)
    assert match.num_found == 6
    assert match.found == np.mean(match.similarity >= 0.9)
    found, true = blocks(rows, group), blocks(truth, truth_group)
    for place, cosine, subspace in zip(
        match.index, match.similarity, true, strict=True
    ):
        if place >= 0:
            exact = smallest_cosine(found[place], subspace)
            assert cosine == pytest.approx(exact, abs=1e-9)


def test_directions_alone_score_as_features():
    rows, truth = RNG.normal(size=(12, 6)), RNG.normal(size=(5, 6))
    rows[:3] = truth[:3] + 0.1 * RNG.normal(size=(3, 6))
    rows[7] = 0
    ours, plain = match_mechanisms(rows, truth), match_features(rows, truth)
    assert ours.coverage == pytest.approx(plain.coverage, abs=1e-12)
    assert ours.precision == plain.precision
    assert (ours.num_found, ours.inside) == (11, 0)


def test_a_plane_is_found_by_a_plane_only():
    truth, pair = np.eye(5)[:2], np.array([0, 0])
    rows = np.eye(5)[[0, 1, 2]]
    one = match_mechanisms(rows[:2], truth, truth_group=pair)
    assert (one.coverage, one.precision, one.inside, one.num_found) == (0, 0, 1, 2)
    space = match_mechanisms(rows, truth, group=np.zeros(3, int), truth_group=pair)
    assert (space.coverage, space.precision, space.inside) == (0, 0, 0)
    # Two rows of one direction are a direction.
    twice = match_mechanisms(rows[[0, 0]], truth, group=pair, truth_group=pair)
    assert (twice.coverage, twice.inside, twice.num_found) == (0, 1, 1)
    # A plane that leaves the true one by 30 degrees along one axis is not precise.
    tilted = np.array([[1.0, 0, 0, 0, 0], [0, np.sqrt(3) / 2, 0.5, 0, 0]])
    match = match_mechanisms(tilted, truth, group=pair, truth_group=pair)
    assert match.coverage == pytest.approx(np.sqrt(3) / 2)
    assert (match.found, match.precision) == (0, 0)


def test_kinds_come_from_the_dimension_of_the_span():
    rows = np.concatenate([np.eye(6), np.zeros((1, 6))])
    group = np.array([5, 5, 0, 2, 2, 2, 8])
    assert mechanism_kinds(rows, group) == ["plane", "direction", "subspace"]
    assert mechanism_kinds(rows[:2]) == ["direction", "direction"]
    assert mechanism_kinds(rows[[0, 0]], np.array([1, 1])) == ["direction"]


def test_nothing_scores_zero():
    none, rows = np.zeros((0, 4)), np.eye(4)
    for found, truth, num in ((none, rows, 0), (rows, none, 4), (0 * rows, rows, 0)):
        match = match_mechanisms(found, truth)
        assert match[2:6] == (0, 0, 0, 0)
        assert match.num_found == num


def test_random_mechanisms_cover_less_with_more_dimensions(key):
    truth = RNG.normal(size=(4, 9))
    pairs = np.array([0, 0, 1, 1])
    lines = random_mechanism_coverage(key, 8, truth)
    planes = random_mechanism_coverage(
        key, 8, truth, group=np.arange(8) // 2, truth_group=pairs
    )
    assert 0 < planes < lines < 0.9
    assert random_mechanism_coverage(key, 8, truth, truth_group=pairs) == 0


@pytest.mark.parametrize(
    ("rows", "group", "match"),
    [
        (np.full((2, 4), np.nan), None, "wanted finite rows"),
        (np.ones(4), None, r"wanted finite rows \[R, D\], got shape \(4,\)"),
        (np.ones((2, 4)), np.zeros(3, int), "group needs one entry per row"),
        (np.ones((2, 5)), None, "must have one width, got 5 and 4"),
    ],
)
def test_arguments_are_checked(rows, group, match):
    with pytest.raises(ValueError, match=f"^match_mechanisms: .*{match}"):
        match_mechanisms(rows, np.eye(4), group=group)
