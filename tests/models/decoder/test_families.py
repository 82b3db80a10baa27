"""Families of decoders against golden numbers of transformers.

``python benchmarks/decoder_families.py --peer PYTHON --golden tests/golden/decoder``
wrote them: random weights, tokens, logits, the residual stream, gradients, patterns.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.lm.contexts import _promoted
from toyfeat.models.decoder import (
    Decoder,
    generate,
    llama,
    load_decoder,
    parse_config,
    stack_blocks,
)
from toyfeat.models.decoder.attention import rotary_angles

pytest.importorskip("safetensors")

GOLDEN = Path(__file__).parents[2] / "golden" / "decoder"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
FAMILY = pytest.mark.parametrize("name", NAMES)


@functools.cache
def loaded(name):
    model = load_decoder(GOLDEN / name, tokenizer=False)
    return model, dict(np.load(GOLDEN / name / "expected.npz"))


def close(got, want, tol=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(
        got.reshape(want.shape), want, rtol=0, atol=tol * np.abs(want).max()
    )


@pytest.mark.slow_cases
@FAMILY
def test_logits_sites_gradients_and_patterns_are_those_of_transformers(name):
    model, theirs = loaded(name)
    tokens = jnp.asarray(theirs["tokens"], jnp.int32)
    probed = ft.from_linen(Decoder(model.config, heads=True))
    names = [key.removesuffix(".grads") for key in theirs if key.endswith(".grads")]
    sites = {key: "blocks_{}/{}".format(*key.split(".")) for key in names}

    @jax.jit
    def ours(params, tokens):
        readout = ft.readouts.next_token_loss(tokens)
        taps = ft.tap(
            probed, params, tokens, sites=list(sites.values()), readout=readout
        )
        return probed(params, tokens, {}), taps

    (logits, acts), taps = jax.device_get(ours(model.params, tokens))
    close(logits, theirs["logits"])
    assert len(sites) == 2 * 3 + 1
    for key, site in sites.items():
        close(taps[site].acts, theirs[f"{key}.acts"])
        close(taps[site].grads, theirs[f"{key}.grads"])
    close(acts["blocks_1/attn/pattern"], theirs["1.pattern"])
    assert theirs["logits"].std() > 0.3
    # What the heads do is what the layer returns.
    config, block = model.config, "blocks_1/attn"
    size = len(tokens), tokens.shape[1]
    assert acts[f"{block}/q"].shape == (*size, config.heads, config.head_dim)
    assert acts[f"{block}/k"].shape == (*size, config.kv_heads, config.head_dim)
    groups = np.repeat(acts[f"{block}/v"], config.heads // config.kv_heads, axis=2)
    mixed = np.einsum("bhts,bshd->bthd", acts[f"{block}/pattern"], groups)
    close(acts[f"{block}/z"], mixed)


# 1 / 100 ** (arange(0, 32, 2) / 32) in float32, by torch 2.14 as in transformers 5.24.
RATES = (
    "0x1p+0 0x1.7ff222p-1 0x1.1feb34p-1 0x1.afd136p-2 0x1.43d136p-2 0x1.e5a846p-3 "
    "0x1.6c310ep-3 0x1.111aeep-3 0x1.99999ap-4 0x1.33281ap-4 0x1.ccab84p-5 "
    "0x1.59742ap-5 0x1.030dc6p-5 0x1.84869ep-6 0x1.235a72p-6 0x1.b4f7e4p-7"
)


def test_rates_of_rotations_have_the_bits_of_transformers():
    """One bit more turns position 1000 by 6e-5, which attention then sees."""
    config = llama(vocab=5, layers=1, dim=32, heads=1, hidden=8, rotary_base=100.0)
    rates = np.array([float.fromhex(rate) for rate in RATES.split()], np.float32)
    angles = np.float32(1000) * rates
    cos, sin = rotary_angles(config, 1001)
    np.testing.assert_array_equal(cos[0, 1000], np.cos(angles))
    np.testing.assert_array_equal(sin[0, 1000], np.sin(angles))


def test_a_part_of_a_decoder_keeps_the_windows_of_its_layers():
    """A decoder that starts in the middle, and one that ends there, as lenses run."""
    model, theirs = loaded("gemma3_text")
    first = dataclasses.replace(model.config, layers=2)
    tokens = jnp.asarray(theirs["tokens"], jnp.int32)
    site = "blocks_1/resid_post"
    _, acts = jax.jit(ft.from_linen(Decoder(first)))(model.params, tokens, {})
    rest = jax.jit(Decoder(model.config, start=2).apply)(model.params, acts[site])
    close(acts[site], theirs["2.resid_pre.acts"])
    close(rest, theirs["logits"])


def test_what_reads_norms_knows_their_offset():
    """The frozen lens refuses Gemma; what a latent promotes is scaled by 1 + scale."""
    model, _ = loaded("gemma2")
    with pytest.raises(ValueError, match="from_decoder: frozen wants norms before"):
        ft.lenses.from_decoder(model.config, frozen=True)
    writer = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    params = model.params["params"]
    scale = 1 + np.asarray(params["final_norm"]["scale"])
    want = (writer * scale) @ np.asarray(params["embed"]["embedding"]).T
    got = _promoted(model.params, jnp.asarray(writer), model.config.norm_offset)
    close(got, want)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["gemma3_text", "mistral"])
def test_a_scan_and_a_loop_agree(name):
    """With windows in some layers and rotations of their own, or in all."""
    model, theirs = loaded(name)
    scanned = jax.jit(Decoder(model.config, scan=True, remat=True).apply)
    logits = scanned(stack_blocks(model.params), jnp.asarray(theirs["tokens"], int))
    close(logits, theirs["logits"])


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["gemma3_text", "qwen2", "llama-yarn"])
@pytest.mark.parametrize("heads", [False, True])
def test_generation_under_probes_is_that_of_whole_texts(name, heads):
    model, theirs = loaded(name)
    config, num = model.config, 6
    rng = np.random.default_rng(0)
    probes = {
        "blocks_0/resid_post": jnp.asarray(rng.normal(size=16), jnp.float32),
        "blocks_1/mlp_out": lambda act: act * 0.5,
    }
    if heads:
        probes["blocks_1/attn/k"] = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
        if config.head_dim != 8:
            probes["blocks_1/attn/k"] = probes["blocks_1/attn/k"][:, :4]
    # The first row begins with padding.
    prompt = jnp.asarray(theirs["tokens"][:, :5], jnp.int32)
    mask = jnp.asarray(np.arange(5) >= np.array([[2], [0]]), jnp.int32)
    run = jax.jit(
        lambda p, t, m: generate(config, p, t, num, probes=probes, mask=m, heads=heads)
    )
    got = run(model.params, prompt, mask)
    assert got.tokens.shape == (2, num)
    # The whole text at once, with the same probes at all its positions.
    text = jnp.concatenate([prompt, got.tokens], axis=1)
    whole = jnp.concatenate([mask, jnp.ones((2, num), jnp.int32)], axis=1)
    probed = jax.jit(
        lambda p, t, m: ft.from_linen(Decoder(config, heads=heads))(p, (t, m), probes)
    )
    logits, _ = probed(model.params, text, whole)
    close(got.logits, logits[:, 4:-1])
    np.testing.assert_array_equal(got.tokens, np.argmax(got.logits, axis=-1))


@pytest.mark.slow
def test_generation_that_draws_and_what_it_refuses():
    model, theirs = loaded("llama-yarn")
    tokens = jnp.asarray(theirs["tokens"][:, :5], jnp.int32)
    draw = functools.partial(generate, model.config, model.params, tokens)
    key = jax.random.key(0)
    drawn = draw(1, temperature=1.0, key=key)
    want = jax.random.categorical(jax.random.split(key, 1)[0], drawn.logits[:, 0])
    np.testing.assert_array_equal(drawn.tokens[:, 0], want)
    with pytest.raises(TypeError, match="generate: key must be"):
        draw(2, temperature=1.0)
    with pytest.raises(ValueError, match="generate: num must be"):
        draw(0)
    with pytest.raises(ValueError, match="generate: a probe must be the same at every"):
        draw(2, probes={"blocks_0/resid_post": jnp.ones((5, 16))})
    with pytest.raises(ValueError, match="generate: padding must be on the left"):
        draw(2, mask=jnp.asarray([[1, 1, 1, 1, 0]] * 2))
    grown = loaded("llama-dynamic")[0]
    with pytest.raises(ValueError, match="generate: dynamic rotations turn all"):
        generate(grown.config, grown.params, tokens, 9)


def entries(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def test_older_files_say_the_same():
    """Names and defaults of files that transformers 4 wrote."""
    new = entries("gemma3_text")
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e4, "rope_local_base_freq": 100.0}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    old |= {"sliding_window_pattern": 2}
    assert parse_config(old) == parse_config(new)
    for name, left_out in (
        ("gemma2", ("layer_types", "rope_parameters", "head_dim_")),
        ("qwen2", ("layer_types", "rope_parameters")),
        ("mistral", ("rope_parameters",)),
        ("olmo2", ("rope_parameters", "tie_word_embeddings")),
    ):
        short = {k: v for k, v in entries(name).items() if k not in left_out}
        assert parse_config(short) == parse_config(entries(name)), name


def test_what_the_families_are():
    configs = {name: loaded(name)[0].config for name in NAMES}
    assert configs["gemma2"].local_layers == (True, False, True)
    assert configs["gemma2"].norms == "both"
    assert configs["gemma2"].tied
    assert configs["gemma3_text"].local_base == 100.0
    assert configs["gemma3_text"].rotary_divisors == (8.0,) * 4
    assert configs["qwen2"].local_layers == (False, True, True)
    assert configs["qwen2"].qkv_bias
    assert not configs["qwen2"].out_bias
    assert configs["olmo2"].qk_norm == "all"
    assert configs["phi3"].rotary_dim == 2
    assert configs["phi3"].window == configs["mistral"].window == 4
    assert configs["llama-dynamic"].rotary_growth == 2.0
    assert configs["llama-yarn"].rotary_scale == pytest.approx(1 + 0.1 * np.log(4))


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("gemma2", {"layer_types": ["linear"]}, "layer_types must be a list of sl"),
        ("gemma2", {"layer_types": []}, "one for each layer, got"),
        ("gemma2", {"use_bidirectional_attention": True}, "is not covered"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "factors must be positive"),
        ("mistral", {"sliding_window": 0}, "window must be a number of positions"),
        ("phi3", {"partial_rotary_factor": 2}, "partial_rotary_factor must be a part"),
        (
            "qwen3",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantized by 'fp8'",
        ),
        ("llama-yarn", {"rope_parameters": {"rope_type": "longrope"}}, "not covered"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn"}}, "no entry 'factor'"),
    ],
)
def test_entries_that_do_not_fit(name, changes, match):
    given = entries(name) | changes
    if "partial_rotary_factor" in changes:
        given.pop("rope_parameters")
    with pytest.raises(ValueError, match=match):
        parse_config(given)


def test_kinds_of_norms_are_checked():
    config = llama(vocab=5, layers=1, dim=4, heads=1, hidden=4)
    with pytest.raises(ValueError, match="decoder: norms must be one of pre, post"):
        dataclasses.replace(config, norms="sandwich")
    with pytest.raises(ValueError, match="decoder: local_layers must be 1 or more"):
        dataclasses.replace(config, window=2, local_layers=())
