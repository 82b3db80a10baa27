import functools

import jax
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

import toyfeat as tf
from toyfeat.language import halves, readout_of
from toyfeat.language.judging import faithfulness, held_out, judge
from toyfeat.language.methods import Method, Replaced, of_basis, of_dictionary

SITES = "blocks_1/resid_post", "blocks_1/mlp_hidden", "blocks_0/attn_out"
LATENTS, K = 20, 3


@functools.cache
def held_at(site):
    width = CONFIG.hidden if site.endswith("hidden") else CONFIG.dim
    mean = 0.1 * jnp.arange(width, dtype=float)
    cut = halves(CONFIG, site)
    return cut, held_out(cut, weights(), windows(), mean, batch=2)


def dictionary(width):
    sae = tf.topk(width, LATENTS, K)
    params = dict(sae.init(jax.random.key(4)))
    keys = jax.random.split(jax.random.key(5), 2)
    rows = jax.random.normal(keys[0], params["W_dec"].shape)
    params |= {"W_dec": rows, "W_enc": 0.3 * rows.T / width**0.5}
    params["b_dec"] = 0.2 * jax.random.normal(keys[1], (width,))
    params["b_enc"] = params["b_enc"].at[-4:].set(-50)  # never there
    return sae, params


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


def replaced_by(value):
    """A method of one latent that puts a value in the place of every activation."""

    def rule(_, taps):
        recon = jnp.broadcast_to(value, taps.acts.shape) + 0 * taps.acts
        return Replaced(recon, recon[:, None], jnp.zeros((len(recon), 1), int))

    return Method(rule, 1, None)


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


def effects_by_hand(site, held, method):
    """``{(window, position, latent): (predicted, true)}``, the whole model each."""
    tokens, effects = held.tokens, {}
    clean = cross_entropy(logits_with(site, held.acts, tokens), tokens).sum(axis=1)
    for t in range(1, tokens.shape[1] - 1):
        taps = tf.Taps(
            jnp.asarray(held.acts[:, t]),
            jnp.asarray(held.grads[:, t]),
            jnp.ones(len(tokens)),
        )
        found = method.replace(taps)
        parts = np.asarray(found.parts, np.float64)
        for slot in range(parts.shape[1]):
            value = held.acts.astype(np.float64)
            value[:, t] -= parts[:, slot]
            after = cross_entropy(logits_with(site, value, tokens), tokens).sum(axis=1)
            for n in range(len(tokens)):
                if np.any(parts[n, slot]):
                    predicted = -parts[n, slot] @ held.grads[n, t, 0]
                    where = n, t, int(found.index[n, slot])
                    effects[where] = predicted, after[n] - clean[n]
    return effects


@pytest.mark.parametrize("site", SITES[1:])
def test_every_effect_is_that_of_leaving_it_out_of_the_whole_model(site):
    cut, held = held_at(site)
    method = of_dictionary(*dictionary(held.acts.shape[-1]))
    wanted = np.array(list(effects_by_hand(site, held, method).values()))
    few, some, num = faithfulness(
        cut, weights(), held, method, uniform=9, largest=7, batch=16
    )
    assert few.pairs == len(some) == 16
    assert num == 9
    assert len(np.unique(some[:, 0])) == 16  # none of them twice
    scores, drawn, num = faithfulness(
        cut, weights(), held, method, uniform=10**6, largest=7, batch=16
    )
    assert scores.pairs == len(drawn) == num == len(wanted)
    effects, largest = drawn, some[9:]
    np.testing.assert_allclose(
        drawn[np.lexsort(drawn.T[::-1])],
        wanted[np.lexsort(wanted.T[::-1])],
        rtol=1e-3,
        atol=2e-4,
    )
    sizes = np.sort(np.abs(wanted[:, 0]))[::-1]
    left = [x for x in sizes if np.abs(np.abs(some[:9, 0]) - x).min() > 1e-4 * x][:7]
    np.testing.assert_allclose(np.abs(largest[:, 0]), left, rtol=1e-3)
    again = tf.attribution_faithfulness(*effects.T)
    assert scores == again


def test_pairs_are_drawn_once_each_and_by_the_seed():
    cut, held = held_at(SITES[0])
    method = of_dictionary(*dictionary(CONFIG.dim))

    def pairs(seed, batch=16, uniform=30):
        _, found, _ = faithfulness(
            cut,
            weights(),
            held,
            method,
            uniform=uniform,
            largest=0,
            batch=batch,
            seed=seed,
        )
        return found

    first = pairs(0)
    assert len(first) == len(np.unique(first[:, 0])) == 30
    np.testing.assert_array_equal(pairs(0), first)
    np.testing.assert_allclose(pairs(0, batch=7), first, rtol=1e-3, atol=1e-4)
    assert not np.array_equal(pairs(1)[:, 0], first[:, 0])


def test_small_parts_have_the_effects_that_attributions_say():
    """To first order the model is linear in what is left out."""
    site = SITES[1]
    cut, held = held_at(site)
    whole_ = of_dictionary(*dictionary(CONFIG.hidden))

    def a_hundredth(_, taps):
        found = whole_.replace(taps)
        return found._replace(parts=found.parts / 100)

    scores, _, _ = faithfulness(
        cut, weights(), held, Method(a_hundredth, LATENTS, None), uniform=60, largest=20
    )
    assert scores.correlation > 0.999
    assert scores.slope == pytest.approx(1, abs=0.02)
    assert scores.error < 1e-3


def test_where_the_rest_of_the_model_is_all_but_linear_predictions_are_true():
    """A residual stream so long that the last norm and the logits hardly move."""
    site = "blocks_2/mlp_out"
    tree = dict(weights()["params"])
    tree["embed"] = {"embedding": 1000 * tree["embed"]["embedding"]}
    params = {**weights(), "params": tree}
    cut = halves(CONFIG, site)
    held = held_out(cut, params, windows(), jnp.zeros(CONFIG.dim), batch=2)
    method = of_dictionary(*dictionary(CONFIG.dim))
    scores, _, _ = faithfulness(cut, params, held, method, uniform=60, largest=20)
    assert scores.correlation > 0.999
    assert scores.slope == pytest.approx(1, abs=0.02)
    assert scores.error < 1e-3


def test_no_effect_anywhere_is_an_error():
    cut, held = held_at(SITES[0])
    nothing = replaced_by(jnp.zeros((1, CONFIG.dim)))
    with pytest.raises(ValueError, match="faithfulness: no latent has an effect"):
        faithfulness(cut, weights(), held, nothing, uniform=3, largest=3)
