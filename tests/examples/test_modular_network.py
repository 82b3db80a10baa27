import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from examples.modular import network as modular
from examples.modular.network import Modular
from examples.modular.training import train

TINY = Modular(modulus=7, d_model=12, heads=3, d_mlp=10)
SMALL = Modular(modulus=29, d_model=64, heads=4, d_mlp=128)
SMALL_SETTINGS = {"steps": 2500, "learning_rate": 3e-3, "batch": 256}


@pytest.fixture(scope="module")
def tiny():
    """Untrained parameters, with biases that are not zero."""
    params = modular.initial_params(jax.random.key(1), TINY)
    params["b_in"], params["b_out"] = jnp.linspace(-1, 1, 10), jnp.linspace(-1, 1, 12)
    return params


@pytest.fixture(scope="module")
def small():
    seen = []
    params = train(
        jax.random.key(0),
        SMALL,
        **SMALL_SETTINGS,
        on_chunk=lambda done, loss: seen.append((done, float(loss))),
    )
    return params, seen


def by_hand(params, a, b):
    """The transformer in float64, one pair and one number at a time."""
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    heads, width, head = w["query"].shape
    tokens = [a, b, len(w["embed"]) - 1]
    x = [w["embed"][t] + w["position"][i] for i, t in enumerate(tokens)]
    mid = x[2].copy()
    for h in range(heads):
        query = x[2] @ w["query"][h]
        scores = [query @ (x[i] @ w["key"][h]) / math.sqrt(head) for i in range(3)]
        total = sum(math.exp(s) for s in scores)
        for i in range(3):
            share = math.exp(scores[i]) / total
            mid += share * (x[i] @ w["value"][h]) @ w["output"][h]
    out = mid + w["b_out"]
    for m in range(w["w_in"].shape[1]):
        before = sum(mid[d] * w["w_in"][d, m] for d in range(width)) + w["b_in"][m]
        out = out + max(before, 0.0) * w["w_out"][m]
    return np.stack(x), mid, out, out @ w["unembed"]


def test_logits_and_sites_are_those_of_explicit_loops(tiny):
    inputs = modular.pairs(TINY)[0][::5]
    got, acts = jax.jit(lambda x: modular.probed()(tiny, x, {}))(inputs)
    expected = [by_hand(tiny, int(a), int(b)) for a, b in inputs]
    *sites, outputs = (np.stack(parts) for parts in zip(*expected, strict=True))
    for name, value in zip(modular.SITES, sites, strict=True):
        np.testing.assert_allclose(acts[name], value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, outputs, rtol=1e-5, atol=1e-5)


def test_shapes_of_outputs_and_sites(tiny):
    inputs = modular.pairs(TINY)[0]
    outputs, acts = jax.eval_shape(modular.probed(), tiny, inputs, {})
    assert outputs.shape == (49, 7)
    assert {site: act.shape for site, act in acts.items()} == {
        "resid_in": (49, 3, 12),
        "resid_mid": (49, 12),
        "mlp_out": (49, 12),
    }
    assert set(acts) == set(modular.SITES)


def test_tapped_gradients_are_the_jacobian_of_the_logits(tiny):
    inputs = modular.pairs(TINY)[0][3::11]
    readout = ft.readouts.jacobian()

    @jax.jit
    def tapped(inputs):
        probed, sites = modular.probed(), modular.SITES
        return ft.tap(probed, tiny, inputs, sites=sites, readout=readout)

    @jax.jit
    @jax.vmap
    def oracle(pair):  # one input at a time: [p, (3,) D] of each site
        def of_probes(probes):
            return modular.probed()(tiny, pair[None], probes)[0][0]

        zeros = {"resid_in": jnp.zeros((3, 12)), "resid_mid": jnp.zeros(12)}
        return jax.jacrev(of_probes)(zeros | {"mlp_out": jnp.zeros(12)})

    taps, jacobians = tapped(inputs), oracle(inputs)
    for site in modular.SITES:
        expected = np.moveaxis(jacobians[site], 1, -2).reshape(-1, 7, 12)
        np.testing.assert_allclose(taps[site].grads, expected, rtol=1e-4, atol=1e-6)


def test_a_probe_after_the_mlp_shifts_the_logits_by_what_is_unembedded(tiny, key):
    inputs = modular.pairs(TINY)[0][:10]
    delta = jax.random.normal(key, (12,))
    shifted = jax.jit(lambda delta: modular.probed()(tiny, inputs, {"mlp_out": delta}))
    before, after = shifted(jnp.zeros(12))[0], shifted(delta)[0]
    shift = np.broadcast_to(delta @ tiny["unembed"], before.shape)
    np.testing.assert_allclose(after - before, shift, rtol=1e-4, atol=1e-5)


