"""Derivatives with attention patterns and norms held fixed, and the tuned lens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient
from tiny_lens_model import CONFIG, SKIP, model, weights, windows

from toyfeat import lens as lenses
from toyfeat.models.decoder import Decoder, gpt2
from toyfeat.models.decoder.attention import (
    apply_rotary,
    causal_attention,
    rotary_angles,
)

FROZEN = lenses.from_decoder(CONFIG, frozen=True)


def fixed_block(tensors, resid):
    """A block of the Llama decoder, with the fixed parts written out."""

    def fixed_norm(x, scale):
        size = stop_gradient(jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.eps))
        return x / size * scale[None, None]

    def heads(x, name, num):
        return (x @ tensors["attn"][name]["kernel"]).reshape(*x.shape[:2], num, -1)

    normed = fixed_norm(resid, tensors["attn_norm"]["scale"])
    angles = rotary_angles(CONFIG, resid.shape[1])
    query = apply_rotary(heads(normed, "query", 2), angles)
    key = apply_rotary(heads(normed, "key", 1), angles)
    value = heads(normed, "value", 1)
    mixed = causal_attention(stop_gradient(query), stop_gradient(key), value)
    resid = resid + mixed.reshape(resid.shape) @ tensors["attn"]["out"]["kernel"]
    normed = fixed_norm(resid, tensors["mlp_norm"]["scale"])
    hidden = jax.nn.silu(normed @ tensors["gate"]["kernel"])
    hidden = hidden * (normed @ tensors["up"]["kernel"])
    return resid + hidden @ tensors["down"]["kernel"]


@pytest.mark.slow_cases
@pytest.mark.parametrize("chain", [True, False])
def test_frozen_derivatives_are_those_with_fixed_patterns_and_norms(chain):
    tokens, params = windows(1), weights()
    site, final = FROZEN.sites
    acc = lenses.mean_jacobian(FROZEN, 8, chunk=8, chain=chain, **SKIP)

    @jax.jit
    def fit(params, tokens):
        fitted = acc.finish(acc.update(acc.init(), params, tokens))
        exact, same = (m.probed(params, tokens, {})[1] for m in (model(), FROZEN))
        return fitted.matrices[site], exact, same[final]

    fitted, acts, same = fit(params, tokens)
    np.testing.assert_array_equal(same, acts[final])
    block = params["params"]["blocks_1"]
    full = jax.jit(jax.jacrev(lambda x: fixed_block(block, x)[0]))(acts[site])
    wanted = full[2:5, :, 0, 2:5].sum(0).mean(1)
    np.testing.assert_allclose(fitted, wanted, atol=1e-5)


def test_frozen_blocks_with_layer_norms_are_linear_in_the_stream():
    """Attention alone, patterns and norms fixed: the derivative times h is the value.

    The norms' means are linear too, so that only biases are left out.
    """
    config = gpt2(vocab=17, layers=2, dim=8, heads=2, hidden=12, context=6)
    tokens = windows(1)
    params = Decoder(config).init(jax.random.key(0), tokens)
    params["params"]["blocks_1"]["down"] = jax.tree.map(
        jnp.zeros_like, params["params"]["blocks_1"]["down"]
    )
    frozen = lenses.from_decoder(config, frozen=True)
    site, final = frozen.sites

    @jax.jit
    def errors(params, tokens):
        acts = frozen.probed(params, tokens, {})[1]

        def run(resid):
            return frozen.run(params, tokens, resid, site, final)

        value, slope = jax.jvp(run, (acts[site],), (acts[site],))
        return value - acts[final], value - slope

    for error in errors(params, tokens):
        assert jnp.abs(error).max() < 1e-5


def test_the_tuned_lens_learns_what_the_model_will_say():
    tokens, params = windows(8), weights()
    losses = []
    tuned = lenses.tuned_lens(
        model(),
        params,
        [(tokens, None)],
        steps=60,
        learning_rate=0.02,
        on_step=lambda step, found: losses.append(found),
    )
    (site,) = tuned.maps
    history = [float(x[site]) for x in losses]
    assert len(history) == 60
    assert history[-1] < 0.5 * history[0]

    # The first loss is that of the logit lens, by the definition.
    @jax.jit
    def logits(params, tokens):
        acts = model().probed(params, tokens, {})[1]
        unembed = functools.partial(model().unembed, params)
        return [jax.nn.log_softmax(unembed(acts[s])) for s in model().sites]

    said, final = map(np.asarray, logits(params, tokens))
    divergence = (np.exp(final) * (final - said)).sum(-1).mean()
    np.testing.assert_allclose(history[0], divergence, rtol=1e-4)
    # The divergence of both lenses, over all tokens and over those of a mask.
    plain = lenses.logit_lens(model(), params)
    found = lenses.output_divergence(model(), params, plain, [(tokens, None)])
    np.testing.assert_allclose(found[site], divergence, rtol=1e-4)
    mask = (np.arange(tokens.size).reshape(tokens.shape) % 3 == 0).astype(float)
    parts = [(tokens[:3], mask[:3]), (tokens[3:], mask[3:])]
    found = lenses.output_divergence(model(), params, plain, parts)
    each = (np.exp(final) * (final - said)).sum(-1)
    wanted = (each * mask).sum() / mask.sum()
    np.testing.assert_allclose(found[site], wanted, rtol=1e-4)
    # Training goes on from a lens.
    again: list = []
    lenses.tuned_lens(
        model(),
        params,
        [(tokens, None)],
        steps=1,
        start=tuned,
        on_step=lambda step, found: again.append(float(found[site])),
    )
    found = lenses.output_divergence(model(), params, tuned, [(tokens, None)])
    np.testing.assert_allclose(again[0], found[site], rtol=1e-4)
    assert again[0] < history[-2]
    other = tuned._replace(maps={})
    with pytest.raises(ValueError, match=r"start must have one map of \[\d+, \d+\]"):
        lenses.tuned_lens(model(), params, [(tokens, None)], steps=1, start=other)
    with pytest.raises(ValueError, match="output_divergence: batches must be one"):
        lenses.output_divergence(model(), params, plain, [])
    assert tuned.kind == "tuned"
    with pytest.raises(ValueError, match="tuned_lens: batches must be one"):
        lenses.tuned_lens(model(), params, [], steps=1)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above"):
        lenses.tuned_lens(model(), params, [(tokens, None)], steps=1, learning_rate=0)


def test_masks_of_a_divergence_are_of_every_token_and_may_be_empty():
    tokens, params = windows(4), weights()
    plain = lenses.logit_lens(model(), params)
    far = functools.partial(lenses.output_divergence, model(), params, plain)
    (site,) = plain.maps
    wanted = far([(tokens, None)])[site]
    none = np.zeros(tokens.shape)
    found = far([(tokens, None), (tokens, none)])[site]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="masks must leave a token or more, got none"):
        far([(tokens, none)])
    # One row for all windows would weigh them as one.
    with pytest.raises(ValueError, match=r"output_divergence: mask must have shape"):
        far([(tokens, none[0] + 1)])
    with pytest.raises(ValueError, match=r"tuned_lens: mask must have shape"):
        lenses.tuned_lens(model(), params, [(tokens, none[0] + 1)], steps=1)
    with pytest.raises(TypeError, match="output_divergence: model must be"):
        lenses.output_divergence(None, params, plain, [(tokens, None)])
    # A batch without a token teaches nothing.
    seen: list = []
    lenses.tuned_lens(
        model(),
        params,
        [(tokens, none)],
        steps=1,
        on_step=lambda step, losses: seen.append(float(losses[site])),
    )
    assert seen == [0]
