"""Gated units and attention reads: gradients against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

import toyfeat as ft
from toyfeat.models import planted

N = 16
KINDS = ("bilinear", "relu", "silu", "sigmoid")
every = pytest.mark.parametrize("kind", KINDS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Gate and value with their slopes, by hand.
BY_HAND = {
    "bilinear": (lambda s: s, np.ones_like, lambda t: t, np.ones_like),
    "relu": (
        lambda s: np.maximum(s - 0.1, 0),
        lambda s: 1.0 * (s > 0.1),
        lambda t: t,
        np.ones_like,
    ),
    "silu": (
        lambda s: s * sigmoid(s),
        lambda s: sigmoid(s) * (1 + s * (1 - sigmoid(s))),
        lambda t: t,
        np.ones_like,
    ),
    "sigmoid": (
        lambda s: np.maximum(s - 0.1, 0),
        lambda s: 1.0 * (s > 0.1),
        sigmoid,
        lambda t: sigmoid(t) * (1 - sigmoid(t)),
    ),
}


def make(kind, **more):
    knobs = {"units": 4, "dim": 11, "kind": kind, "probability": 0.4} | more
    return planted.gated_units(jax.random.key(0), **knobs)


def jacobians(task, inputs):
    """``[N, O, D]``, of each example alone, through a probe that is added."""

    def output(probe, example):
        probes = {task.site: probe[None]}
        return task.probed(task.params, example[None], probes)[0][0]

    zero = jnp.zeros(task.truth.readers.shape[1])
    return np.asarray(jax.vmap(jax.jacrev(output), in_axes=(None, 0))(zero, inputs))


@pytest.mark.slow_cases
@every
def test_gradients_are_those_of_products_in_the_planes(kind):
    with jax.enable_x64(True):
        task = make(kind, together=0.6)
        inputs = task.sample(jax.random.key(1), N)
        outputs, sites = task.probed(task.params, inputs, {})
        acts, rows = np.asarray(sites[task.site]), np.asarray(task.truth.readers)
        reads = (acts @ rows.T).reshape(N, 4, 2)
        gate, gate_slope, value, value_slope = BY_HAND[kind]
        s, t = reads[:, :, 0], reads[:, :, 1]
        mix = np.asarray(task.params["mix"])
        np.testing.assert_allclose(outputs, (gate(s) * value(t)) @ mix, atol=1e-12)
        slopes = np.stack([gate_slope(s) * value(t), gate(s) * value_slope(t)], 2)
        planes = np.einsum("nkp,kpd->nkd", slopes, rows.reshape(4, 2, -1))
        oracle = np.einsum("nkd,ko->nod", planes, mix)
        np.testing.assert_allclose(jacobians(task, inputs), oracle, atol=1e-10)
        # Every read sees its own source alone.
        np.testing.assert_allclose(reads.reshape(N, 8), inputs, atol=1e-10)


@pytest.mark.slow_cases
@every
@pytest.mark.parametrize("together", [1.0, 0.5])
def test_units_are_active_as_often_as_stated(kind, together):
    task = make(kind, together=together)
    sources = np.asarray(task.sample(jax.random.key(2), 20_000))
    features = np.asarray(task.features(task.params, jnp.asarray(sources)))
    stated = float(task.truth.frequency[0])
    rates = (features > 0).mean(0)
    np.testing.assert_array_equal(rates[::2], rates[1::2])
    assert np.abs(rates - stated).max() <= 4.5 * np.sqrt(stated * (1 - stated) / 20_000)
    both = (sources.reshape(-1, 4, 2) != 0).sum(2)
    assert (both == 2).sum() / (both > 0).sum() == pytest.approx(together, abs=0.02)
    size = np.abs(sources[sources != 0])
    assert 0.5 <= size.min() < 0.51 < 1.49 < size.max() <= 1.5


def test_superposed_units_read_random_directions():
    task = make("silu", units=6, dim=8)
    rows = np.asarray(task.truth.readers)
    np.testing.assert_array_equal(rows, task.truth.writers)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert "in superposition" in task.about
    assert task.probed is make("silu").probed  # one program for all draws


def attention(**more):
    knobs = {"heads": 2, "head_dim": 2, "dim": 13, "positions": 3} | more
    return planted.attention_reads(jax.random.key(0), **knobs)


def attention_by_hand(task, stream):
    """Outputs of one example in float64, position by position."""
    rows = np.asarray(task.truth.readers).reshape(2, 3, 2, -1)
    out = np.zeros((len(stream), 2, 2))
    for h, (query, keys, value) in enumerate(rows):
        for t, x in enumerate(stream):
            scores = np.array([(query @ x) @ (keys @ y) for y in stream])
            weights = np.exp(2.0 * scores / np.sqrt(2))
            weights /= weights.sum()
            out[t, h] = sum(
                w * (value @ y) for w, y in zip(weights, stream, strict=True)
            )
    return (out.reshape(len(stream), 4) @ np.asarray(task.params["mix"])).ravel()


@pytest.mark.slow
def test_heads_attend_and_their_gradients_lie_in_what_they_read():
    with jax.enable_x64(True):
        task = attention(probability=0.8)
        inputs = task.sample(jax.random.key(1), N)
        outputs, sites = task.probed(task.params, inputs, {})
        streams = np.asarray(inputs) @ np.asarray(task.truth.writers)
        np.testing.assert_allclose(sites[task.site], streams[:, 0], atol=1e-12)
        for output, stream in zip(np.asarray(outputs), streams, strict=True):
            oracle = attention_by_hand(task, stream)
            np.testing.assert_allclose(output, oracle, atol=1e-10)
        # Finite differences of the oracle, and the span of all gradients.
        grads, step = jacobians(task, inputs), 1e-6
        moved = streams[0].copy()
        moved[0, 5] += step
        slope = (attention_by_hand(task, moved) - np.asarray(outputs[0])) / step
        np.testing.assert_allclose(grads[0, :, 5], slope, atol=1e-4)
        span = np.linalg.svd(grads.reshape(-1, 13))[2][:12]
        angles = subspace_angles(span.T, np.asarray(task.truth.readers).T)
        assert angles.max() < 1e-6


@pytest.mark.slow
def test_no_basis_of_a_head_is_preferred():
    task = attention()
    turned = task.params | {}
    rows = np.asarray(task.params["readers"], np.float64).copy()
    turn = np.array([[2.0, 1.0], [0.5, 1.5]])
    rows[:, 0] = turn @ rows[:, 0]  # queries
    rows[:, 1] = np.linalg.inv(turn).T @ rows[:, 1]  # keys
    turned["readers"] = jnp.asarray(rows, jnp.float32)
    inputs = task.sample(jax.random.key(1), N)
    outputs = [task.probed(p, inputs, {})[0] for p in (task.params, turned)]
    np.testing.assert_allclose(*outputs, atol=1e-4)
    np.testing.assert_array_equal(task.truth.group, np.repeat(np.arange(6), 2))
    rate = (
        np.asarray(task.features(task.params, task.sample(jax.random.key(3), 5000))) > 0
    )
    np.testing.assert_allclose(rate.mean(0), task.truth.frequency, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "attention"])
def test_the_truth_as_planes_scores_one_and_as_rows_none(name):
    task = make("silu") if name == "gated" else attention()
    truth, group = task.truth, np.asarray(task.truth.group)
    score = functools.partial(ft.metrics.score_task, jax.random.key(4), task)
    scores = score(ft.Features(truth.readers, truth.writers, group=group), examples=50)
    assert scores.mechanisms == pytest.approx(1, abs=1e-5)
    assert scores.precision == 1
    alone = score(ft.Features(truth.readers, truth.writers), examples=50)
    assert (alone.mechanisms, alone.precision, alone.inside) == (0, 0, 1)
    ft.check_no_mixing(task.probed, task.params, task.sample(jax.random.key(5), 6))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: make("tanh"), "gated_units: wanted a kind of bilinear, relu, silu, s"),
        (lambda: make("relu", units=0), "gated_units: wanted units >= 1"),
        (lambda: make("relu", together=0.0), "together 0.0"),
        (lambda: make("relu", probability=np.nan), "probability nan"),
        (lambda: attention(head_dim=14), r"attention_reads: .* head_dim in 1 \.\. dim"),
        (lambda: attention(positions=1), "positions 1"),
        (lambda: attention(sharpness=0.0), "got 0.3 and 0.0"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_sizes_are_ints():
    with pytest.raises(TypeError, match="gated_units: units must be an int"):
        make("relu", units=2.0)
    with pytest.raises(TypeError, match="attention_reads: heads must be an int"):
        attention(heads=2.0)
