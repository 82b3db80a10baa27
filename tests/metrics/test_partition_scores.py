"""Scores of decomposed weights against values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat import metrics
from toyfeat.metrics.partition import _assign_greedily


def test_cosines_and_lengths_by_hand():
    # Feature 0 is written along (3, 4), feature 1 along (0, 2).
    weight = np.array([[3.0, 4.0], [0.0, 2.0]])
    # Part 0 writes (3, 4) / 2 for feature 0; part 1 writes (2, 2) for feature 1, and
    # part 2 nothing; a part of the opposite sign has a cosine of -1, not of 1.
    v = np.array([[0.5, 0.0, 0.0, -1.0], [0.0, 2.0, 0.0, 0.0]])
    u = np.array([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [3.0, 4.0]])
    scores = metrics.mean_max_cosine(v, u, weight)
    np.testing.assert_allclose(scores.cosines, [1, 0.5**0.5])
    np.testing.assert_allclose(scores.ratios, [0.5, 2**0.5])
    assert scores.best.tolist() == [0, 1]
    assert scores.mmcs == pytest.approx((1 + 0.5**0.5) / 2)
    assert scores.ml2r == pytest.approx((0.5 + 2**0.5) / 2)


def test_identity_error_counts_every_live_column():
    perfect = np.zeros((3, 5))
    perfect[[0, 1, 2], [4, 0, 2]] = 1
    assert metrics.identity_ci_error(perfect) == 0
    # Feature 1 shares its column in part (1), feature 2 is split (1), feature 0 is
    # only half on (1), and .15 counts at .1 but not at .2 (1).
    wrong = perfect.copy()
    wrong[2, 0], wrong[2, 1], wrong[0, 4], wrong[1, 3] = 0.5, 0.6, 0.5, 0.15
    assert metrics.identity_ci_error(wrong) == 4
    assert metrics.identity_ci_error(wrong, tolerance=0.2) == 3
    # Fewer columns than features.
    assert metrics.identity_ci_error(np.eye(3)[:, :2]) == 1
    rows, columns = _assign_greedily(perfect)
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 2], [4, 0, 2])


def test_dense_error_counts_columns():
    matrix = np.array([[1.0, 0.95, 0.3, 0.0], [0.2, 0.9, 0.0, 0.05]])
    assert metrics.dense_ci_error(matrix, 2) == 1  # column 2 should be off
    assert metrics.dense_ci_error(matrix, 3) == 1  # column 2 should be on
    assert metrics.dense_ci_error(matrix[:, [3, 1, 0]], 2) == 0
    assert metrics.dense_ci_error(matrix[:, [3, 2]], 0, tolerance=0.3) == 0


def test_counts_by_hand():
    values = np.array([[[0.05, 0.2, 1.0]], [[0.0, 0.11, 0.0]]])  # [B 2, T 1, C 3]
    assert metrics.component_l0(values) == 1.5
    assert metrics.component_l0(values, weights=[3, 1]) == 1.75
    assert metrics.component_l0(values, threshold=0) == 2
    assert metrics.alive_components(values) == 2


def test_an_adversary_climbs_to_the_corner():
    slope = np.array([1.0, -2.0, 0.0], np.float32)
    sources = {"a": jnp.full((1, 3), 0.5)}

    def error(sources):
        return jnp.sum(sources["a"] * slope[None])

    # Two steps of .1 move the first up and the second down; five reach the corner.
    two = metrics.adversarial_error(error, sources, steps=2)
    assert float(two) == pytest.approx(0.7 - 2 * 0.3)
    assert float(metrics.adversarial_error(error, sources, steps=9)) == 1.0


BAD = [
    (
        lambda: metrics.mean_max_cosine(np.eye(3), np.eye(2), np.eye(3)),
        "transpose them",
    ),
    (lambda: metrics.mean_max_cosine(np.eye(2), np.eye(2), np.diag([1, 0])), "ignores"),
    (lambda: metrics.identity_ci_error(np.ones(3)), r"\[F, C\], got \(3,\)"),
    (lambda: metrics.identity_ci_error(np.eye(3), tolerance=0.7), "tolerance"),
    (lambda: metrics.dense_ci_error(np.eye(3), 4), "0 .. 3, got 4"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
