"""The KL near a reconstruction, where it has a closed form and on a small decoder."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, log_softmax, logits_with, weights
from tiny_held import dictionary, held_at

from toyfeat import losses
from toyfeat.lm.expansion import draw_on_path, expand_kl, reconstruct
from toyfeat.lm.finetune import WindowTaps, finetune, window_batches

B, T, D, V = 2, 3, 4, 6
SITE = "blocks_1/resid_post"


def linear(params, entry, value):
    """Logits that are linear in the activation: the Hessian is Gauss-Newton's."""
    return value @ params + 0 * entry[:, :, :1]


@cache
def linear_problem():
    rng = np.random.default_rng(0)
    head, acts = rng.normal(size=(D, V)), rng.normal(size=(B, T, D))
    error = 0.8 * rng.normal(size=(B, T, D))
    counts = np.ones((B, T), np.float32)
    counts[0, 1] = 0
    return np.float32(head), np.float32(acts), np.float32(error), counts


def linear_truth():
    """KL, its slope and its Hessian at the reconstruction, token by token."""
    head, acts, error, counts = (np.float64(x) for x in linear_problem())
    clean, spliced = log_softmax(acts @ head), log_softmax((acts + error) @ head)
    p, q = np.exp(clean), np.exp(spliced)
    kl = (p * (clean - spliced)).sum(2)
    slope = (q - p) @ head.T
    spread = np.einsum("btv,vw->btvw", q, np.eye(V)) - q[..., None] * q[:, :, None]
    hessian = np.einsum("dv,btvw,ew->btde", head, spread, head)
    return kl, slope, hessian, counts > 0


def taps_of(acts, counts, **more):
    return WindowTaps(acts, counts, **more)


def test_where_logits_are_linear_all_three_are_exact():
    head, acts, error, counts = linear_problem()
    kl, slope, hessian, counted = linear_truth()
    near = expand_kl(
        linear, head, taps_of(acts, counts), acts + error, draws=400, batch=1
    )
    np.testing.assert_allclose(near.value[counted], kl[counted], rtol=1e-4)
    np.testing.assert_allclose(near.slope[counted], slope[counted], atol=1e-5)
    np.testing.assert_array_equal(near.slope[~counted], 0)
    draws = np.float64(near.draws)
    second = np.einsum("btkd,btke->btde", draws, draws)
    # Labels are stratified, so that their shares are right to one in 400.
    atol = 0.02 * np.abs(hessian).max()
    np.testing.assert_allclose(second[counted], hessian[counted], atol=atol)
    # Windows do not depend on those that are run with them.
    both = expand_kl(linear, head, taps_of(acts, counts), acts + error, draws=400)
    np.testing.assert_allclose(np.float32(both.draws), draws, atol=1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize("path", ["slope", "value"])
def test_squares_along_the_way_are_the_kl_or_have_its_slope(path):
    head, acts, error, counts = linear_problem()
    kl, slope, _, counted = linear_truth()
    grads = draw_on_path(
        linear, head, taps_of(acts, counts), acts + error, draws=600, path=path
    )
    effect = np.einsum("btkd,btd->btk", np.float64(grads), error)
    if path == "value":
        found, wanted = (effect**2).sum(2) / 2, kl
    else:
        found, wanted = np.einsum("btk,btkd->btd", effect, np.float64(grads)), slope
    found, wanted = found[counted], wanted[counted]
    # Labels of different places are drawn one by one: a tenth of a standard error of 1.
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@cache
def spliced_text():
    """Windows of the small decoder, and reconstructions of all tokens that count."""
    split, held = held_at(SITE)
    flat = jnp.asarray(held.acts.reshape(-1, CONFIG.dim))
    sae, params = dictionary(CONFIG.dim)
    point = np.asarray(sae.decode(params, sae.encode(params, flat)))
    return split, held, point.reshape(held.acts.shape)


def test_the_slope_is_the_gradient_of_the_spliced_kl():
    split, held, point = spliced_text()
    counts = held.weights > 0

    def kl_sum(value):
        value = jnp.where(counts[:, :, None], value, held.acts)
        clean = jax.nn.log_softmax(split.run(weights(), held.acts, held.acts))
        spliced = jax.nn.log_softmax(split.run(weights(), held.acts, value))
        kl = jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2)
        return jnp.sum(jnp.where(counts, kl, 0))

    taps = taps_of(held.acts, held.weights)
    near = expand_kl(split.run, weights(), taps, point, batch=6)
    wanted = jax.jit(jax.grad(kl_sum))(point)
    np.testing.assert_allclose(near.slope, wanted, atol=1e-5)
    # Values from the whole model, run by probes, in float64.
    value = np.where(counts[:, :, None], point, held.acts)
    clean = log_softmax(logits_with(SITE, held.acts, held.tokens))
    spliced = log_softmax(logits_with(SITE, value, held.tokens))
    kl = (np.exp(clean) * (clean - spliced)).sum(2)
    np.testing.assert_allclose(near.value[counts], kl[counts], atol=1e-4)
    assert kl[counts].mean() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 64])
