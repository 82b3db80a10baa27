"""The protocol of a lens model: decoders, models of a user's, and refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_lens_model import CONFIG, model, weights, windows

import toyfeat as ft
from toyfeat import lens as lenses
from toyfeat.models.decoder import Decoder, gpt2, llama


def test_a_decoder_runs_from_every_site_to_every_later_one():
    sites = model().sites
    pairs = [(a, b) for i, a in enumerate(sites) for b in sites[i:]]

    @jax.jit
    def errors(params, tokens):
        acts = model().probed(params, tokens, {})[1]
        runs = [model().run(params, tokens, acts[a], a, b) - acts[b] for a, b in pairs]
        return jnp.stack([jnp.abs(x).max() for x in runs])

    assert errors(weights(), windows()).max() < 1e-4


def test_padding_is_left_out_of_the_run():
    tokens = windows()
    mask = np.ones_like(tokens)
    mask[0, :2] = 0
    acts = model().probed(weights(), (tokens, mask), {})[1]
    first, final = model().sites[0], model().sites[-1]
    resid = model().run(weights(), (tokens, mask), acts[first], first, final)
    np.testing.assert_allclose(
        resid[mask == 1], acts[final][mask == 1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("tied", [True, False])
def test_the_final_stream_reads_as_the_logits(tied):
    config = gpt2(vocab=13, layers=2, dim=8, heads=2, hidden=8, context=6, tied=tied)
    tokens = windows() % 13
    params = Decoder(config).init(jax.random.key(0), tokens)
    small = lenses.from_decoder(config)
    logits, acts = small.probed(params, tokens, {})
    final = acts[small.sites[-1]]
    np.testing.assert_allclose(small.unembed(params, final), logits, atol=1e-5)
    np.testing.assert_allclose(
        small.unembed(params, final[0, 1]), logits[0, 1], atol=1e-5
    )
    assert small.head is not None
    assert small.head(params).shape == (8, 13)


class Linen(nn.Module):
    """A user's model: two blocks that add to a stream, a norm and logits."""

    dropout: float = 0.0

    def setup(self):
        self.embed = nn.Embed(7, 6)
        self.blocks = [nn.Dense(6) for _ in range(2)]
        self.drop = nn.Dropout(self.dropout, deterministic=not self.dropout)
        self.norm = nn.RMSNorm()
        self.head = nn.Dense(7, use_bias=False)

    def __call__(self, tokens):
        resid = self.embed(tokens)
        for block in self.blocks:
            resid = self.drop(resid + jnp.tanh(block(resid)))
        return self.logits(resid)

    def logits(self, resid):
        return self.head(self.norm(resid))


def test_a_linen_model_of_a_user_takes_a_few_lines():
    net, tokens = Linen(), jnp.arange(6).reshape(2, 3)
    params = net.init(jax.random.key(0), tokens)
    small = lenses.from_probed(
        ft.from_linen(net),
        sites=["drop", "drop#1"],
        unembed=lambda p, resid: net.apply(p, resid, method=net.logits),
        head=lambda p: p["params"]["head"]["kernel"],
    )
    lenses.check_model(small, params, tokens)
    logits, acts = small.probed(params, tokens, {})
    final = small.run(params, tokens, acts["drop"], "drop", "drop#1")
    np.testing.assert_allclose(small.unembed(params, final), logits, atol=1e-6)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.second = nnx.Linear(6, 6, rngs=rngs)
        self.head = nnx.Linear(6, 7, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.second(self.first(self.embed(tokens))))


def test_an_nnx_model_of_a_user_takes_a_few_lines():
    net, tokens = Nnx(nnx.Rngs(0)), jnp.arange(6).reshape(2, 3)
    probed, params = ft.from_nnx(net)
    logits_of, _ = ft.from_nnx(net, method=lambda m, resid: m.head(resid))
    small = lenses.from_probed(
        probed,
        sites=["first", "second"],
        unembed=lambda p, resid: logits_of(p, resid, {})[0],
    )
    lenses.check_model(small, params, tokens)
    logits, acts = small.probed(params, tokens, {})
    np.testing.assert_allclose(small.unembed(params, acts["second"]), logits, atol=1e-6)


def test_layers_in_train_mode_are_refused():
    net, tokens = Linen(dropout=0.5), jnp.arange(6).reshape(2, 3)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = net.init(keys, tokens)
    small = lenses.from_probed(
        ft.from_linen(net, rngs={"dropout": jax.random.key(1)}),
        sites=["drop", "drop#1"],
        unembed=lambda p, resid: resid,
    )
    with pytest.raises(ValueError, match=r"evaluation mode.*drop.*switch dropout off"):
        lenses.check_model(small, params, tokens)


def mixing(params, x, tap):
    """A model whose second stream sees all positions."""
    x = tap("a", x * params)
    tap("narrow", x[..., :1])
    tap("flat", x[:, 0])
    return tap("b", x + x.mean(axis=1, keepdims=True))


def test_a_model_that_is_not_causal_is_refused():
    x = jnp.ones((2, 3, 4))
    small = lenses.from_probed(
        ft.from_function(mixing), sites=["a", "b"], unembed=lambda p, h: h
    )
    with pytest.raises(ValueError, match=r"must be causal, got a position"):
        lenses.check_model(small, 2.0, x)


@pytest.mark.parametrize(
    ("sites", "match"),
    [
        (["a", "narrow"], r"one shape \[B, T, D\], got .*'narrow': \(2, 3, 1\)"),
        (["flat", "a"], r"one shape \[B, T, D\], got .*'flat': \(2, 4\)"),
        (["a", "c"], "no site 'c'"),
    ],
)
def test_sites_that_are_no_residual_streams_are_refused(sites, match):
    small = lenses.from_probed(
        ft.from_function(mixing), sites=sites, unembed=lambda p, h: h
    )
    with pytest.raises(ValueError, match=match):
        lenses.check_model(small, 2.0, jnp.ones((2, 3, 4)))


def test_a_model_without_the_three_functions_is_refused():
    probed = ft.from_function(mixing)
    with pytest.raises(TypeError, match=r"unembed must be a function \(params, resid"):
        lenses.from_probed(probed, sites=["a", "b"], unembed=None)
    with pytest.raises(TypeError, match="probed must be a function from ft"):
        lenses.from_probed(None, sites=["a", "b"], unembed=mixing)
    with pytest.raises(TypeError, match="run must be a function as LensModel"):
        lenses.from_probed(probed, sites=["a", "b"], unembed=mixing, run=3)
    for sites in ("a", ["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="two or more different residual streams"):
            lenses.from_probed(probed, sites=sites, unembed=mixing)
    with pytest.raises(TypeError, match=r"model must be a LensModel, got function"):
        lenses.check_model(probed, 2.0, jnp.ones((2, 3, 4)))
    with pytest.raises(TypeError, match="config must be a DecoderConfig, got Decoder"):
        lenses.from_decoder(Decoder(CONFIG))


def test_rounding_of_bfloat16_is_no_later_position():
    config = llama(vocab=48, layers=3, dim=16, heads=4, hidden=24, tied=True)
    tokens = np.random.default_rng(0).integers(0, 47, (4, 8))
    half = lenses.from_decoder(config, dtype=jnp.bfloat16)
    params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 2), int))
    lenses.check_model(half, jax.tree.map(lambda x: 1.5 * x, params), tokens)
