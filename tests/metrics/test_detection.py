import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft


def example(seed=0, num=200, latents=12, features=9, dim=5):
    rng = np.random.default_rng(seed)
    found, truth = rng.normal(size=(latents, dim)), rng.normal(size=(features, dim))
    codes = rng.normal(size=(num, latents)) * (rng.random((num, latents)) < 0.3)
    planted = np.abs(rng.normal(size=(num, features)))
    planted *= rng.random((num, features)) < 0.2
    codes[:, 3] = 0  # never fires
    planted[:, 4] = 0
    return found, truth, codes.astype(np.float32), planted.astype(np.float32)


def by_hand(found, truth, codes, planted):
    """Latent by latent, in plain loops."""
    precisions, recalls, scores, nearest = [], [], [], []
    for row, code in zip(found, codes.T, strict=True):
        cosines = [
            abs(row @ true) / np.linalg.norm(row) / np.linalg.norm(true)
            for true in truth
        ]
        nearest.append(int(np.argmax(cosines)))
        fires, there = code != 0, planted[:, nearest[-1]] > 0
        both = np.sum(fires & there)
        precision = both / fires.sum() if fires.sum() else 0.0
        recall = both / there.sum() if there.sum() else 0.0
        total = precision + recall
        precisions.append(precision)
        recalls.append(recall)
        scores.append(2 * precision * recall / total if total else 0.0)
    means = [np.mean(x) for x in (precisions, recalls, scores)]
    return means, len(set(nearest)) / len(found)


@pytest.mark.parametrize("seed", range(3))
def test_precision_recall_and_uniqueness_equal_plain_loops(seed):
    found, truth, codes, planted = example(seed)
    means, unique = by_hand(found, truth, codes, planted)
    got = ft.metrics.latent_classification(found, truth, [(codes, planted)])
    np.testing.assert_allclose(got, means, rtol=1e-6)
    assert ft.metrics.feature_uniqueness(found, truth) == unique


@pytest.mark.slow
def test_batches_are_counted_together():
    found, truth, codes, planted = example()
    whole = ft.metrics.latent_classification(found, truth, [(codes, planted)])
    parts = zip(np.split(codes, [30, 110]), np.split(planted, [30, 110]), strict=True)
    np.testing.assert_allclose(
        ft.metrics.latent_classification(found, truth, parts), whole, rtol=1e-6
    )


def test_length_and_sign_of_a_direction_do_not_matter():
    found, truth, codes, planted = example()
    sizes = np.linspace(-3, 4, len(found))[:, None]
    again = ft.metrics.latent_classification(
        sizes * found, 2 * truth, [(codes, planted)]
    )
    np.testing.assert_allclose(
        again, ft.metrics.latent_classification(found, truth, [(codes, planted)])
    )
    assert ft.metrics.feature_uniqueness(
        sizes * found, 2 * truth
    ) == ft.metrics.feature_uniqueness(found, truth)


def test_the_truth_itself_is_perfect():
    _, truth, _, planted = example()
    fires = planted[:, planted.any(0)]
    rows = truth[planted.any(0)]
    assert ft.metrics.latent_classification(rows, rows, [(fires, fires)]) == (
        1.0,
        1.0,
        1.0,
    )
    assert ft.metrics.feature_uniqueness(truth, truth) == 1.0
    assert (
        ft.metrics.feature_uniqueness(np.zeros((2, 5)), truth) == 0.5
    )  # both are equally far


def test_shapes_must_fit():
    found, truth, codes, planted = example()
    with pytest.raises(
        ValueError, match=r"latent_classification: wanted codes \[N, 12\] and"
    ):
        ft.metrics.latent_classification(found, truth, [(codes[:, 1:], planted)])
    with pytest.raises(ValueError, match=r"got shapes \(200, 12\) and \(1, 9\)"):
        ft.metrics.latent_classification(found, truth, [(codes, jnp.zeros((1, 9)))])
    with pytest.raises(
        ValueError, match=r"feature_uniqueness: wanted directions \[R, D\]"
    ):
        ft.metrics.feature_uniqueness(found[:, 1:], truth)
    with pytest.raises(ValueError, match="at least one direction"):
        ft.metrics.feature_uniqueness(found[:0], truth)


def test_without_batches_it_raises():
    with pytest.raises(ValueError, match="got no pair of codes"):
        ft.metrics.latent_classification(np.eye(3), np.eye(3), iter(()))


@pytest.mark.parametrize("place", ["found", "truth", "codes", "planted"])
def test_values_must_be_finite(place):
    names = ("found", "truth", "codes", "planted")
    parts = dict(zip(names, example(), strict=True))
    parts[place][2, 1] = np.nan
    pair = [(parts["codes"], parts["planted"])]
    with pytest.raises(ValueError, match=r"latent_classification: .* must be finite"):
        ft.metrics.latent_classification(parts["found"], parts["truth"], pair)
    if place in ("found", "truth"):
        with pytest.raises(ValueError, match=r"feature_uniqueness: .* must be finite"):
            ft.metrics.feature_uniqueness(parts["found"], parts["truth"])
