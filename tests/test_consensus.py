import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as tf
from toyfeat.consensus import (
    Described,
    _outside,
    agreed,
    covariance_of,
    descriptions,
    dictionaries,
    gradient_rows,
    half_square,
    recurring,
)
from toyfeat.models import planted

FEW = tf.Description(examples=1000, steps=300, batch=64, learning_rate=1e-2)
TASKS = {
    "product_space": {"dim": 8, "colours": 3, "shapes": 3},
    "quiet_and_loud": {"dim": 10, "quiet": 4, "loud": 6, "probability": 0.15},
}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_loops(sets, support, cosine):
    """Direction by direction, as it is described."""
    left = [(i, row) for i, rows in enumerate(sets) for row in rows]
    found, supports = [], []
    while left:
        near = [
            [other for other in left if abs(row @ other[1]) >= cosine]
            for _, row in left
        ]
        most = [len({i for i, _ in others}) for others in near]
        best = int(np.argmax(most))
        if most[best] < support:
            break
        rows = np.array([row for _, row in near[best]])
        found.append(np.linalg.eigh(rows.T @ rows)[1][:, -1])
        supports.append(most[best])
        gone = {id(other[1]) for other in near[best]}
        left = [other for other in left if id(other[1]) not in gone]
    return np.array(found), supports


@pytest.mark.parametrize("support", [1, 2, 3])
@pytest.mark.parametrize("cosine", [0.7, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_recurring_is_what_loops_find(seed, cosine, support):
    rng = np.random.default_rng(seed)
    sets = [unit(rng.normal(size=(num, 3))) for num in (5, 9, 7, 0, 6)]
    oracle, supports = by_loops(sets, support, cosine)
    found, counts = recurring(sets, support=support, cosine=cosine)
    assert counts.tolist() == supports
    assert found.shape == (len(supports), 3)
    if supports:
        same = np.abs(np.sum(found * oracle, axis=1))
        np.testing.assert_allclose(same, 1, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-9)


@pytest.mark.parametrize("width", [2, 3])
def test_what_lies_between_two_lines_of_a_plane_does_not_take_them(width):
    """Of a pentagon, whose lines lie 36 degrees apart."""

    def at(*degrees):
        angles = np.radians(degrees)
        rows = np.zeros((len(degrees), width))
        rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
        return rows

    sets = [at(0, 30, 90), at(0, 30, 90), at(15), at(15), at(15)]
    found, counts = recurring(sets, support=2, cosine=0.95)
    assert counts.tolist() == [3, 2, 2, 2]
    cosines = np.abs(found @ at(15, 0, 30, 90).T)
    np.testing.assert_allclose(np.sort(cosines.max(axis=0)), 1, atol=1e-6)


def test_sign_does_not_matter():
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(4, 6)))
    sets = [rows, unit(-rows + 0.01 * rng.normal(size=rows.shape))]
    found, counts = recurring(sets, support=2, cosine=0.95)
    assert counts.tolist() == [2] * 4
    assert np.abs(found @ rows.T).max(0).min() > 0.999


def test_support_is_counted_in_different_sets_only():
    rows = np.eye(3)
    found, counts = recurring(
        [rows[[0, 0, 0, 1]], rows[[1, 2, 2]]], support=2, cosine=0.9
    )
    assert counts.tolist() == [2]
    np.testing.assert_allclose(np.abs(found), rows[1:2], atol=1e-12)


@pytest.mark.parametrize(("most", "least"), [(2, 2), (5, 2), (8, 2), (9, 3), (12, 4)])
def test_what_recurs_a_third_as_often_as_what_recurs_most_is_kept(most, least):
    rows = np.eye(12)
    sets = [rows[:1]] * most + [np.zeros((0, 12))] * (12 - most)
    for i, often in enumerate(range(1, most), start=1):
        for j in range(often):
            sets[j] = np.concatenate([sets[j], rows[i : i + 1]])
    _, counts = recurring(sets, support=None, cosine=0.9)
    assert counts.tolist() == list(range(most, least - 1, -1))


