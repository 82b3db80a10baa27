from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, cross_entropy, logits_with, weights, windows
from tiny_held import LATENTS, SITES, described, held_at, replaced_by

import toyfeat as ft
from toyfeat.lm import leave_one_out
from toyfeat.lm.leave_one_out import faithfulness
from toyfeat.lm.replacements import Replacement
from toyfeat.lm.split import split_at, tap_held_out


def effects_by_hand(site, held, method):
    """``{(window, position, latent): (predicted, true)}``, the whole model each."""
    tokens, effects = held.tokens, {}
    clean = cross_entropy(logits_with(site, held.acts, tokens), tokens).sum(axis=1)
    replace = jax.jit(method.rule)
    for t in range(1, tokens.shape[1] - 1):
        ones = np.ones(len(tokens), np.float32)
        taps = ft.Taps(held.acts[:, t], held.grads[:, t], ones)
        found = jax.device_get(replace(method.params, taps))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "stretch"),
    [(SITES[0], 2), (SITES[1], None), (SITES[2], 3), ("blocks_2/resid_post", 3)],
)
def test_effects_are_those_of_the_whole_model_without_the_part(site, stretch):
    split, held = held_at(site)
    method = described(held.acts.shape[-1])
    wanted = np.array(list(effects_by_hand(site, held, method).values()))
    run = partial(faithfulness, split, weights(), held, method, stretch=stretch)
    few, some, num = run(uniform=9, largest=7)
    assert few.pairs == len(some) == 16
    assert num == 9
    assert len(np.unique(some[:, 0])) == 16  # none of them twice
    scores, drawn, num = faithfulness(
        split,
        weights(),
        held,
        method,
        uniform=10**6,
        largest=7,
        batch=16,
        stretch=stretch,
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
    again = ft.metrics.attribution_faithfulness(*effects.T)
    assert scores == again


@pytest.mark.slow
def test_pairs_are_drawn_once_each_and_by_the_seed(monkeypatch):
    split, held = held_at(SITES[0])
    method = described(CONFIG.dim)

    def pairs(seed, batch=16, uniform=30, **options):
        _, found, _ = faithfulness(
            split,
            weights(),
            held,
            method,
            uniform=uniform,
            largest=0,
            batch=batch,
            seed=seed,
            **options,
        )
        return found

    first = pairs(0)
    assert len(first) == len(np.unique(first[:, 0])) == 30
    np.testing.assert_array_equal(pairs(0), first)
    for options in ({"batch": 7}, {"stretch": 2}, {"stretch": 4, "batch": 3}):
        np.testing.assert_allclose(pairs(0, **options), first, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(leave_one_out, "_MEMORY", 1)
    found = pairs(0, stretch=2, batch=2)  # two windows at a time
    np.testing.assert_allclose(found, first, rtol=1e-3, atol=1e-4)
    assert not np.array_equal(pairs(1)[:, 0], first[:, 0])


def test_attributions_of_small_parts_are_exact():
    """To first order the model is linear in what is left out."""
    site = SITES[1]
    split, held = held_at(site)
    whole_ = described(CONFIG.hidden)

    def a_hundredth(_, taps):
        found = whole_.replace(taps)
        return found._replace(parts=found.parts / 100)

    scores, _, _ = faithfulness(
        split,
        weights(),
        held,
        Replacement(a_hundredth, LATENTS, None),
        uniform=60,
        largest=20,
    )
    assert scores.correlation > 0.999
    assert scores.slope == pytest.approx(1, abs=0.02)
    assert scores.error < 1e-3


@pytest.mark.slow
def test_attributions_are_exact_where_the_model_is_nearly_linear():
    """A residual stream so long that the last norm and the logits hardly move."""
    site = "blocks_2/mlp_out"
    tree = dict(weights()["params"])
    tree["embed"] = {"embedding": 1000 * tree["embed"]["embedding"]}
    params = {**weights(), "params": tree}
    split = split_at(CONFIG, site)
    held = tap_held_out(split, params, windows(), np.zeros(CONFIG.dim), batch=2)
    method = described(CONFIG.dim)
    scores, _, _ = faithfulness(split, params, held, method, uniform=60, largest=20)
    assert scores.correlation > 0.999
    assert scores.slope == pytest.approx(1, abs=0.02)
    assert scores.error < 1e-3


def test_a_replacement_without_effects_is_refused():
    split, held = held_at(SITES[0])
    nothing = replaced_by(jnp.zeros((1, CONFIG.dim)))
    with pytest.raises(ValueError, match="faithfulness: no latent has an effect"):
        faithfulness(split, weights(), held, nothing, uniform=3, largest=3)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("uniform", "ways"), [(90, {0, 2, 4, 6}), (40, {0})])
def test_windows_with_many_pairs_are_run_in_stretches(monkeypatch, uniform, ways):
    """Six windows of seven tokens; eight pairs in each of them are enough."""
    split, held = held_at(SITES[0])
    method = described(CONFIG.dim)
    run = partial(faithfulness, split, weights(), held, method, largest=0)
    whole = run(uniform=uniform)[1]  # shorter than the shortest stretch
    monkeypatch.setattr(leave_one_out, "_MIN_STRETCH", 2)
    firsts, changes = set(), leave_one_out._loss_changes

    def seen(after, first, *args):
        firsts.add(first)
        return changes(after, first, *args)

    monkeypatch.setattr(leave_one_out, "_loss_changes", seen)
    np.testing.assert_allclose(run(uniform=uniform)[1], whole, rtol=1e-3, atol=1e-4)
    assert firsts == ways - {6}  # the last position has no next token


@pytest.mark.parametrize(
    "bad", [{"uniform": 0}, {"stretch": 0}, {"stretch": -1}, {"uniform": -5}]
)
def test_invalid_numbers_of_pairs_and_stretches_are_refused(bad):
    split, held = held_at(SITES[0])
    method = described(CONFIG.dim)
    options = {"uniform": 3, "largest": 0, **bad}
    with pytest.raises(ValueError, match="faithfulness: wanted at least a pair, and a"):
        faithfulness(split, weights(), held, method, **options)
