"""Residual networks of the papers on parameters: against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.models import planted

KEY = jax.random.key(0)
SHORT = {"steps": 300, "batch": 128, "probability": 0.1}


@functools.cache
def residual(layers):
    return planted.resid_mlp(
        KEY, layers=layers, features=7, neurons=4, embedding=20, **SHORT
    )


@functools.cache
def compressed():
    return planted.compressed_computation(KEY, features=8, neurons=4, **SHORT)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def stream_by_hand(params, x):
    """Neurons and outputs, through the residual stream as it is written."""
    stream, hidden = x @ params["embed"], []
    for read, write in zip(params["in"], params["out"], strict=True):
        hidden.append(np.maximum(stream @ read, 0))
        stream = stream + hidden[-1] @ write
    return np.concatenate(hidden, 1), stream @ params["embed"].T


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
def test_residual_networks_are_what_their_stream_makes_of_inputs(layers):
    task = residual(layers)
    x = task.sample(jax.random.key(1), 30)
    outputs, sites = task.probed(task.params, x, {})
    neurons, oracle = stream_by_hand(float64(task.params), float64(x))
    np.testing.assert_allclose(sites["neurons"], neurons, atol=1e-5)
    np.testing.assert_allclose(outputs, oracle, atol=1e-5)
    # Outputs read the neurons by the readers of the truth, and nothing else.
    embed = float64(task.params["embed"])
    left = oracle - float64(x) @ embed @ embed.T
    readers = float64(task.truth.readers)
    assert readers.shape == (7, 4 * layers)
    np.testing.assert_allclose(neurons @ readers.T, left, atol=1e-4)
    half = ft.readouts.half_squared_norm()
    taps = ft.tap(task.probed, task.params, x, sites="neurons", readout=half)
    grads = float64(taps["neurons"].grads[:, 0])
    np.testing.assert_allclose(grads, oracle @ readers, atol=1e-4)
    rows = np.linalg.norm(embed, axis=1)
    np.testing.assert_allclose(rows, 1, rtol=1e-5)


def test_residual_writers_rates_and_fit_are_those_of_the_data():
    task = residual(1)
    x = task.sample(jax.random.key(2), 20_000)
    outputs, sites = task.probed(task.params, x, {})
    truth = float64(task.truth[:3])
    oracle = truth[0] @ np.cov(float64(sites["neurons"]).T)
    scale = np.abs(oracle).max()
    np.testing.assert_allclose(truth[1], oracle, atol=0.05 * scale)
    rate = np.mean(float64(task.features(task.params, x)) > 0, axis=0)
    np.testing.assert_allclose(rate, truth[2], atol=4.5 * 0.0016)
    wanted = float64(x) + np.maximum(float64(x), 0)
    left = np.sum((float64(outputs) - wanted) ** 2)
    share = left / np.sum((wanted - wanted.mean(0)) ** 2)
    assert task.fit == pytest.approx(share, rel=0.1)


def test_compressed_computation_has_a_reader_per_neuron():
    task = compressed()
    x = task.sample(jax.random.key(1), 30)
    outputs, sites = task.probed(task.params, x, {})
    neurons, oracle = stream_by_hand(float64(task.params), float64(x))
    np.testing.assert_allclose(outputs, oracle, atol=1e-5)
    np.testing.assert_allclose(sites["mlp_in"], x)  # a dimension per feature
    readers = float64(task.truth.readers)
    assert readers.shape == (4, 8)
    np.testing.assert_allclose(
        np.maximum(float64(x) @ readers.T, 0), neurons, atol=1e-5
    )
    np.testing.assert_allclose(task.features(task.params, x), neurons, atol=1e-5)
    many = task.features(task.params, task.sample(jax.random.key(3), 20_000))
    rate = np.mean(float64(many) > 0, axis=0)
    np.testing.assert_allclose(task.truth.frequency, rate, atol=0.02)


def test_training_lowers_the_loss_and_keys_differ():
    first = planted.resid_mlp(
        KEY, features=7, neurons=4, embedding=20, **SHORT | {"steps": 1}
    )
    assert residual(1).fit < 0.8 * first.fit
    assert jnp.all(first.params["embed"] == residual(1).params["embed"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: planted.resid_mlp(KEY, layers=0), "resid_mlp: sizes must be at least"),
        (
            lambda: planted.resid_mlp(KEY, batch=0),
            "resid_mlp: sizes must be at least 1",
        ),
        (lambda: planted.resid_mlp(KEY, probability=0.0), "resid_mlp: the probability"),
        (
            lambda: planted.compressed_computation(KEY, neurons=100),
            "compressed_computation: wanted fewer neurons than features = 100, got 100",
        ),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_sizes_are_ints():
    with pytest.raises(TypeError, match="resid_mlp: neurons must be an int"):
        planted.resid_mlp(KEY, neurons=2.0)
