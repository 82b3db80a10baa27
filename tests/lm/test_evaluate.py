import functools
from functools import partial

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
from tiny_held import (
    LATENTS,
    SITES,
    K,
    described,
    dictionary,
    held_at,
    replaced_by,
)

import toyfeat as ft
from toyfeat.lm.collect import make_readout
from toyfeat.lm.evaluate import evaluate_replacements
from toyfeat.lm.replacements import Replacement, from_basis
from toyfeat.lm.split import split_at, tap_held_out


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_held_out_text_has_the_taps_of_the_whole_model(site):
    # Programs with other outputs are rounded apart: entries go up to 20 here.
    tokens = windows()
    split, held = held_at(site)
    taps = tapped()
    shape = tokens.shape
    np.testing.assert_allclose(
        held.acts, taps[site].acts.reshape(*shape, -1), rtol=1e-5, atol=1e-4
    )
    grads = taps[site].grads.reshape(*shape, 1, -1)
    np.testing.assert_allclose(held.grads, grads, rtol=1e-5, atol=1e-4)
    entry = taps[split.entry].acts.reshape(*shape, -1)
    np.testing.assert_allclose(held.entry, entry, rtol=1e-5, atol=1e-4)
    counted = np.ones(shape)
    counted[:, [0, -1]] = 0
    np.testing.assert_array_equal(held.weights, counted)
    np.testing.assert_array_equal(held.tokens, tokens)


EXTRA = make_readout("sampled", draws=2, seed=5)


@functools.cache
def extra_gradients(site):
    """Of the whole model."""

    @jax.jit
    def run(params, tokens):
        return ft.tap(whole(), params, tokens, sites=site, readout=EXTRA(tokens, 0))

    grads = run(weights(), windows())[site].grads
    return np.asarray(grads).reshape(*windows().shape, 2, -1)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 3])
def test_gradients_of_an_extra_readout_follow_those_of_the_loss(batch):
    """Those of the loss stay the first; what is drawn is that of the window."""
    site, tokens = SITES[0], windows()
    split, held = held_at(site)
    both = tap_held_out(
        split, weights(), tokens, held.mean, batch=batch, extra_readout=EXTRA
    )
    assert both.grads.shape == (*tokens.shape, 3, CONFIG.dim)
    np.testing.assert_allclose(both.grads[:, :, :1], held.grads, atol=1e-5)
    wanted = extra_gradients(site)
    np.testing.assert_allclose(both.grads[:, :, 1:], wanted, atol=1e-5)
    assert np.abs(both.grads[:, :, 1] - held.grads[:, :, 0]).max() > 1e-3
    method = described(CONFIG.dim)
    found = [
        evaluate_replacements(split, weights(), x, {"x": method}, batch=2)["x"]
        for x in (held, both)
    ]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def scores_by_numpy(site, tokens, mean, params):
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


@pytest.mark.slow_cases
@pytest.mark.parametrize("site", SITES)
def test_every_score_against_numpy_through_the_whole_model(site):
    split, held = held_at(site)
    width = held.acts.shape[-1]
    params, method = dictionary(width)[1], described(width)
    found = evaluate_replacements(split, weights(), held, {"x": method}, batch=2)["x"]
    mean = np.asarray(held.mean, np.float64)
    wanted, costs = scores_by_numpy(site, windows(), mean, params)
    assert all(costs)  # else the shares say nothing
    assert 0 < wanted["dead"] < 1
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_scores_do_not_depend_on_the_batch(batch):
    site = SITES[1]
    split, held = held_at(site)
    method = described(held.acts.shape[-1])
    plain = evaluate_replacements(split, weights(), held, {"x": method}, batch=2)["x"]
    found = evaluate_replacements(split, weights(), held, {"x": method}, batch=batch)[
        "x"
    ]
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-6)


def test_scores_of_the_model_itself_its_mean_and_zero():
    split, held = held_at(SITES[0])
    itself = Replacement(lambda _, taps: replaced_by(taps.acts).replace(taps), 1, None)
    methods = {
        "itself": itself,
        "mean": replaced_by(jnp.asarray(held.mean)[None]),
        "0": replaced_by(jnp.zeros((1, CONFIG.dim))),
    }
    run = partial(evaluate_replacements, split, weights(), held, batch=2)
    found = run(methods)
    alone = {name: run({name: methods[name]}) for name in found}
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


@pytest.mark.slow
def test_first_and_last_positions_are_left_as_they_are():
    split, held = held_at(SITES[0])
    method = described(CONFIG.dim)

    def also_there(params, taps):
        found = method.rule(params, taps)
        wild = jnp.where(taps.weights[:, None] > 0, found.recon, jnp.full((), 1e3))
        return found._replace(recon=wild)

    plain = evaluate_replacements(split, weights(), held, {"x": method})["x"]
    found = evaluate_replacements(
        split, weights(), held, {"x": method._replace(rule=also_there)}
    )["x"]
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_a_basis_of_full_rank_scores_like_the_model_itself():
    site = SITES[2]
    split, held = held_at(site)
    flat = held.acts.reshape(-1, CONFIG.dim)

    @jax.jit
    def basis(taps):
        acc = ft.moments(CONFIG.dim, grads=False)
        stats = acc.finish(acc.update(acc.init(), taps))
        return ft.pca(stats, CONFIG.dim)

    taps = ft.Taps(flat, None, np.ones(len(flat), np.float32))
    method = from_basis(basis(taps), CONFIG.dim)
    found = evaluate_replacements(split, weights(), held, {"x": method}, batch=2)["x"]
    assert found.recovered == pytest.approx(1, abs=1e-3)
    assert (found.l0, found.dead) == (CONFIG.dim, 0)
    assert found.unexplained == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("num", [0, 3])
def test_tap_held_out_wants_whole_batches(num):
    split = split_at(CONFIG, SITES[0])
    with pytest.raises(ValueError, match=rf"tap_held_out: .* of 2 windows, got {num}"):
        tap_held_out(split, weights(), windows()[:num], np.zeros(CONFIG.dim), batch=2)


def test_tap_held_out_wants_a_position_between_the_first_and_the_last():
    split = split_at(CONFIG, SITES[0])
    with pytest.raises(ValueError, match=r"tap_held_out: .* at least 3 tokens, got 2"):
        tap_held_out(split, weights(), windows()[:, :2], np.zeros(CONFIG.dim), batch=2)
