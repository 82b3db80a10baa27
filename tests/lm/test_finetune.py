"""Fine-tuning on windows: what a batch is, what is learned, and going on."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, weights
from tiny_held import dictionary, held_at

from toyfeat import losses
from toyfeat.lm import finetune as module
from toyfeat.lm.finetune import WindowTaps, finetune, window_batches
from toyfeat.lm.split import split_at

SITE, STEPS = "blocks_1/resid_post", 10
SAE, PARAMS = dictionary(CONFIG.dim)
RUN = split_at(CONFIG, SITE).run


@cache
def taps():
    """Copies of the windows, so that there are enough for all steps."""
    held = held_at(SITE)[1]

    def copies(x):
        return np.tile(x, (10, *(1,) * (x.ndim - 1)))

    grads = jnp.asarray(copies(held.grads), jnp.bfloat16)
    return WindowTaps(copies(held.acts), copies(held.weights), grads)


def batches_of(**changes):
    options = {"windows": 6, "seed": 0, "steps": STEPS} | changes
    return window_batches(options.pop("taps", taps()), **options)


def test_a_batch_is_whole_windows_and_none_comes_twice():
    num, length, width = 8, 3, 2
    acts = np.arange(num * length * width, dtype=np.float32)
    acts = acts.reshape(num, length, width)
    plain = WindowTaps(acts, np.ones((num, length)))
    batches = window_batches(plain, windows=2, seed=1, steps=4, params={"a": 1.0})
    rows = [batches(jnp.int32(step)) for step in range(4)]
    firsts = np.concatenate([np.asarray(x.acts)[::length, 0] for x in rows])
    assert sorted(firsts) == acts[:, 0, 0].tolist()
    first = rows[0]
    np.testing.assert_array_equal(first.acts, first.context.acts.reshape(-1, width))
    assert first.context.entry is first.context.acts
    assert first.grads is None
    with pytest.raises(ValueError, match=r"5 steps of 2 windows must be at most the 8"):
        window_batches(plain, windows=2, seed=1, steps=5)


def train(term, folder=None, on_chunk=None, params=None):
    batches = batches_of(params=params)
    return finetune(
        SAE, PARAMS, batches, term, steps=STEPS, learning_rate=0.02,
        directory=folder, on_chunk=on_chunk, weight=3.0,
    )  # fmt: skip


@jax.jit
def _summed_kl(model, params, acts, counts):
    flat = acts.reshape(-1, CONFIG.dim)
    recon = SAE.decode(params, SAE.encode(params, flat)).reshape(acts.shape)
    value = jnp.where(counts[:, :, None] > 0, recon, acts)
    clean = jax.nn.log_softmax(RUN(model, acts, acts))
    spliced = jax.nn.log_softmax(RUN(model, value, value))
    return jnp.sum(counts * jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2))


def true_kl(params):
    """Of the model with reconstructions at all tokens that count."""
    held = held_at(SITE)[1]
    return float(_summed_kl(weights(), params, held.acts, held.weights))


def test_the_kl_falls_further_than_with_the_error_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2)
    start, by_error = true_kl(PARAMS), true_kl(train(None))
    term = losses.spliced_kl(RUN)
    whole = train(term, params=weights())
    assert true_kl(whole) < min(start, by_error)

    # Cut off after the first checkpoint, it ends with the same bits.
    def stop(step, *_):
        if step >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(term, tmp_path, stop, params=weights())
    again = train(term, tmp_path, params=weights())
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], value)


def test_fisher_trains_on_stored_gradients():
    tuned = train(losses.fisher("huber"))
    assert all(np.isfinite(np.asarray(x)).all() for x in tuned.values())
    assert np.abs(tuned["W_dec"] - PARAMS["W_dec"]).max() > 1e-3


def test_a_dictionary_of_another_width_is_refused():
    other = {**PARAMS, "W_dec": PARAMS["W_dec"][:, :4]}
    with pytest.raises(ValueError, match="warm_start: params must have the shapes"):
        finetune(SAE, other, batches_of(), steps=STEPS, learning_rate=0.1)


def test_parameters_of_something_else_are_refused():
    for wrong in (None, [PARAMS, None], (SAE, PARAMS)):
        with pytest.raises(TypeError, match="finetune: params must be names to arrays"):
            finetune(SAE, wrong, batches_of(), steps=STEPS, learning_rate=0.1)
    with pytest.raises(ValueError, match="finetune: params must be of one dictionary"):
        finetune(SAE, (), batches_of(), steps=STEPS, learning_rate=0.1)


def test_a_term_of_nothing_is_refused():
    """Its size in the first batch is what it is divided by."""
    nothing = taps()._replace(weights=np.zeros_like(taps().weights))
    batches = batches_of(taps=nothing)
    with pytest.raises(ValueError, match="finetune: fisher must be above 0 in the fir"):
        finetune(SAE, PARAMS, batches, losses.fisher(), steps=STEPS, learning_rate=0.1)