def test_windows_are_reconstructed_some_at_a_time(batch):
    sae, params = dictionary(8)
    acts = np.random.default_rng(1).normal(size=(5, 3, 8)).astype(jnp.bfloat16)
    flat = jnp.asarray(acts, jnp.float32).reshape(15, 8)
    wanted = sae.decode(params, sae.encode(params, flat)).reshape(5, 3, 8)
    found = reconstruct(sae, params, acts, batch=batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert reconstruct(sae, params, acts[:0]).shape == (0, 3, 8)


def test_a_fine_tune_by_a_fresh_expansion_lowers_the_kl():
    """With a refresh before every step it is a fine-tune by the spliced KL."""
    split, held, _ = spliced_text()
    sae, params = dictionary(CONFIG.dim)
    tiled = [np.tile(x, (4, 1, 1)[: x.ndim]) for x in (held.acts, held.weights)]
    made = []

    def make(now):
        made.append(now)
        flat = jnp.asarray(tiled[0].reshape(-1, CONFIG.dim))
        point = sae.decode(now, sae.encode(now, flat)).reshape(tiled[0].shape)
        taps = taps_of(*tiled)
        near = expand_kl(split.run, weights(), taps, point, batch=24)
        taps = taps_of(*tiled, expansion=near)
        return window_batches(taps, windows=6, seed=0, steps=4)

    options = {"steps": 4, "learning_rate": 0.02}
    fresh = finetune(
        sae, params, make, losses.expanded_kl(), refreshes=4, **options
    )  # fmt: skip
    assert len(made) == 4
    run_model = window_batches(
        taps_of(*tiled), windows=6, seed=0, steps=4, params=weights()
    )
    kl = finetune(sae, params, run_model, losses.spliced_kl(split.run), **options)
    for name, value in kl.items():
        np.testing.assert_allclose(fresh[name], value, atol=2e-3)
    assert np.abs(kl["W_dec"] - params["W_dec"]).max() > 0.01


def test_what_cannot_be_refreshed_is_refused():
    sae, params = dictionary(CONFIG.dim)
    acts = np.zeros((2, T, CONFIG.dim), np.float32)
    near = losses.Expansion(acts, acts[..., 0], acts)
    taps = taps_of(acts, np.ones((2, T)), expansion=near)
    with pytest.raises(ValueError, match="one context, got params and an expansion"):
        window_batches(taps, windows=1, seed=0, steps=1, params={})
    batches = window_batches(taps, windows=1, seed=0, steps=2)
    assert batches(jnp.int32(0)).context.slope.shape == (T, CONFIG.dim)
    options = {"steps": 2, "learning_rate": 0.1, "refreshes": 2}
    with pytest.raises(ValueError, match="2 refreshes want a function that makes"):
        finetune(sae, params, batches, losses.expanded_kl(), **options)
    options = {"steps": 3, "learning_rate": 0.1, "refreshes": 3}
    with pytest.raises(ValueError, match="wanted batches of 3 steps, got 2; the step"):
        finetune(sae, params, lambda _: batches, losses.expanded_kl(), **options)
    for point in (acts[:1], np.concatenate([acts, acts])):
        with pytest.raises(ValueError, match=r"expand_kl: point must have the shape"):
            expand_kl(linear, {}, taps, point)
    with pytest.raises(ValueError, match="with at least one window, got"):
        expand_kl(linear, {}, taps_of(acts[:0], np.ones((0, T))), acts[:0])
    with pytest.raises(ValueError, match="draw_on_path: path must be"):
        draw_on_path(linear, {}, taps, acts, draws=1, path="back")
