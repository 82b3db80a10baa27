"""Parameters of a decoder over devices: where they go, and the numbers."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from processes import ROOT, run_python

from toyfeat.models.decoder import (
    Decoder,
    decoder_specs,
    gpt2,
    llama,
    neox,
    stack_blocks,
)

P = PartitionSpec
LLAMA = llama(vocab=8, layers=2, dim=8, heads=4, kv_heads=2, hidden=12, context=8)


def shapes(config):
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)


def split_sizes(config, num, params=None):
    """Path of a parameter to its shape on one device."""
    params = shapes(config) if params is None else params
    mesh = AbstractMesh((num,), ("model",))
    specs = decoder_specs(config, params, mesh)
    sizes = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    layouts = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    for (path, leaf), spec in zip(leaves, layouts, strict=True):
        name = "/".join(key.key for key in path[1:])
        sizes[name] = jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.shape)
    return sizes


def test_heads_neurons_and_tokens_are_split():
    sizes = split_sizes(LLAMA, 2)
    assert sizes["embed/embedding"] == (4, 8)
    assert sizes["head"] == (8, 4)
    assert sizes["blocks_1/attn/query/kernel"] == (8, 4)
    assert sizes["blocks_1/attn/key/kernel"] == (8, 2)
    assert sizes["blocks_1/attn/out/kernel"] == (4, 8)
    assert sizes["blocks_0/gate/kernel"] == sizes["blocks_0/up/kernel"] == (8, 6)
    assert sizes["blocks_0/down/kernel"] == (6, 8)
    assert sizes["blocks_0/attn_norm/scale"] == sizes["final_norm/scale"] == (8,)


def test_stacked_blocks_keep_their_layers_together():
    stacked = jax.eval_shape(stack_blocks, shapes(LLAMA))
    sizes = split_sizes(LLAMA, 2, stacked)
    assert sizes["blocks/attn/out/kernel"] == (2, 4, 8)
    assert sizes["blocks/up/kernel"] == (2, 8, 6)
    assert sizes["blocks/mlp_norm/scale"] == (2, 8)


@pytest.mark.parametrize("make", [gpt2, neox])
def test_biases_go_with_their_columns(make):
    config = make(vocab=8, layers=1, dim=16, heads=2, context=8)
    sizes = split_sizes(config, 2)
    assert sizes["blocks_0/attn/query/bias"] == (8,)
    assert sizes["blocks_0/up/bias"] == (32,)
    assert sizes["blocks_0/attn/out/bias"] == sizes["blocks_0/down/bias"] == (16,)
    assert sizes["blocks_0/attn_norm/bias"] == (16,)
    if make is gpt2:
        assert sizes["positions/embedding"] == (8, 16)


def test_what_devices_do_not_divide_is_on_all_of_them():
    whole = jax.tree.map(lambda x: x.shape, shapes(LLAMA))["params"]["blocks_0"]
    sizes = split_sizes(LLAMA, 4)  # two heads of keys and values
    assert sizes["blocks_0/attn/query/kernel"] == whole["attn"]["query"]["kernel"]
    assert sizes["blocks_0/attn/out/kernel"] == whole["attn"]["out"]["kernel"]
    assert sizes["blocks_0/up/kernel"] == (8, 3)
    sizes = split_sizes(LLAMA, 5)
    assert sizes["embed/embedding"] == (8, 8)
    assert sizes["blocks_0/up/kernel"] == (8, 12)


def test_an_axis_that_the_mesh_does_not_have_is_named():
    mesh = AbstractMesh((2,), ("data",))
    with pytest.raises(ValueError, match=r"axis must be one of .*'data'.*got 'model'"):
        decoder_specs(LLAMA, shapes(LLAMA), mesh)


CHILD = """
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import toyfeat as ft
from toyfeat.meshes import place
from toyfeat.models.decoder import Decoder, decoder_specs, llama

config = llama(vocab=8, layers=2, dim=8, heads=4, kv_heads=2, hidden=12, context=8)
tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 8)
params = Decoder(config).init(jax.random.key(0), tokens[:1])
probed = ft.from_linen(Decoder(config))

def tap(params, tokens):
    readout = ft.readouts.next_token_loss(tokens)
    return ft.tap(probed, params, tokens, sites="blocks_0/mlp_hidden", readout=readout)

wanted = jax.jit(tap)(params, tokens)["blocks_0/mlp_hidden"]
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
split = place(params, mesh, decoder_specs(config, params, mesh))
spread = place(tokens, mesh, P("data"))
found = jax.jit(tap)(split, spread)["blocks_0/mlp_hidden"]
for name in ("acts", "grads"):
    one, many = getattr(wanted, name), getattr(found, name)
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
up = split["params"]["blocks_0"]["up"]["kernel"]
assert up.sharding.shard_shape(up.shape) == (8, 6)
run = jax.jit(lambda p, t: probed(p, t, {})[0]).lower(split, spread).compile().as_text()
# A block sums attention and MLP over the devices, and no weight is gathered.
assert run.count(" all-reduce(") + run.count(" all-reduce-start(") >= 4, run
gathers = [line for line in run.splitlines() if "all-gather" in line]
assert not any("f32[8,12]" in line or "f32[12,8]" in line for line in gathers), gathers
print("ok")
"""


@pytest.mark.slow
def test_a_split_decoder_has_the_taps_of_one_device(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    flags = "--xla_force_host_platform_device_count=8"
    env = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = run_python(script, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["ok"]
