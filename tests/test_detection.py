import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as tf


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
def test_precision_recall_and_uniqueness_are_their_definitions(seed):
    found, truth, codes, planted = example(seed)
    means, unique = by_hand(found, truth, codes, planted)
    got = tf.detection(found, truth, [(codes, planted)])
    np.testing.assert_allclose(got, means, rtol=1e-6)
    assert tf.uniqueness(found, truth) == unique


def test_counts_are_over_all_batches():
    found, truth, codes, planted = example()
    whole = tf.detection(found, truth, [(codes, planted)])
    parts = zip(np.split(codes, [30, 110]), np.split(planted, [30, 110]), strict=True)
    np.testing.assert_allclose(tf.detection(found, truth, parts), whole, rtol=1e-6)


def test_length_and_sign_of_a_direction_do_not_matter():
    found, truth, codes, planted = example()
    sizes = np.linspace(-3, 4, len(found))[:, None]
    again = tf.detection(sizes * found, 2 * truth, [(codes, planted)])
    np.testing.assert_allclose(again, tf.detection(found, truth, [(codes, planted)]))
    assert tf.uniqueness(sizes * found, 2 * truth) == tf.uniqueness(found, truth)


def test_the_truth_itself_is_perfect():
    _, truth, _, planted = example()
    fires = planted[:, planted.any(0)]
    rows = truth[planted.any(0)]
    assert tf.detection(rows, rows, [(fires, fires)]) == (1.0, 1.0, 1.0)
    assert tf.uniqueness(truth, truth) == 1.0
    assert tf.uniqueness(np.zeros((2, 5)), truth) == 0.5  # both are equally far


def test_errors():
    found, truth, codes, planted = example()
    with pytest.raises(ValueError, match=r"detection: wanted codes \[N, 12\] and"):
        tf.detection(found, truth, [(codes[:, 1:], planted)])
    with pytest.raises(ValueError, match=r"got shapes \(200, 12\) and \(1, 9\)"):
        tf.detection(found, truth, [(codes, jnp.zeros((1, 9)))])
    with pytest.raises(ValueError, match=r"uniqueness: wanted found \[R, D\]"):
        tf.uniqueness(found[:, 1:], truth)
    with pytest.raises(ValueError, match="at least one found"):
        tf.uniqueness(found[:0], truth)


def test_no_batches_are_not_a_score():
    with pytest.raises(ValueError, match="got no pair of codes"):
        tf.detection(np.eye(3), np.eye(3), iter(()))


@pytest.mark.parametrize("place", ["found", "truth", "codes", "planted"])
def test_what_is_not_finite_is_refused(place):
    names = ("found", "truth", "codes", "planted")
    parts = dict(zip(names, example(), strict=True))
    parts[place][2, 1] = np.nan
    pair = [(parts["codes"], parts["planted"])]
    with pytest.raises(ValueError, match=r"detection: .* must be finite"):
        tf.detection(parts["found"], parts["truth"], pair)
    if place in ("found", "truth"):
        with pytest.raises(ValueError, match=r"uniqueness: .* must be finite"):
            tf.uniqueness(parts["found"], parts["truth"])
