import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import toyfeat as ft
from examples.squaring import network as squaring
from examples.squaring.network import Squaring


def density(task):
    if task.low is None:
        return stats.norm.pdf, -12.0, 12.0
    width = task.high - task.low
    return (lambda x: 1 / width), task.low, task.high


def expectation(task, fn):
    pdf, low, high = density(task)
    points = [0.0] if low < 0 < high else None
    return integrate.quad(lambda x: fn(x) * pdf(x), low, high, points=points)[0]


INPUTS = [
    Squaring(bias=False),
    Squaring(bias=False, low=-0.2),
    Squaring(bias=False, low=0.25),
    Squaring(bias=False, low=None),
]


@pytest.mark.parametrize("task", INPUTS, ids=lambda t: f"{t.low}")
def test_no_bias_error_is_the_least_squares_residual_of_two_rays(task):
    rays = [lambda x: max(x, 0.0), lambda x: max(-x, 0.0)]
    gram = np.array(
        [
            [expectation(task, lambda x, f=f, g=g: f(x) * g(x)) for f in rays]
            for g in rays
        ]
    )
    right = np.array([expectation(task, lambda x, f=f: f(x) * x**2) for f in rays])
    fit = right @ np.linalg.lstsq(gram, right, rcond=1e-12)[0]
    oracle = expectation(task, lambda x: x**4) - fit
    assert squaring.no_bias_error(task) == pytest.approx(oracle, rel=1e-6)


def test_no_bias_errors_of_the_two_textbook_inputs():
    assert squaring.no_bias_error(INPUTS[0]) == pytest.approx(1 / 80)
    assert squaring.no_bias_error(INPUTS[3]) == pytest.approx(3 - 8 / np.pi)


@pytest.mark.slow_cases
@pytest.mark.parametrize("task", INPUTS, ids=lambda t: f"{t.low}")
def test_no_bias_variances_are_those_of_the_activations(task, key):
    e = np.asarray(jax.random.normal(key, (10,)), np.float64)

    def cov(i, j):
        def act(x, k):
            return max(e[k] * x, 0.0)

        mean = [expectation(task, lambda x, k=k: act(x, k)) for k in (i, j)]
        both = expectation(task, lambda x: act(x, i) * act(x, j))
        return both - mean[0] * mean[1]

    matrix = np.array([[cov(i, j) for j in range(10)] for i in range(10)])
    oracle = np.linalg.eigvalsh(matrix)[::-1]
    closed = squaring.no_bias_variances(task, jnp.asarray(e, jnp.float32))
    np.testing.assert_allclose(closed, oracle[:2], rtol=1e-4, atol=1e-6)
    assert np.all(np.abs(oracle[2:]) < 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("residual", [0, 6])
def test_readers_are_the_gradients_of_the_unrotated_outputs(residual, key):
    task = Squaring(3, 8, residual=residual, probability=0.5)
    params = squaring.initial_params(key, task)
    rotation = jnp.linalg.qr(jax.random.normal(key, (3, 3)))[0]
    x = squaring.random_inputs(key, task, 50)

    def squares(acts):  # the part of the network after the hidden layer, unrotated
        stream = x[0] @ params["embed"] if residual else 0.0
        out = stream + acts @ params["w_out"]
        return rotation.T @ (out @ params["unembed"] if residual else out)

    cov = jnp.cov(jax.random.normal(key, (8, 40)))
    truth = squaring.truth(task, params, rotation, cov)
    oracle = jax.jacrev(squares)(jnp.ones(8))
    np.testing.assert_allclose(truth.readers, oracle, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(truth.writers, oracle @ cov, rtol=1e-4, atol=1e-5)


def test_writers_are_the_regression_of_activations_on_what_is_read(key):
    task = Squaring(2, 6)
    params = squaring.initial_params(key, task)
    x = squaring.random_inputs(key, task, 4000)
    taps = ft.tap(squaring.probed, params, x, sites="hidden", readout=None)["hidden"]
    acts = np.asarray(taps.acts, np.float64)
    acts -= acts.mean(0)
    truth = squaring.truth(task, params, jnp.eye(2), jnp.asarray(acts.T @ acts / 4000))
    for reader, writer in zip(truth.readers, truth.writers, strict=True):
        read = acts @ np.asarray(reader, np.float64)
        regression = acts.T @ read / (read @ read)
        cosine = regression @ writer / np.linalg.norm(regression)
        assert cosine / np.linalg.norm(writer) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "mean", "active"),
    [
        (Squaring(), 0.0, 1.0),
        (Squaring(low=-0.2), 0.4, 1.0),
        (Squaring(low=None), 0.0, 1.0),
        (Squaring(4, 8, low=-0.5, probability=0.1), 0.025, 0.1),
    ],
)
def test_inputs_have_the_distribution_of_the_task(task, mean, active, key):
    x = np.asarray(squaring.random_inputs(key, task, 20_000))
    error = 4 / np.sqrt(x.size)
    assert x.shape == (20_000, task.features)
    assert x.mean() == pytest.approx(mean, abs=error)
    assert (x != 0).mean() == pytest.approx(active, abs=error)
    if task.low is not None:
        assert task.low <= x.min() <= x.max() <= task.high


@pytest.mark.slow
def test_a_population_of_seeds_equals_training_each_alone(key):
    keys = jax.random.split(key, 3)
    settings = {"steps": 40, "batch": 16, "learning_rate": 1e-2, "chunk": 20}
    together = squaring.train(keys, Squaring(2, 5), **settings)
    for index in range(3):
        alone = squaring.train(keys[index : index + 1], Squaring(2, 5), **settings)
        expected = jax.tree.map(lambda x: x[0], alone)
        got = jax.tree.map(lambda x, i=index: x[i], together)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_chunks_do_not_change_what_is_learned(key):
    keys = jax.random.split(key, 2)
    settings = {"steps": 40, "batch": 16, "learning_rate": 1e-2}
    one = squaring.train(keys, Squaring(), chunk=40, **settings)
    two = squaring.train(keys, Squaring(), chunk=10, **settings)
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_training_reports_progress_and_reaches_the_closed_form(key):
    seen = []
    squaring.train(
        jax.random.split(key, 4),
        Squaring(bias=False),
        steps=2000,
        batch=256,
        learning_rate=5e-3,
        on_chunk=lambda done, losses: seen.append((done, np.median(losses))),
    )
    assert [done for done, _ in seen] == [500, 1000, 1500, 2000]
    assert seen[-1][1] == pytest.approx(1 / 80, rel=0.1)


@pytest.mark.parametrize("name", ["steps", "batch", "chunk"])
def test_counts_must_be_positive(name, key):
    settings = {"steps": 1, "batch": 1, "chunk": 1, "learning_rate": 0.1, name: 0}
    with pytest.raises(ValueError, match=f"train: {name} must be at least 1, got 0"):
        squaring.train(jax.random.split(key, 1), Squaring(), **settings)


def test_a_loss_that_is_not_finite_stops_the_training(key):
    with pytest.raises(FloatingPointError, match="not finite by step 20"):
        squaring.train(
            jax.random.split(key, 1),
            Squaring(),
            steps=100,
            batch=4,
            learning_rate=1e30,
            chunk=20,
        )
