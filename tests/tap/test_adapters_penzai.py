"""What only penzai has: names of axes, stacks, side inputs, state variables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from penzai import pz
from penzai.models.simple_mlp import MLP, DropoutMLP
from penzai.models.transformer.variants import llamalike_common as llamalike

import toyfeat as ft

CONFIG = llamalike.LlamalikeTransformerConfig(
    num_kv_heads=1,
    query_head_multiplier=2,
    embedding_dim=8,
    projection_dim=4,
    mlp_hidden_dim=12,
    num_decoder_blocks=2,
    vocab_size=17,
    mlp_variant="swiglu",
    tie_embedder_and_logits=False,
    rope_wavelength=1e4,
    rms_norm_eps=1e-6,
    attention_type=llamalike.AttentionTypeGlobalCausal(),
    activation_dtype=jnp.float32,
    parameter_dtype=jnp.float32,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (3, 5)))
CUBES = ft.readouts.scalar(lambda y: jnp.sum(y**3))


@pytest.fixture
def _as_penzai_promotes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("_as_penzai_promotes")
@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_a_transformer_runs_as_it_is_and_names_axes_in_one_order(stacked):
    config = dataclasses.replace(CONFIG, use_layer_stack=stacked)
    model = llamalike.build_llamalike_transformer(config, jax.random.key(0))
    order = ("query_heads", "projection")
    probed, params = ft.from_penzai(model, ("batch", "seq"), order=order)
    outputs, acts = jax.jit(lambda p, x: probed(p, x, {}))(params, TOKENS)
    named = model(pz.nx.wrap(TOKENS, "batch", "seq"))
    want = named.unwrap("batch", "seq", "vocabulary")
    np.testing.assert_allclose(outputs, want, rtol=1e-5, atol=1e-6)
    block = "body/sublayers/1/stacked_sublayers" if stacked else "body/sublayers/1"
    attention, layer = "sublayers/0/delta/sublayers/1", "@0" if stacked else ""
    shapes = {
        "input_to_query": (3, 5, 2, 4),  # query heads and their entries
        "query_key_to_attn": (3, 5, 2, 5),  # keys, which order does not name, come last
        "attn_value_to_output": (3, 5, 8),
    }
    for name, shape in shapes.items():
        assert acts[f"{block}/{attention}/{name}{layer}"].shape == shape
    # An added vector is one in the model; gradients are those of that vector.
    site = f"{block}{layer}"
    delta = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 8)), jnp.float32)
    taps = ft.tap(probed, params, TOKENS, sites=site, readout=CUBES)[site]

    def total(scale):
        return jnp.sum(probed(params, TOKENS, {site: scale * delta})[0] ** 3)

    slope = jax.jvp(total, (0.0,), (1.0,))[1]
    got = jnp.sum(taps.grads.reshape(3, 5, 8) * delta)
    np.testing.assert_allclose(got, slope, rtol=1e-4)


@pytest.mark.usefixtures("_as_penzai_promotes")
def test_masked_scores_of_attention_do_not_break_the_check_of_mixing():
    model = llamalike.build_llamalike_transformer(CONFIG, jax.random.key(0))
    probed, params = ft.from_penzai(model, ("batch", "seq"))
    _, acts = probed(params, TOKENS, {})
    largest = max(float(jnp.max(jnp.abs(act))) for act in acts.values())
    assert largest > 1e37  # warnings of an overflow are errors here
    ft.check_no_mixing(probed, params, TOKENS)


def test_state_variables_of_side_inputs_are_read_and_stay():
    model = DropoutMLP.from_config(jax.random.key(0), [4, 6, 2], drop_rate=0.5)
    stream = pz.RandomStream(
        jax.random.key(3), offset=pz.StateVariable(value=0, label="offset")
    )
    probed, params = ft.from_penzai(model, ("batch", "features"), random_stream=stream)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 4)), jnp.float32)
    first, acts = jax.jit(lambda p: probed(p, x, {}))(params)
    assert stream.offset.value == 0
    assert float(jnp.mean(acts["sublayers/1"] == 0)) > 0.2  # dropped
    want = model(pz.nx.wrap(x, "batch", "features"), random_stream=stream)
    np.testing.assert_allclose(first, want.unwrap("batch", "features"), rtol=1e-5)
    assert stream.offset.value == 1


def test_first_mistakes_are_explained():
    model = MLP.from_config(jax.random.key(0), [2, 4, 1])
    x = jnp.ones((3, 2))
    probed, params = ft.from_penzai(model, ("batch", "features"))
    with pytest.raises(ValueError, match=r"from_penzai: params must be .*got MLP;"):
        probed(model, x, {})
    with pytest.raises(ValueError, match=r"whose axes are .*got the shape \(2,\)"):
        probed(params, x[0], {})
    with pytest.raises(ValueError, match=r"without names.*got axes .*unwrap"):
        probed(params, pz.nx.wrap(x, "batch", "features"), {})
    with pytest.raises(TypeError, match=r"wanted a pz.nn.Layer, got function"):
        ft.from_penzai(lambda x: x, ("batch",))
    with pytest.raises(TypeError, match=r"axes must be names.*got 'batch'"):
        ft.from_penzai(model, "batch")
    with pytest.raises(TypeError, match=r"order must be names.*got 'heads'"):
        ft.from_penzai(model, ("batch",), order="heads")
    for axes in ((), ("batch", "batch")):
        with pytest.raises(ValueError, match=r"must name that of the batch at least"):
            ft.from_penzai(model, axes)