def test_what_recurs_most_comes_first():
    rows = np.eye(4)
    sets = [rows[[0, 1, 2]], rows[[1, 2]], rows[[2, 3]]]
    found, counts = recurring(sets, support=1, cosine=0.9)
    assert counts.tolist() == [3, 2, 1, 1]
    np.testing.assert_allclose(np.abs(found), rows[[2, 1, 0, 3]], atol=1e-12)


def test_a_direction_is_the_middle_of_its_neighbours():
    turn = np.array([0.1, 0.2, 0.3])
    rows = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    found, counts = recurring([rows[:1], rows[1:2], rows[2:]], support=3, cosine=0.99)
    assert counts.tolist() == [3]
    np.testing.assert_allclose(np.abs(found @ rows.T), np.cos([[0.1, 0, 0.1]]))


@pytest.mark.parametrize("support", [2, None])
def test_nothing_that_recurs_is_no_row(support):
    rows = np.eye(4)
    found, counts = recurring([rows[:2], rows[2:]], support=support, cosine=0.9)
    assert found.shape == (0, 4)
    assert counts.shape == (0,)


def taps(grads, dtype=jnp.float32):
    grads = jnp.asarray(grads, dtype)
    return tf.Taps(
        jnp.zeros((len(grads), grads.shape[-1])), grads, jnp.ones(len(grads))
    )


@pytest.fixture
def grads():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(30, 2, 5))
    grads[3] = grads[7, 1] = 0
    grads[9, 0] *= 1e-9
    return grads


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_gradients_that_are_there_have_unit_entries_at_any_scale(scale, grads):
    rows = grads.reshape(-1, 5)
    rows = rows[np.linalg.norm(rows, axis=1) > 1e-6]
    assert len(rows) == 60 - 4
    found = gradient_rows(taps(scale * grads))
    oracle = rows / np.sqrt(np.mean(rows**2))
    np.testing.assert_allclose(found, oracle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_gradients_must_be_finite_and_there(bad, grads):
    grads = 0 * grads
    grads[5, 1, 2] = bad
    with pytest.raises(ValueError, match="gradients must be finite and not all 0"):
        gradient_rows(taps(grads))


def test_half_a_square_is_over_everything_in_an_output():
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=shape) for shape in ((), (3,), (2, 4))]
    a, b, c = (jnp.asarray(leaf, float) for leaf in leaves)
    oracle = sum(np.sum(leaf**2) for leaf in leaves) / 2
    for output in ((a, b, c), {"x": a, "y": [b, {"z": c}]}):
        assert float(half_square(output)) == pytest.approx(oracle, rel=1e-6)
    np.testing.assert_allclose(jax.grad(half_square)(c), c, rtol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_dictionaries_are_unit_rows_of_latents_that_are_used(signed, key):
    rng = np.random.default_rng(0)
    true = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
    codes = rng.uniform(0.5, 1.5, (1000, 1)) * np.eye(4)[rng.integers(4, size=1000)]
    if signed:
        codes *= rng.choice([-1, 1], size=(1000, 1))
    few = FEW._replace(codes=(1, 30), repeats=2, latents=1)
    described = dictionaries(key, jnp.asarray(codes @ true, float), few, signed=signed)
    assert len(described) == 4
    for one in described:
        assert one.shape[1] == 6
        assert 1 <= len(one) <= 16
        np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)
    near = np.abs(np.concatenate(described[:2]) @ true.T)  # those of one code each
    assert near.max(0).min() > 0.99
    assert max(len(one) for one in described[:2]) < 16
    assert np.abs(described[2][0] - described[3][0]).max() > 1e-3


