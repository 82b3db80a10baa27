import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import (
    CONFIG,
    cross_entropy,
    log_softmax,
    logits_with,
    tapped,
    top_codes,
    weights,
    whole,
    windows,
)
from tiny_held import LATENTS, SITES, K, dictionary, held_at, replaced_by

import toyfeat as tf
from toyfeat.language import halves, readout_of
from toyfeat.language.judging import held_out, judge
from toyfeat.language.methods import Method, of_basis, of_dictionary


@pytest.mark.parametrize("site", SITES)
def test_held_out_is_a_tap_of_everything(site):
    tokens = windows()
    cut, held = held_at(site)
    taps = tapped()
    shape = tokens.shape
    np.testing.assert_allclose(
        held.acts, taps[site].acts.reshape(*shape, -1), atol=1e-5
    )
    grads = taps[site].grads.reshape(*shape, 1, -1)
    np.testing.assert_allclose(held.grads, grads, atol=1e-5)
    entry = taps[cut.entry].acts.reshape(*shape, -1)
    np.testing.assert_allclose(held.entry, entry, atol=1e-5)
    counted = np.ones(shape)
    counted[:, [0, -1]] = 0
    np.testing.assert_array_equal(held.weights, counted)
    np.testing.assert_array_equal(held.tokens, tokens)


@pytest.mark.parametrize("batch", [2, 3])
def test_gradients_of_another_readout_are_held_beside(batch):
    """Those of the loss stay the first; what is drawn is that of the window."""
    site, tokens = SITES[0], windows()
    cut, held = held_at(site)
    beside = readout_of("sampled", draws=2, seed=5)
    both = held_out(cut, weights(), tokens, held.mean, batch=batch, beside=beside)
    assert both.grads.shape == (*tokens.shape, 3, CONFIG.dim)
    np.testing.assert_allclose(both.grads[:, :, :1], held.grads, atol=1e-5)
    readout = beside(jnp.asarray(tokens), 0)
    taps = tf.tap(whole(), weights(), jnp.asarray(tokens), sites=site, readout=readout)
    wanted = taps[site].grads.reshape(*tokens.shape, 2, -1)
    np.testing.assert_allclose(both.grads[:, :, 1:], wanted, atol=1e-5)
    assert np.abs(both.grads[:, :, 1] - held.grads[:, :, 0]).max() > 1e-3
    method = of_dictionary(*dictionary(CONFIG.dim))
    found = [
        judge(cut, weights(), x, {"x": method}, batch=2)["x"] for x in (held, both)
    ]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def judged_by_numpy(site, tokens, mean, params):
    """Through the whole model, in float64."""
    taps, shape = tapped()[site], tokens.shape
    flat = np.asarray(taps.acts, np.float64)
    acts, grads = flat.reshape(*shape, -1), np.asarray(taps.grads[:, 0], np.float64)
    counted = np.ones(shape, bool)
    counted[:, [0, -1]] = False
    codes, writers, recon = top_codes(params, flat, K)
    recon = recon.reshape(acts.shape)

    def in_place(value):
        value = np.where(counted[:, :, None], value, acts)
        return logits_with(site, value, tokens)

    def ce_of(logits):
        return cross_entropy(logits, tokens)[counted[:, :-1]].mean()

    was, now = logits_with(site, acts, tokens), in_place(recon)
    clean, ce = ce_of(was), ce_of(now)
    by_mean, by_zero = ce_of(in_place(mean)), ce_of(in_place(0.0))
    p, q = log_softmax(was), log_softmax(now)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)[counted].mean()
    effects = codes * (grads @ writers.T)
    rest = ((flat - recon.reshape(flat.shape)) * grads).sum(axis=1)
    here = counted.reshape(-1)
    l0s, among, shares = [], [], []
    for effect, left in zip(np.abs(effects[here]), np.abs(rest[here]), strict=True):
        total = effect.sum() + left
        most = np.cumsum(np.sort(effect)[::-1])
        reached = most >= 0.95 * total
        among.append(np.argmax(most >= 0.95 * effect.sum()) + 1 if effect.any() else 0)
        l0s.append(np.argmax(reached) + 1 if reached.any() else LATENTS)
        shares.append(left / total)
    error = ((flat - recon.reshape(flat.shape)) ** 2)[here].sum()
    spread = ((flat - mean) ** 2)[here].sum()
    return {
        "ce": ce,
        "kl": kl,
        "recovered": (by_mean - ce) / (by_mean - clean),
        "recovered_zero": (by_zero - ce) / (by_zero - clean),
        "explained": 1 - error / spread,
        "l0": (codes[here] != 0).sum(axis=1).mean(),
        "attribution_l0": np.mean(l0s),
        "attribution_l0_explained": np.mean(among),
        "unexplained": np.mean(shares),
        "unmet": np.mean(np.array(shares) > 0.05),
        "dead": np.mean((codes[here] != 0).sum(axis=0) == 0),
    }, (by_mean > clean, by_zero > clean)