def test_pairs_are_all_sums():
    inputs, labels = modular.pairs(TINY)
    assert sorted(map(tuple, inputs.tolist())) == [
        (a, b) for a in range(7) for b in range(7)
    ]
    assert all((a + b) % 7 == c for (a, b), c in zip(inputs, labels, strict=True))


@pytest.mark.slow_cases
@pytest.mark.parametrize(("fraction", "num"), [(0.3, 15), (1.0, 49), (1e-9, 1)])
def test_a_split_holds_every_pair_once(fraction, num, key):
    (first, sums), (rest, held_out) = modular.split(key, TINY, fraction)
    assert len(first) == len(sums) == num
    assert len(rest) == len(held_out) == 49 - num
    both = {tuple(pair) for pair in np.concatenate([first, rest]).tolist()}
    assert len(both) == 49
    assert np.all((first.sum(1) % 7) == sums)
    assert np.all((rest.sum(1) % 7) == held_out)


@pytest.mark.slow
def test_training_answers_all_pairs_and_those_held_out(small):
    params, seen = small
    accuracy = jax.jit(modular.accuracy)
    assert accuracy(params, *modular.pairs(SMALL)) > 0.999
    held_out = modular.split(jax.random.key(0), SMALL, 0.8)[1]
    assert len(held_out[1]) == 168
    assert accuracy(params, *held_out) > 0.99
    assert [done for done, _ in seen] == list(range(100, 2501, 100))
    assert seen[-1][1] < 0.01 < seen[0][1]


@pytest.mark.slow
def test_the_trained_embedding_holds_few_waves(small):
    embed = np.asarray(small[0]["embed"], np.float64)[:-1]
    waves = np.sum(np.abs(np.fft.rfft(embed - embed.mean(0), axis=0)) ** 2, axis=1)
    shares = np.sort(waves)[::-1] / waves.sum()
    assert shares[:5].sum() > 0.85  # of 14 frequencies


def test_accuracy_counts_the_largest_logits(tiny):
    inputs, labels = modular.pairs(TINY)
    answers = [by_hand(tiny, int(a), int(b))[-1].argmax() for a, b in inputs]
    right = np.mean(np.array(answers) == np.asarray(labels))
    assert float(modular.accuracy(tiny, inputs, labels)) == pytest.approx(right)


def test_chunks_do_not_change_what_is_learned(key):
    one = train(key, TINY, steps=20, batch=8, chunk=20)
    two = train(key, TINY, steps=20, batch=8, chunk=5)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_without_batches_the_loss_is_that_of_all_training_pairs(key):
    seen = []
    train(
        key,
        TINY,
        fraction=0.5,
        steps=1,
        batch=None,
        chunk=1,
        on_chunk=lambda done, loss: seen.append((done, float(loss))),
    )
    params = modular.initial_params(jax.random.fold_in(key, 1), TINY)
    losses = []
    for (a, b), label in zip(*modular.split(key, TINY, 0.5)[0], strict=True):
        outputs = by_hand(params, int(a), int(b))[-1]
        losses.append(np.log(np.exp(outputs).sum()) - outputs[int(label)])
    assert seen == [(1, pytest.approx(np.mean(losses), rel=1e-5))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads must divide d_model, got 5 and 12"),
        ({"modulus": 1}, "modulus must be at least 2, got 1"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_mlp": 0}, "d_mlp must be at least 1, got 0"),
    ],
)
def test_sizes_must_fit(change, message, key):
    task = TINY._replace(**change)
    with pytest.raises(ValueError, match=message):
        modular.initial_params(key, task)
    with pytest.raises(ValueError, match=message):
        train(key, task)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_must_be_in_its_range(fraction, key):
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        modular.split(key, TINY, fraction)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        train(key, TINY, fraction=fraction)


@pytest.mark.parametrize("name", ["steps", "batch", "chunk"])
def test_counts_must_be_positive(name, key):
    with pytest.raises(ValueError, match=f"train: {name} must be at least 1, got 0"):
        train(key, TINY, **{name: 0})


def test_a_warmup_must_not_be_negative(key):
    with pytest.raises(ValueError, match="train: warmup must be at least 0, got -1"):
        train(key, TINY, warmup=-1)


def test_inputs_must_be_pairs(tiny):
    with pytest.raises(ValueError, match=r"pairs \[B, 2\], got \(4, 3\)"):
        modular.probed()(tiny, jnp.zeros((4, 3), jnp.int32), {})


def test_a_loss_that_is_not_finite_stops_the_training(key):
    with pytest.raises(FloatingPointError, match="not finite by step 20"):
        train(key, TINY, steps=40, batch=8, learning_rate=1e30, chunk=20)