def test_every_setting_has_descriptions_of_both_readouts(key):
    subject = planted.blind(planted.product_space(key, dim=8, colours=3, shapes=3))
    few = FEW._replace(examples=200, steps=3, codes=(1, 2), latents=1)
    (alone,), half, random, planes, taps = descriptions(key, subject, few)
    rates = [few.learning_rate, 1e-4]
    both, *_ = descriptions(key, subject, few, settings={"learning_rate": rates})
    assert [len(sets) for sets in both] == [len(alone)] * 2 == [8, 8]
    for one, other in zip(alone, both[0], strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)  # Adam begins by signs
    changed = [
        np.abs(one[:4] - slow[:4]).max() for one, slow in zip(*both, strict=True)
    ]
    assert np.median(changed) > 0.02
    inputs = subject.sample(jax.random.split(key, 4)[0], few.examples)
    gradients = jax.vmap(jax.grad(lambda a, x: half_of(subject, a, x)), (None, 0))
    oracle = gradients(jnp.zeros(8), inputs)
    assert taps.grads.shape == (200, 1, 8)
    assert [len(rows) for rows in (half, random)] == [200, 200 * few.directions]
    assert planes.shape == (0, 8)
    np.testing.assert_array_equal(half, gradient_rows(taps))
    np.testing.assert_allclose(taps.grads[:, 0], oracle, rtol=1e-4, atol=1e-5)
    acts = np.asarray(taps.acts, np.float64)
    np.testing.assert_allclose(covariance_of(taps), np.cov(acts.T, ddof=0), atol=1e-4)


def half_of(subject, shift, one):
    probes = {subject.site: shift[None]}
    inputs = jax.tree.map(lambda x: x[None], one)
    return half_square(subject.probed(subject.params, inputs, probes)[0])


def test_a_loss_of_dead_latents_is_no_setting(key):
    rows = jax.random.normal(key, (50, 4))
    settings = {"dead_latents": [1.0]}
    with pytest.raises(ValueError, match=r"unknown hyper-parameters .*dead_latents"):
        dictionaries(key, rows, FEW, signed=False, settings=settings)


def test_a_learning_rate_turns_a_row_by_a_twentieth_at_most(key):
    rows = jax.random.normal(key, (100, 16))

    def at(rate):
        few = FEW._replace(steps=3, codes=(1,), repeats=1, latents=1)
        few = few._replace(learning_rate=rate)
        (one,) = dictionaries(key, rows, few, signed=True)
        return one

    most = at(0.05 / 4)
    np.testing.assert_allclose(at(100.0), most, atol=1e-6)
    assert np.abs(at(0.04 / 4) - most).max() > 1e-3


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_readers_in_a_plane_of_a_wider_layer_are_told_apart(rate, key):
    """A pentagon, 36 degrees from line to line, in 16 dimensions."""
    rng = np.random.default_rng(0)
    angles = 2 * np.pi / 5 * np.arange(5)
    plane = np.linalg.qr(rng.normal(size=(16, 16)))[0][:2]
    true = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane
    sizes = rng.uniform(0.5, 1.5, (3000, 1))
    rows = jnp.asarray(sizes * true[rng.integers(5, size=3000)], float)
    few = FEW._replace(codes=(1, 2), steps=500, learning_rate=rate)
    described = dictionaries(key, rows, few, signed=False)
    for one in described:
        np.testing.assert_allclose(one, one @ plane.T @ plane, atol=1e-6)
    found, _ = recurring(described, support=None, cosine=0.95)
    assert tf.match_features(found, true).coverage >= 0.97


def test_a_direction_that_only_the_last_rows_have_is_in_the_span(key):
    rows = np.zeros((25_000, 3))
    rows[:, 0], rows[-25:, 1] = 1.0, 1.0
    few = FEW._replace(codes=(2,), repeats=1, steps=5)
    (one,) = dictionaries(key, jnp.asarray(rows, float), few, signed=False)
    assert np.linalg.matrix_rank(one, tol=1e-3) == 2


@functools.cache
def task(name):
    return getattr(planted, name)(jax.random.key(0), **TASKS[name])