@pytest.mark.parametrize("site", SITES)
def test_every_score_against_numpy_through_the_whole_model(site):
    cut, held = held_at(site)
    sae, params = dictionary(held.acts.shape[-1])
    found = judge(cut, weights(), held, {"x": of_dictionary(sae, params)}, batch=2)["x"]
    mean = np.asarray(held.mean, np.float64)
    wanted, costs = judged_by_numpy(site, windows(), mean, params)
    assert all(costs)  # else the shares say nothing
    assert 0 < wanted["dead"] < 1
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("batch", [1, 4])
def test_judgement_does_not_depend_on_the_batch(batch):
    site = SITES[1]
    cut, held = held_at(site)
    method = of_dictionary(*dictionary(held.acts.shape[-1]))
    plain = judge(cut, weights(), held, {"x": method}, batch=2)["x"]
    found = judge(cut, weights(), held, {"x": method}, batch=batch)["x"]
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-6)


def test_the_model_itself_the_mean_and_zero_are_the_ends_of_the_scale():
    cut, held = held_at(SITES[0])
    itself = Method(lambda _, taps: replaced_by(taps.acts).replace(taps), 1, None)
    methods = {
        "itself": itself,
        "mean": replaced_by(jnp.asarray(held.mean)[None]),
        "0": replaced_by(jnp.zeros((1, CONFIG.dim))),
    }
    found = judge(cut, weights(), held, methods, batch=3)
    alone = {name: judge(cut, weights(), held, {name: methods[name]}) for name in found}
    for name, one in alone.items():
        np.testing.assert_allclose(one[name], found[name], rtol=1e-4, atol=1e-6)
    clean = cross_entropy(logits_with(SITES[0], held.acts, windows()), windows())[:, 1:]
    assert found["itself"].ce == pytest.approx(clean.mean(), rel=1e-4)
    assert found["itself"].recovered == pytest.approx(1)
    assert found["itself"].recovered_zero == pytest.approx(1)
    assert found["itself"].kl == pytest.approx(0, abs=1e-6)
    assert found["itself"].explained == pytest.approx(1)
    assert found["mean"].recovered == pytest.approx(0, abs=1e-6)
    assert found["mean"].explained == pytest.approx(0, abs=1e-6)
    assert found["0"].recovered_zero == pytest.approx(0, abs=1e-6)
    assert found["0"].l0 == 0
    assert found["0"].dead == 1
    assert found["0"].unexplained == pytest.approx(1)


def test_first_and_last_positions_are_left_as_they_are():
    cut, held = held_at(SITES[0])
    method = of_dictionary(*dictionary(CONFIG.dim))

    def also_there(params, taps):
        found = method.rule(params, taps)
        wild = jnp.where(taps.weights[:, None] > 0, found.recon, jnp.full((), 1e3))
        return found._replace(recon=wild)

    plain = judge(cut, weights(), held, {"x": method})["x"]
    found = judge(cut, weights(), held, {"x": method._replace(rule=also_there)})["x"]
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_a_judgement_of_a_whole_basis_is_the_model():
    site = SITES[2]
    cut, held = held_at(site)
    acc = tf.moments(CONFIG.dim, grads=False)
    flat = jnp.asarray(held.acts.reshape(-1, CONFIG.dim))
    taps = tf.Taps(flat, None, jnp.ones(len(flat)))
    stats = acc.finish(acc.update(acc.init(), taps))
    method = of_basis(tf.pca(stats, CONFIG.dim), CONFIG.dim)
    found = judge(cut, weights(), held, {"x": method})["x"]
    assert found.recovered == pytest.approx(1, abs=1e-3)
    assert (found.l0, found.dead) == (CONFIG.dim, 0)
    assert found.unexplained == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("num", [0, 3])
def test_held_out_wants_whole_batches(num):
    cut = halves(CONFIG, SITES[0])
    with pytest.raises(ValueError, match=rf"held_out: .* of 2 windows, got {num}"):
        held_out(cut, weights(), windows()[:num], jnp.zeros(CONFIG.dim), batch=2)


def test_held_out_wants_a_position_between_the_first_and_the_last():
    cut = halves(CONFIG, SITES[0])
    with pytest.raises(ValueError, match=r"held_out: .* at least 3 tokens, got 2"):
        held_out(cut, weights(), windows()[:, :2], jnp.zeros(CONFIG.dim), batch=2)
