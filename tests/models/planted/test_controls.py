"""Controls have nothing to find: their gradients are dense, or noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.models import planted

KEY = jax.random.key(0)


def taps_of(task, num):
    inputs = task.sample(jax.random.key(1), num)
    half = ft.readouts.half_squared_norm()
    taps = ft.tap(task.probed, task.params, inputs, sites=task.site, readout=half)
    return np.asarray(taps["acts"].acts, np.float64), np.asarray(
        taps["acts"].grads[:, 0], np.float64
    )


@pytest.mark.slow
def test_a_random_network_reads_all_of_its_directions_in_every_example():
    task = planted.random_network(KEY, dim=5, width=16, layers=2, outputs=3)
    acts, grads = taps_of(task, 40)
    first, second, last = (np.asarray(w, np.float64) for w in task.params["weights"])
    one, two = np.tanh(acts @ first), np.tanh(np.tanh(acts @ first) @ second)
    back = (two @ last @ last.T * (1 - two**2)) @ second.T * (1 - one**2)
    np.testing.assert_allclose(grads, back @ first.T, atol=1e-4 * np.abs(grads).max())
    assert np.mean(np.abs(back) > 1e-3 * np.abs(back).max()) > 0.9
    np.testing.assert_allclose(np.linalg.cond(task.params["shape"]), 10, rtol=1e-4)


def test_unrelated_labels_have_gradients_that_are_noise():
    task = planted.unrelated_labels(KEY, dim=6, features=8, outputs=1)
    inputs = task.sample(jax.random.key(1), 4000)
    acts, grads = taps_of(task, 4000)
    shape = np.asarray(task.params["shape"], np.float64)
    rows = np.asarray(inputs["noise"], np.float64)[:, 0] @ shape
    outputs = 10 * np.asarray(inputs["labels"], np.float64)[:, 0]
    outputs += np.sum(rows * acts, axis=1)
    oracle = outputs[:, None] * rows
    np.testing.assert_allclose(grads, oracle, atol=1e-4 * np.abs(oracle).max())
    # Neither gradients nor their squares go with the activations.
    on = np.linalg.norm(acts, axis=1) > 0
    left = np.corrcoef(np.abs(acts[on]).T, np.abs(grads[on]).T)[:6, 6:]
    assert np.abs(left).max() < 4.5 / np.sqrt(on.sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random_network", "unrelated_labels"])
def test_nothing_is_planted(name):
    task = getattr(planted, name)(
        KEY, dim=5, **({"width": 12} if name == "random_network" else {"features": 6})
    )
    assert task.truth.readers.shape == task.truth.writers.shape == (0, 5)
    inputs = task.sample(jax.random.key(1), 7)
    assert task.features(task.params, inputs).shape == (7, 0)
    ft.check_no_mixing(task.probed, task.params, inputs)
    rows = jnp.eye(5)[:2]
    scores = ft.metrics.score_task(KEY, task, ft.Features(rows, rows), examples=20)
    assert (scores.num_mechanisms, scores.precision) == (2, 0)
    other = planted.recondition(KEY, task)
    assert other.truth.readers.shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: planted.random_network(KEY, width=40), "random_network: .* width 40"),
        (lambda: planted.unrelated_labels(KEY, dim=1), "unrelated_labels: .* dim 1"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
