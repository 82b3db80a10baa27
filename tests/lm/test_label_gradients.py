"""Draws at the head against the Fisher information of the predictions, in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, log_softmax, weights, whole, windows

from toyfeat.lm.collect import make_readout, tap_windows
from toyfeat.lm.label_gradients import HeadReadout, _pull_labels, _pull_signs
from toyfeat.lm.split import split_at

SITE, LAST = "blocks_1/resid_post", "blocks_2/resid_post"
DRAWS, REPEATS = 4, 500
T, V, D = 3, 7, 4


@cache
def head_problem():
    rng = np.random.default_rng(0)
    probs = np.exp(log_softmax(2 * rng.normal(size=(T, V))))
    return probs.astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)


@pytest.mark.slow_cases
@pytest.mark.parametrize("pull", [_pull_labels, _pull_signs])
def test_draws_have_the_covariance_of_the_predictions(pull):
    probs, head = head_problem()
    keys = jax.random.split(jax.random.key(1), 4000)
    draw = jax.jit(
        jax.vmap(lambda key: pull(key, jnp.asarray(probs), jnp.asarray(head), DRAWS))
    )
    found = np.asarray(draw(keys), np.float64)  # [repeats, K, T, D]
    for t, p in enumerate(probs.astype(np.float64)):
        fisher = head @ (np.diag(p) - np.outer(p, p)) @ head.T
        rows = found[:, :, t].reshape(-1, D)
        scale = np.trace(fisher)
        np.testing.assert_allclose(rows.mean(0), 0, atol=0.03 * scale**0.5)
        np.testing.assert_allclose(rows.T @ rows / len(rows), fisher, atol=0.03 * scale)
    # Positions are independent of each other within a draw.
    across = np.einsum("rkd,rke->de", found[:, :, 0], found[:, :, 1])
    assert np.abs(across / (4000 * DRAWS)).max() < 0.05 * scale


def test_strata_share_out_the_labels():
    """Four draws of one token hit a label of probability one half twice."""
    probs = np.array([[0.5, 0.25, 0.25]], np.float32)
    pulled = _pull_labels(jax.random.key(2), jnp.asarray(probs), jnp.eye(3), 4)
    labels = (np.asarray(probs) - np.asarray(pulled)[:, 0]).argmax(1)
    assert sorted(labels) == [0, 0, 1, 2]


@cache
def taps_of(kind):
    """Many draws for one window, whose copies have different indices."""
    readout = make_readout(kind, draws=DRAWS, seed=3)
    tokens = np.repeat(windows()[:1], REPEATS, axis=0)
    taps = tap_windows(
        whole(), (SITE,), readout, np.inf, weights(), jnp.asarray(tokens), 0
    )[SITE]
    return jax.tree.map(
        lambda x: np.asarray(x).reshape(REPEATS, -1, *x.shape[1:]), taps
    )


@cache
def exact_fisher():
    """``[T, D, D]``: every token's block, from the whole Jacobian of the logits."""
    split, acts = split_at(CONFIG, SITE), taps_of("labels").acts[:1]
    run = jax.jit(jax.jacrev(lambda x: split.run(weights(), x, x)[0]))
    jacobian = np.asarray(run(jnp.asarray(acts))[:, :, 0], np.float64)  # [t', V, t, D]
    logits = np.asarray(jax.jit(split.run)(weights(), acts, acts)[0], np.float64)
    p = np.exp(log_softmax(logits))
    centred = jacobian - np.einsum("sv,svtd->std", p, jacobian)[:, None]
    return np.einsum("sv,svtd,svte->tde", p, centred, centred), logits


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["labels", "signs", "sampled"])
def test_squared_effects_are_unbiased_for_the_second_order_kl(kind):
    fisher, _ = exact_fisher()
    grads = taps_of(kind).grads.astype(np.float64)  # [repeats, T, K, D]
    error = np.random.default_rng(4).normal(size=fisher.shape[:2])
    # Means over all copies, with the spread of the copies for a measure of the noise.
    squares = (np.einsum("rtkd,td->rtk", grads, error) ** 2).sum(2)
    wanted = np.einsum("td,tde,te->t", error, fisher, error)
    noise = squares.std(0) / REPEATS**0.5
    assert np.all(np.abs(squares.mean(0) - wanted) < 4.5 * noise)
    assert np.all(noise < 0.3 * wanted)


def test_the_quadratic_is_the_kl_of_small_errors_alone():
    fisher, logits = exact_fisher()
    split, acts = split_at(CONFIG, SITE), taps_of("labels").acts[:1]
    run = jax.jit(split.run)
    clean, t = log_softmax(logits), 2
    direction = np.random.default_rng(5).normal(size=acts.shape[2])
    ratios = []
    for size in (0.02, 0.2, 20.0):
        moved = acts.copy()
        moved[0, t] += size * direction
        spliced = log_softmax(np.asarray(run(weights(), moved, moved)[0], np.float64))
        kl = (np.exp(clean) * (clean - spliced)).sum()
        ratios.append(kl / (size**2 * direction @ fisher[t] @ direction / 2))
    assert abs(ratios[0] - 1) < 0.05
    assert ratios[2] < 0.2  # a KL is bounded where the norm saturates


def test_temperature_is_that_of_the_predictions():
    probed, tokens = whole(), jnp.asarray(windows()[:2])
    at = partial(tap_windows, probed, (LAST,))
    warm = HeadReadout(1, "labels", 1e4, 0)
    grads = at(warm, np.inf, weights(), tokens, 0)[LAST].grads
    # At a high temperature all labels are as likely, and gradients are as small.
    plain = at(make_readout("labels"), np.inf, weights(), tokens, 0)[LAST].grads
    ratio = np.abs(np.asarray(grads)).mean() / np.abs(np.asarray(plain)).mean()
    assert 1e-5 < ratio < 1e-3


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="readout: must be 'loss', 'sampled'"):
        make_readout("labelled")