def scaled(subject, factor):
    def probed(params, inputs, probes):
        outputs, acts = subject.probed(params, inputs, probes)
        return factor * outputs, acts

    return subject._replace(probed=probed)


def recorded(subject, seen):
    def sample(key, num):
        seen.append(subject.sample(key, num))
        return seen[-1]

    return subject._replace(sample=sample)


@functools.cache
def found(name):
    """What is found, and the inputs it was found with."""
    seen = []
    subject = recorded(planted.blind(task(name)), seen)
    return tf.consensus(jax.random.key(1), subject, description=FEW), seen[0]


@pytest.mark.parametrize("name", TASKS)
def test_readers_are_found(name):
    result, truth = found(name)[0], task(name).truth
    assert tf.match_features(result.found.readers, truth.readers).coverage >= 0.95
    assert result.descriptions == 12
    assert result.found.readers.shape == result.found.writers.shape
    assert result.support.shape == result.found.readers.shape[:1]
    assert np.all(np.diff(result.support) <= 0)
    assert result.support.max() <= 12
    assert result.support.min() >= max(2, result.support.max() // 3)
    lengths = np.linalg.norm(result.found.readers, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_who_asks_for_more_support_gets_the_readers_that_have_it():
    (usual, _), subject = found("product_space"), planted.blind(task("product_space"))
    few = tf.consensus(jax.random.key(1), subject, description=FEW, support=6)
    there = usual.support >= 6
    assert 0 < there.sum() < len(there)
    np.testing.assert_array_equal(few.support, usual.support[there])
    cosines = np.sum(np.asarray(few.found.readers * usual.found.readers[there]), axis=1)
    assert cosines.min() >= 2 * 0.95**2 - 1  # each is .95 from what recurs at least


def test_what_recurs_is_fitted_to_the_gradients():
    name = "quiet_and_loud"
    subject, true = planted.blind(task(name)), np.asarray(task(name).truth.readers)
    described = descriptions(jax.random.key(1), subject, FEW)
    near, counts = recurring(described.sets[0])
    fitted, same = agreed(described.sets[0], described)
    np.testing.assert_array_equal(counts, same)
    assert np.abs(np.sum(near * fitted, axis=1)).min() >= 0.95
    lost = [1 - tf.match_features(rows, true).coverage for rows in (near, fitted)]
    assert lost[1] < 0.5 * lost[0]
    (result, _), num = found(name), len(fitted)
    np.testing.assert_allclose(result.found.readers[:num], fitted, atol=1e-4)


@pytest.mark.parametrize(("often", "kept"), [(5, False), (8, True)])
def test_a_sum_is_left_out_unless_it_recurs_as_often_as_readers(often, kept):
    """Of 10 in 16 dimensions; its support stands between those of readers."""
    rng = np.random.default_rng(0)
    true = np.linalg.qr(rng.normal(size=(16, 16)))[0][:10]
    chosen = rng.permuted(np.tile(np.arange(10), (2000, 1)), axis=1)[:, :2]
    codes = np.zeros((2000, 10))
    np.put_along_axis(codes, chosen, rng.normal(size=(2000, 2)), axis=1)
    rows = np.concatenate([codes @ true, np.repeat([true[0] + true[1]], 30, axis=0)])
    between = unit(true[:1] + true[1:2])
    sets = [
        np.concatenate([true[: 10 if i < 4 else 5], between[: int(i < often)]])
        for i in range(12)
    ]
    rows = jnp.asarray(rows, float)
    dense = jnp.asarray(rng.normal(size=(500, 16)), float)
    for half, random in ((dense, rows), (rows, dense)):
        described = Described([sets], half, random, np.zeros((0, 16)), None)
        found, counts = agreed(sets, described)
        assert counts.tolist() == [12] * 5 + [often] * kept + [4] * 5
        cosines = np.abs(found @ true.T)
        assert np.sum(cosines.max(1) > 0.999) == 10
        assert cosines.max(0).min() > 0.999
        assert (cosines[5].max() < 0.8) == kept


def test_mixtures_of_circles_are_left_out():
    planes = unit(np.random.default_rng(0).normal(size=(4, 9)))
    mixed = unit(np.random.default_rng(1).normal(size=(5, 4)) @ planes)
    beside = np.linalg.svd(planes)[2][4:]
    tilted = unit(mixed[0] + 0.2 * beside[0])  # .981 of it inside
    nearly = unit(mixed[0] + 0.1 * beside[0])  # .995
    rows = np.concatenate([mixed, beside, [tilted, nearly]])
    assert _outside(rows, planes).tolist() == [False] * 5 + [True] * 6 + [False]
    assert _outside(rows, planes[:0]).all()


@pytest.mark.parametrize("rate", [1e-3, 1.0])
def test_readers_are_found_at_a_slow_and_at_a_fast_learning_rate(rate):
    few = FEW._replace(learning_rate=rate)
    subject = planted.blind(task("product_space"))
    result = tf.consensus(jax.random.key(1), subject, description=few)
    truth = task("product_space").truth
    assert tf.match_features(result.found.readers, truth.readers).coverage >= 0.95


@pytest.mark.parametrize("name", TASKS)
def test_writers_are_the_readers_times_the_covariance(name):
    (result, inputs), subject = found(name), planted.blind(task(name))
    acts = subject.probed(subject.params, inputs, {})[1][subject.site]
    assert acts.shape == (FEW.examples, TASKS[name]["dim"])
    spread = np.cov(np.asarray(acts, np.float64).T, bias=True)
    oracle = np.asarray(result.found.readers, np.float64) @ spread
    close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(spread).max()}
    np.testing.assert_allclose(result.found.writers, oracle, **close)


@pytest.mark.parametrize("power", [0, -20, 20])
def test_the_same_key_finds_the_same_in_any_unit_of_the_outputs(power):
    result, _ = found("quiet_and_loud")
    subject = scaled(planted.blind(task("quiet_and_loud")), 2.0**power)
    again = tf.consensus(jax.random.key(1), subject, description=FEW)
    np.testing.assert_array_equal(result.support, again.support)
    for one, two in zip(result.found, again.found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_planes_come_last_and_have_no_support():
    waves = planted.modular_addition(
        jax.random.key(2), modulus=13, frequencies=2, dim=12
    )
    few = FEW._replace(steps=20, repeats=1)
    result = tf.consensus(jax.random.key(1), planted.blind(waves), description=few)
    assert result.descriptions == 6
    assert result.support[-4:].tolist() == [0] * 4
    assert np.all(result.support[:-4] >= 2)
    planes, truth = result.found.readers[-4:], waves.truth
    inside = np.linalg.svd(planes, full_matrices=False)[2]
    others = np.linalg.norm(result.found.readers[:-4] @ inside.T, axis=1)
    assert others.max(initial=0.0) < 0.99
    assert tf.match_features(planes, truth.readers, group=truth.group).coverage > 0.95


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"support": 0}, r"wanted support in 1 \.\. 12.* got 0 and 0.95"),
        ({"support": 13}, "got 13 and 0.95"),
        ({"cosine": 0.0}, r"cosine in \(0, 1\), got None and 0.0"),
        ({"cosine": 1.0}, "got None and 1.0"),
    ],
)
def test_support_and_cosine_must_be_possible(bad, match, key):
    with pytest.raises(ValueError, match=f"^consensus: .*{match}"):
        tf.consensus(key, planted.blind(task("product_space")), description=FEW, **bad)


@pytest.mark.parametrize("factor", [0.0, np.nan])
def test_a_model_without_gradients_is_refused(factor, key):
    subject = scaled(planted.blind(task("product_space")), factor)
    few = FEW._replace(examples=20)
    with pytest.raises(ValueError, match="consensus: gradients must be finite and not"):
        tf.consensus(key, subject, description=few)
