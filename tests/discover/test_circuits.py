"""Circuits of effects whose smallest sets are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.discover.circuits import METHODS, find_circuit, keep_latents

M = 9


def smallest(effect, data, share):
    """Size of the smallest set of any latents that keeps a share, by trying all."""
    run = jax.jit(jax.vmap(lambda mask: effect(data, mask)))
    masks = (np.arange(2**M)[:, None] >> np.arange(M)) & 1
    effects = np.asarray(run(jnp.asarray(masks, jnp.float32)), np.float64)
    kept = (effects - effects[0]) / (effects[-1] - effects[0])
    return int(masks.sum(1)[kept >= share - 1e-6].min())


def additive(weights, mask):
    return weights @ mask


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_additive_effect_has_its_largest_latents(method, sign):
    weights = sign * jnp.array([0.0, 5, 0.2, -1, 3, 0, 2, 0.1, -0.4])
    circuit = find_circuit(additive, weights, M, method=method, steps=60)
    wanted = tuple(smallest(additive, weights, share) for share in (0.9, 0.95))
    assert circuit.sizes == wanted
    mask = keep_latents(circuit, 0.9)
    np.testing.assert_array_equal(np.flatnonzero(mask), [1, 4, 6])


def redundant(data, mask):
    """Two latents stand in for each other, and a third adds a little."""
    del data
    return jnp.tanh(4 * mask[0] + 4 * mask[1]) + 0.3 * mask[2] - 0.2 * mask[3]


def test_latents_that_stand_in_for_each_other():
    """One derivative with all latents there misses them; those of a path do not."""
    sizes = {}
    for method in METHODS:
        circuit = find_circuit(redundant, None, M, method=method, steps=100)
        sizes[method] = circuit.sizes[0]
        first = circuit.order[: circuit.sizes[0]]
        assert {0, 1} & set(first.tolist())
    assert smallest(redundant, None, 0.9) == 1
    assert sizes["attribution"] == 2
    assert sizes["integrated"] == 1
    assert sizes["mask"] <= 2


def test_integrated_scores_sum_to_the_whole_effect():
    circuit = find_circuit(redundant, None, M, method="integrated", steps=200)
    np.testing.assert_allclose(circuit.scores.sum(), 1, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_latents_that_a_model_reads_are_found(method):
    """A dictionary that is planted in a model, which reads three of its latents."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(12, 12)))[0][:M].astype(np.float32)
    codes = np.float32(rng.random(size=(40, M)) + 0.5)
    truth = [1, 4, 7]
    read = jnp.asarray(directions[truth].T)
    sae = ft.dictionaries.standard(12, M)
    params = {
        "W_enc": directions.T,
        "W_dec": directions,
        "b_enc": np.zeros(M, np.float32),
        "b_dec": np.zeros(12, np.float32),
    }

    def effect(acts, mask):
        found = sae.encode(params, acts)
        value = sae.decode(params, found * mask[None, :])
        hidden = jnp.maximum(value @ read - 0.1, 0)  # product of readings: all needed
        return jnp.mean(jnp.prod(hidden, axis=1))

    circuit = find_circuit(
        effect, jnp.asarray(codes @ directions), M, method=method, steps=60
    )
    assert circuit.sizes == (3, 3)
    assert sorted(circuit.order[:3].tolist()) == truth
    shares = dict(zip(circuit.counts.tolist(), circuit.kept, strict=True))
    np.testing.assert_allclose([shares[2], shares[3]], [0, 1], atol=1e-3)


def test_what_is_not_reached_is_said():
    weights = jnp.ones(M)
    circuit = find_circuit(additive, weights, M, whole=2.0 * M, shares=(0.5, 0.9))
    assert circuit.sizes == (M, None)
    with pytest.raises(ValueError, match=r"a share that was reached, got 0\.9 of"):
        keep_latents(circuit, 0.9)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="there is nothing to keep"):
        find_circuit(additive, jnp.zeros(M), M)
    with pytest.raises(ValueError, match="find_circuit: method must be"):
        find_circuit(additive, jnp.ones(M), M, method="best")
    with pytest.raises(ValueError, match="wanted shares to keep, got none"):
        find_circuit(additive, jnp.ones(M), M, shares=(), method="mask")
    with pytest.raises(ValueError, match=r"must return a number, got .* \(2,\); take"):
        find_circuit(lambda w, mask: (w * mask)[:2], jnp.ones(M), M)
    with pytest.raises(ValueError, match="find_circuit: a share must be"):
        find_circuit(additive, jnp.ones(M), M, shares=(1.5,))
