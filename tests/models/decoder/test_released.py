import importlib
import json
from functools import cache

import decoder_oracle as oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from toyfeat.models.decoder import (
    Decoder,
    Pretrained,
    load_decoder,
    parse_config,
    stack_blocks,
    token_windows,
)

safetensors = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

TOKENS = np.random.default_rng(1).integers(0, 13, (2, 6)).astype(np.int32)

OLD = {name: oracle.CONFIGS[name] for name in ("gpt2", "neox", "llama")}
NEW = {  # what transformers 5 writes
    "gpt2": oracle.GPT2
    | {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "neox": {k: v for k, v in oracle.NEOX.items() if not k.startswith("rotary")}
    | {
        "attention_bias": True,
        "hidden_act": "gelu",
        "rope_parameters": {
            "partial_rotary_factor": 0.5,
            "rope_theta": 50.0,
            "rope_type": "default",
        },
    },
    "llama": {k: v for k, v in oracle.LLAMA.items() if k != "rope_theta"}
    | {
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
    },
}
HEADS = {"gpt2": "lm_head", "gpt_neox": "embed_out", "llama": "lm_head"}
EMBEDDINGS = {
    "gpt2": "transformer.wte",
    "gpt_neox": "gpt_neox.embed_in",
    "llama": "model.embed_tokens",
}


def write(folder, given, tensors, *, shards=1):
    """A folder as transformers writes it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(given))
    if shards == 1:
        safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for part in range(shards):
        file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        own = dict(list(tensors.items())[part::shards])
        safetensors.save_file(own, folder / file, {"format": "pt"})
        where |= dict.fromkeys(own, file)
    size = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@cache
def compiled(config):
    """The scanned model, which compiles in less time."""
    model = Decoder(config, scan=True)
    return jax.jit(lambda params, tokens: model.apply(stack_blocks(params), tokens))


def check(loaded, given, tensors, tol=1e-5):
    wanted = oracle.forward(given, tensors, TOKENS)[0]
    found = compiled(loaded.config)(loaded.params, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tol * np.abs(wanted).max())


def tied_again(given):
    return given | {"tie_word_embeddings": True}


# Folders.


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("style", [OLD, NEW], ids=["old", "new"])
def test_a_folder_gives_the_logits_of_its_architecture(tmp_path, name, style):
    given = style[name]
    tensors = oracle.random_tensors(given)
    loaded = load_decoder(write(tmp_path / "model", given, tensors))
    assert isinstance(loaded, Pretrained)
    assert loaded.name == "model"
    assert loaded.tokenizer is None
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype("f4")}
    check(loaded, given, tensors)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["neox-unbiased-tied", "llama-biased-tied"])
def test_options_of_a_configuration_are_read(tmp_path, name):
    given = oracle.CONFIGS[name]
    tensors = oracle.random_tensors(given)
    check(load_decoder(write(tmp_path, given, tensors)), given, tensors)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OLD)
def test_names_without_the_prefix_of_the_inner_model(tmp_path, name):
    tensors = oracle.random_tensors(OLD[name])
    bare = oracle.without_prefix(tensors)
    assert not bare.keys() & tensors.keys() - {"lm_head.weight", "embed_out.weight"}
    check(load_decoder(write(tmp_path, OLD[name], bare)), OLD[name], tensors)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OLD)
def test_shards_with_an_index(tmp_path, name):
    tensors = oracle.random_tensors(OLD[name])
    folder = write(tmp_path, OLD[name], tensors, shards=3)
    check(load_decoder(folder), OLD[name], tensors)


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    tensors = oracle.random_tensors(oracle.LLAMA)
    halves = {name: x.astype(dtype) for name, x in tensors.items()}
    folder = write(tmp_path, oracle.LLAMA, halves)
    check(load_decoder(folder), oracle.LLAMA, halves)
    kept = load_decoder(folder, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(kept.params)} == {jnp.dtype(dtype)}
    table = halves["model.embed_tokens.weight"]
    found = kept.params["params"]["embed"]["embedding"]
    np.testing.assert_array_equal(found, table)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OLD)
def test_a_tied_model_with_its_head_written_again(tmp_path, name):
    given = tied_again(OLD[name])
    tensors = oracle.random_tensors(given)
    embedding = tensors[f"{EMBEDDINGS[given['model_type']]}.weight"]
    head = {f"{HEADS[given['model_type']]}.weight": embedding}
    folder = write(tmp_path, given, tensors | head)
    check(load_decoder(folder), given, tensors)
    write(tmp_path, given, tensors | {n: x + 1 for n, x in head.items()})
    with pytest.raises(ValueError, match=r"says that embeddings are tied .* is not "):
        load_decoder(folder)


def test_masks_and_tables_of_old_checkpoints_are_left_out(tmp_path):
    mask = np.tri(8, dtype=np.uint8)[None, None]
    far = np.asarray(-1e4, np.float32)
    extra = {
        "gpt2": {"transformer.h.1.attn.bias": mask, "h.0.attn.masked_bias": far},
        "neox": {
            "gpt_neox.layers.0.attention.bias": mask.astype(bool),
            "gpt_neox.layers.0.attention.masked_bias": far,
            "gpt_neox.layers.2.attention.rotary_emb.inv_freq": np.ones(2, "f4"),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, "f4")},
    }
    for name, more in extra.items():
        tensors = oracle.random_tensors(OLD[name])
        folder = write(tmp_path / name, OLD[name], tensors | more)
        check(load_decoder(folder), OLD[name], tensors)


def test_entries_that_are_left_out_have_the_defaults_of_transformers():
    given = {"model_type": "llama", "vocab_size": 5, "num_hidden_layers": 1}
    given |= {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6}
    config = parse_config(given | {"num_key_value_heads": None, "head_dim": None})[1]
    assert (config.kv_heads, config.head_dim, config.rotary_base) == (2, 4, 1e4)
    assert (config.eps, config.activation, config.tied) == (1e-6, "silu", False)
    given |= {"model_type": "gpt_neox", "hidden_size": 16}
    config = parse_config(given | {"max_position_embeddings": 4})[1]
    assert (config.rotary_dim, config.rotary_base, config.eps) == (2, 1e4, 1e-5)
    assert (config.parallel, config.qkv_bias, config.tied) == (True, True, False)


# Folders that do not fit.


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", oracle.LLAMA, oracle.random_tensors(oracle.LLAMA))


def changed(folder, tensors=(), without=(), **entries):
    given = {**oracle.LLAMA, **entries}
    kept = oracle.random_tensors(oracle.LLAMA) | dict(tensors)
    kept = {name: x for name, x in kept.items() if name not in without}
    given = {name: x for name, x in given.items() if x is not ...}
    return write(folder, given, kept)


def refused(path, match, kind=ValueError, **options):
    with pytest.raises(kind, match=match) as caught:
        load_decoder(path, **options)
    assert type(caught.value) is kind


def test_files_that_are_not_there(tmp_path, folder):
    refused(tmp_path / "none", r"load_decoder: there is no .*none; ", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty has no config.json; is it", FileNotFoundError)
    (folder / "model.safetensors").unlink()
    refused(folder, r"no model.safetensors and no .*index.json", FileNotFoundError)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(tmp_path / "model.bin", r"a folder or a .gguf file, got .* model.bin")


def test_a_shard_that_is_not_there(tmp_path):
    tensors = oracle.random_tensors(oracle.LLAMA)
    folder = write(tmp_path, oracle.LLAMA, tensors, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    refused(folder, rf"lacks the shard {shard.name}", FileNotFoundError)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": []}', '{"weight_map": 3'])
def test_an_index_that_lists_no_shards(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, r"index.json (has no weight_map|must be a JSON object in UTF-8)")


@pytest.mark.parametrize("part", [0.0, 0.0005, 0.01, 0.3, 0.7, 0.999])
def test_truncated_weights(folder, part):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    refused(folder, r"model.safetensors is not a whole safetensors file .*again")


@pytest.mark.parametrize("text", ["", '{"model_type": "lla', "not JSON"])
def test_a_truncated_configuration(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config.json must be a JSON object in UTF-8, got other text")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"llama"'])
def test_a_configuration_without_entries(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config.json must be a JSON object in UTF-8, got ")


def test_tensors_that_are_missing(folder):
    gone = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    changed(folder, without=gone)
    refused(folder, r"misses the tensors layers.1.mlp.up_proj.weight, norm.weight; do")
    changed(folder, num_hidden_layers=4)
    refused(folder, r"misses the tensors layers.3.* and 5 more; do its config")


def test_tensors_that_are_left_over(folder):
    changed(folder, {"model.layers.0.self_attn.q_proj.bias": np.ones(24, "f4")})
    refused(folder, r"that this kind of model does not have: layers.0.*q_proj.bias; do")
    changed(folder, num_hidden_layers=2)
    refused(folder, r"does not have: layers.2.* and 5 more")


def test_tensors_of_another_shape(folder):
    changed(folder, {"model.layers.0.mlp.up_proj.weight": np.ones((12, 20), "f4")})
    refused(folder, r"layers.0.mlp.up_proj.weight is \(12, 20\), wanted \(20, 12\)")
    changed(folder, vocab_size=14)
    refused(
        folder,
        r"embed_tokens.weight is \(13, 12\), wanted \(14, 12\), "
        r"lm_head.weight is \(13, 12\), wanted \(14, 12\); do its configuration",
    )


def test_an_untied_model_without_a_head(folder):
    changed(folder, without=["lm_head.weight"])
    refused(folder, r"misses the tensors lm_head.weight")


@pytest.mark.parametrize("kind", ["mixtral", None, 3, ["llama"], {}])
def test_another_architecture(folder, kind):
    changed(folder, model_type=kind)
    refused(folder, r"model of type gpt2, gpt_neox, llama, .*, got .*; wrap another")


@pytest.mark.parametrize("name", OLD)
def test_entries_that_are_missing(name):
    needed = {
        "gpt2": ["vocab_size", "n_layer", "n_embd", "n_head", "n_positions"],
        "neox": ["vocab_size", "num_hidden_layers", "hidden_size"],
        "llama": ["vocab_size", "num_attention_heads", "intermediate_size"],
    }
    for entry in needed[name]:
        given = {key: x for key, x in OLD[name].items() if key != entry}
        with pytest.raises(ValueError, match=rf"config.json has no entry '{entry}'"):
            parse_config(given)


SIZES = {
    "gpt2": ["vocab_size", "n_layer", "n_embd", "n_head", "n_inner", "n_positions"],
    "neox": [
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ],
    "llama": [
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
    ],
}
SCALES = {
    "gpt2": ["layer_norm_epsilon"],
    "neox": ["layer_norm_eps", "rotary_pct", "rotary_emb_base"],
    "llama": ["rms_norm_eps", "rope_theta"],
}
FLAGS = {
    "gpt2": ["tie_word_embeddings"],
    "neox": ["use_parallel_residual", "attention_bias"],
    "llama": ["attention_bias", "mlp_bias", "tie_word_embeddings"],
}
HAS_DEFAULT = {
    "gpt2": {"n_inner"},
    "neox": {"intermediate_size"},
    "llama": {"num_key_value_heads", "head_dim"},
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("value", ["12", "many", None, -4, 0, 2.5, True, [12], {}])
def test_sizes_that_are_none(name, value):
    for entry in SIZES[name]:
        if value is None and entry in HAS_DEFAULT[name]:
            continue
        match = r"(gpt2|neox|llama): heads must divide|decoder: sizes must be whole"
        with pytest.raises(ValueError, match=match):
            parse_config(OLD[name] | {entry: value})


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("value", ["1e-5", None, -1.0, 0, True, [1.0], float("nan")])
def test_scales_that_are_none(name, value):
    for entry in SCALES[name]:
        match = r"eps and rotary_base must be positive|rotary_share must be a part"
        with pytest.raises(ValueError, match=match):
            parse_config(OLD[name] | {entry: value})


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("value", ["false", None, 1, []])
def test_flags_that_are_none(name, value):
    for entry in FLAGS[name]:
        with pytest.raises(ValueError, match=r"decoder: flags must be True or False"):
            parse_config(OLD[name] | {entry: value})


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 50.0}},
    ],
)
@pytest.mark.parametrize("name", ["neox", "llama"])
def test_rotations_of_other_types(name, entries):
    with pytest.raises(ValueError, match=r"'(longrope|proportional)' are not covered"):
        parse_config(OLD[name] | entries)


LLAMA3 = oracle.CONFIGS["llama3"]["rope_parameters"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"factor": 0}, r"'llama3' want positive numbers, .*'factor': 0"),
        ({"factor": "8"}, r"positive numbers, .*'factor': '8'"),
        ({"low_freq_factor": 3.0}, r"high_freq_factor above low_freq_factor, got"),
        ({"factor": float("inf")}, r"positive numbers, .*'factor': inf"),
        ({"factor": ...}, r"config.json has no entry 'factor'"),
        ({"rope_type": "linear", "factor": -1}, r"'linear' want .*'factor': -1"),
        ({"rope_type": "linear", "factor": float("nan")}, r"'factor': nan"),
    ],
)
def test_scaled_rotations_that_cannot_be(changes, match):
    rope = {k: v for k, v in {**LLAMA3, **changes}.items() if v is not ...}
    with pytest.raises(ValueError, match=match):
        parse_config(oracle.LLAMA | {"rope_parameters": rope})


def test_the_context_of_scaled_rotations_is_that_of_the_model_by_default():
    """As transformers has it."""
    rope = {k: v for k, v in LLAMA3.items() if "original" not in k}
    size = {"max_position_embeddings": LLAMA3["original_max_position_embeddings"]}
    given = oracle.CONFIGS["llama3"]
    found = parse_config(given | size | {"rope_parameters": rope})[1].rotary_divisors
    assert found == parse_config(given)[1].rotary_divisors


def test_rotations_of_llama_3_slow_long_waves_and_no_short_ones():
    """Of the published sizes of Llama 3.1."""
    rope = LLAMA3 | {"rope_theta": 5e5, "factor": 8.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    more = {"head_dim": 128, "rope_parameters": rope}
    found = parse_config(oracle.LLAMA | more)[1].rotary_divisors
    waves = 2 * np.pi * 5e5 ** (np.arange(64) / 64)
    np.testing.assert_allclose(np.array(found)[waves > 8192], 8.0)
    np.testing.assert_allclose(np.array(found)[waves < 8192 / 4], 1.0)
    between = np.array(found)[(waves > 8192 / 4) & (waves < 8192)]
    assert len(between) > 3
    assert np.all(np.diff(between) > 0)
    assert 1 < between[0] < between[-1] < 8


@pytest.mark.parametrize("value", ["linear", [50.0], 2])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rotations_that_are_no_entries(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be entries, got "):
        parse_config(oracle.LLAMA | {name: value})


def test_of_both_names_of_rotations_the_older_one_counts():
    """As in transformers' ``convert_rope_params_to_dict``."""
    other = {"rope_parameters": {"rope_theta": 99.0, "rope_type": "default"}}
    older = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    given = {k: v for k, v in oracle.LLAMA.items() if k != "rope_parameters"}
    both = parse_config(given | other | older)[1]
    assert both == parse_config(given | older)[1]
    assert both != parse_config(given | other)[1]
    assert parse_config(given | other | {"rope_scaling": None}) == parse_config(
        given | other
    )


@pytest.mark.parametrize("value", ["quick_gelu", None, ["gelu"]])
def test_another_activation(value):
    for name, entry in (("gpt2", "activation_function"), ("llama", "hidden_act")):
        with pytest.raises(ValueError, match=r"wanted an activation of gelu, .* got "):
            parse_config(OLD[name] | {entry: value})


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_options_of_gpt2_that_are_not_covered(entry, value):
    with pytest.raises(ValueError, match=rf"{entry} = {value} is not covered"):
        parse_config(oracle.GPT2 | {entry: value})


# GGUF files.  The layouts of blocks are those of ggml.


def q8_0(x):
    """Bytes of Q8_0, and what they mean: 32 int8 with a float16 scale."""
    blocks = x.astype("f4").reshape(-1, 32)
    scale = (np.abs(blocks).max(1) / 127).astype("f2")
    steps = np.round(blocks / scale[:, None].astype("f4")).astype("i1")
    pairs = zip(scale, steps, strict=True)
    data = b"".join(s.tobytes() + q.tobytes() for s, q in pairs)
    value = (scale[:, None].astype("f8") * steps).reshape(x.shape)
    return np.frombuffer(data, "u1").reshape(*x.shape[:-1], -1), value


def q4_1(x):
    """Bytes of Q4_1: 32 halves of bytes with a float16 scale and least value."""
    blocks = x.astype("f4").reshape(-1, 32)
    low = blocks.min(1).astype("f2")
    scale = ((blocks.max(1) - blocks.min(1)) / 15).astype("f2")
    steps = (blocks - low[:, None].astype("f4")) / scale[:, None].astype("f4")
    steps = np.clip(np.round(steps), 0, 15).astype("u1")
    packed = steps[:, :16] | steps[:, 16:] << 4  # the first half in the low bits
    data = b"".join(
        s.tobytes() + m.tobytes() + q.tobytes()
        for s, m, q in zip(scale, low, packed, strict=True)
    )
    value = scale[:, None].astype("f8") * steps + low[:, None].astype("f8")
    return np.frombuffer(data, "u1").reshape(*x.shape[:-1], -1), value.reshape(x.shape)


GGUF = {
    "model_type": "llama",
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "rope_theta": 50.0,
    "rms_norm_eps": 2.0**-13,
    "tie_word_embeddings": True,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name):
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, *rest, kind = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.{kind}"


def interleaved(rows, heads):
    """Rows ``j`` and ``j + d / 2`` of a head side by side."""
    width = len(rows) // heads
    order = [
        head * width + half * width // 2 + j
        for head in range(heads)
        for j in range(width // 2)
        for half in range(2)
    ]
    return rows[order]


def in_order(rows, heads):
    width = len(rows) // heads
    order = [
        head * width + 2 * j + half
        for head in range(heads)
        for half in range(2)
        for j in range(width // 2)
    ]
    return rows[order]


ENTRIES = {
    "block_count": 2,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "context_length": 16,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 2.0**-13,
    "rope.freq_base": 50.0,
    "rope.dimension_count": 8,
}


def write_gguf(
    path, tensors, kind="F32", *, arch="llama", entries=(), tokens=None, extra=()
):
    """A file as llama.cpp writes it; returns the tensors that it means."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in {**ENTRIES, **dict(entries)}.items():
        key = f"{arch}.{name}"
        if value is ...:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_int32(key, value)
    for name, value in (tokens or {}).items():
        key = f"tokenizer.ggml.{name}"
        (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)
    meant = {}
    types = gguf.GGMLQuantizationType
    for name, x in tensors.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        stored = interleaved(x, heads) if heads else x
        if x.ndim == 1 or kind == "F32":
            value = stored.astype("f4")
            writer.add_tensor(gguf_name(name), value)
        elif kind == "F16":
            value = stored.astype("f2")
            writer.add_tensor(gguf_name(name), value)
        else:
            data, value = {"Q8_0": q8_0, "Q4_1": q4_1}[kind](stored)
            writer.add_tensor(gguf_name(name), data, raw_dtype=types[kind])
        meant[name] = in_order(value, heads) if heads else value
    for name, x in dict(extra).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, oracle.random_tensors(GGUF))
    return path


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_gguf_file_gives_the_logits_of_its_tensors(tmp_path, kind):
    tensors = oracle.random_tensors(GGUF)
    meant = write_gguf(tmp_path / "tiny.gguf", tensors, kind)
    near = {"F32": 1e-7, "F16": 1e-3, "Q8_0": 0.01, "Q4_1": 0.1}[kind]
    for name, x in tensors.items():
        np.testing.assert_allclose(meant[name], x, atol=near * np.abs(x).max(), rtol=0)
    loaded = load_decoder(tmp_path / "tiny.gguf")
    assert loaded.name == "tiny.gguf"
    assert loaded.tokenizer is None
    check(loaded, GGUF, meant)


def test_a_gguf_file_with_a_head(tmp_path):
    given = GGUF | {"tie_word_embeddings": False}
    tensors = oracle.random_tensors(given)
    ones = {"rope_freqs.weight": np.ones(4, "f4")}
    meant = write_gguf(tmp_path / "a.gguf", tensors, "F16", extra=ones)
    check(load_decoder(tmp_path / "a.gguf"), given, meant)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "entries",
    [
        {"rope.dimension_count": ...},
        {"rope.dimension_count": ..., "attention.key_length": 8},
        {"rope.scaling.type": "none", "rope.scaling.factor": 2.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {"expert_count": 0, "vocab_size": 320},
    ],
)
def test_entries_of_gguf_that_say_the_same(tmp_path, entries):
    path = tmp_path / "a.gguf"
    write_gguf(path, oracle.random_tensors(GGUF), entries=entries)
    write_gguf(tmp_path / "b.gguf", oracle.random_tensors(GGUF))
    assert load_decoder(path).config == load_decoder(tmp_path / "b.gguf").config


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("entries", "slower", "total"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, [4.0] * 4),
        ({"rope.scaling.factor": 4.0}, [1, 1, 2, 3], [4.0, 4.0, 8.0, 12.0]),
        ({"rope.scale_linear": 2.0}, None, [2.0] * 4),
        ({}, [1, 1, 2, 8], [1.0, 1.0, 2.0, 8.0]),
    ],
)
def test_scaled_rotations_of_gguf(tmp_path, monkeypatch, entries, slower, total):
    """A factor of all, and those of Llama 3, which are a tensor of the file."""
    extra = {} if slower is None else {"rope_freqs.weight": np.array(slower, "f4")}
    tensors, path = oracle.random_tensors(GGUF), tmp_path / "a.gguf"
    meant = write_gguf(path, tensors, entries=entries, extra=extra)
    loaded = load_decoder(path)
    assert loaded.config.rotary_divisors == tuple(total)
    monkeypatch.setattr(oracle, "slowed", lambda *_: np.array(total))
    check(loaded, GGUF, meant)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"rope.scaling.type": "yarn"}, r"rotations scaled by 'yarn'"),
        ({"rope.scaling.factor": -4.0}, r"rotary_divisors must be 4 positive numbers"),
        ({"rope.scaling.factor": [4, 4]}, r"must be a number, got \[4, 4\]; fetch it"),
        ({"expert_count": 8}, r"has experts, which are not covered"),
        ({"attention.key_length": 16}, r"rotates a part of every head only"),
        ({"block_count": ...}, r"a.gguf: it has no entry 'llama.block_count'"),
        ({"embedding_length": ...}, r"has no entry 'llama.embedding_length'"),
        ({"attention.head_count": ...}, r"no entry 'llama.attention.head_count'"),
        ({"attention.head_count": 0}, r"kv_heads must|sizes must be whole"),
        ({"attention.head_count": [4, 4]}, r"sizes must be whole and positive"),
        ({"attention.head_count_kv": [2, 2]}, r"sizes must be whole and positive"),
        ({"embedding_length": -32}, r"sizes must be whole and positive"),
        ({"feed_forward_length": "64"}, r"sizes must be whole and positive"),
        ({"rope.dimension_count": "8"}, r"sizes must be whole and positive"),
        ({"block_count": 2.0}, r"sizes must be whole and positive"),
        ({"attention.layer_norm_rms_epsilon": "x"}, r"eps and rotary_base must be pos"),
        ({"rope.freq_base": -1.0}, r"eps and rotary_base must be positive"),
        ({"feed_forward_length": 32}, r"ffn_up.weight is \(64, 32\), wanted \(32, 32"),
        ({"block_count": 3}, r"misses the tensors blk.2.* and 5 more"),
        ({"block_count": 1}, r"does not have: blk.1.* and 5 more"),
    ],
)
def test_gguf_entries_that_do_not_fit(tmp_path, entries, match):
    write_gguf(tmp_path / "a.gguf", oracle.random_tensors(GGUF), entries=entries)
    refused(tmp_path / "a.gguf", match)


def test_gguf_tensors_that_do_not_fit(tmp_path):
    path, tensors = tmp_path / "a.gguf", oracle.random_tensors(GGUF)
    more = {"blk.0.attn_q.bias": np.ones(32, "f4")}
    write_gguf(path, tensors, extra=more)
    refused(path, r"that this kind of model does not have: blk.0.attn_q.bias")
    write_gguf(path, tensors, extra={"rope_freqs.weight": np.full(4, -2.0, "f4")})
    refused(path, r"rotary_divisors must be 4 positive numbers")
    for num in (1, 5):
        write_gguf(path, tensors, extra={"rope_freqs.weight": np.ones(num, "f4")})
        refused(path, rf"a.gguf: rope_freqs.weight is \({num},\), wanted \(4,\)")
    del tensors["model.embed_tokens.weight"]
    write_gguf(path, tensors)
    refused(path, r"a.gguf: it has no entry 'token_embd.weight'")


def test_another_architecture_of_gguf(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, oracle.random_tensors(GGUF), arch="qwen2")
    refused(path, r"architecture 'llama', it has 'qwen2'; use the safetensors")


@pytest.mark.parametrize("part", [0, 3, 20, 60, 200, 400, 0.02, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_gguf_file(file, part):
    whole = file.read_bytes()
    file.write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])
    refused(file, r"tiny.gguf is not a whole GGUF file .*; fetch it again")


def test_a_file_that_is_called_gguf(tmp_path):
    (tmp_path / "a.gguf").write_text("not one, though it is long enough for a header")
    refused(tmp_path / "a.gguf", r"a.gguf is not a whole GGUF file")
    refused(tmp_path / "b.gguf", r"there is no .*b.gguf", FileNotFoundError)


# Tokenizers.

SPECIAL, OF_USER = "<|end|>", "<tool_call>"
TEXTS = [
    "It was the best of times, it was the worst of times.",
    "In 1775 there were 12345 things\n\n  to say; isn't it? Ünïcödé — 東京 🙂",
    f"one{SPECIAL}two {OF_USER}three",
]


@cache
def byte_tokenizer(*, digits):
    """Byte-level pairs, trained here."""
    before = tokenizers.pre_tokenizers
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [before.Digits(individual_digits=True)] if digits else []
    steps.append(before.ByteLevel(add_prefix_space=False))
    found.pre_tokenizer = before.Sequence(steps)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=[SPECIAL],
        initial_alphabet=before.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(TEXTS[:2] * 3 + ["1775 12345 1234"] * 5, trainer)
    found.add_tokens([OF_USER])
    return found


def gguf_tokens(tokenizer, split):
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    names = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    kinds = {SPECIAL: 3, OF_USER: 4}
    return {
        "model": "gpt2",
        "pre": split,
        "tokens": names,
        "token_type": [kinds.get(name, 1) for name in names],
        "merges": [" ".join(pair) for pair in merges],
    }


@pytest.mark.slow_cases
@pytest.mark.parametrize("digits", [False, True])
def test_tokenizers_of_a_folder_and_of_gguf_are_the_same(tmp_path, digits):
    words = byte_tokenizer(digits=digits)
    tensors = oracle.random_tensors(GGUF)
    folder = write(tmp_path / "model", GGUF, tensors)
    words.save(str(folder / "tokenizer.json"))
    tokens = gguf_tokens(words, "smollm" if digits else "gpt-2")
    write_gguf(tmp_path / "a.gguf", tensors, tokens=tokens)
    of_folder = load_decoder(folder).tokenizer
    of_file = load_decoder(tmp_path / "a.gguf").tokenizer
    assert of_file.get_vocab() == of_folder.get_vocab() == words.get_vocab()
    for text in TEXTS:
        ids = words.encode(text).ids
        assert of_folder.encode(text).ids == ids
        assert of_file.encode(text).ids == ids
        for one in (of_folder, of_file):
            assert one.decode(ids, skip_special_tokens=False) == text
    left_out = TEXTS[2].replace(SPECIAL, "")
    assert of_file.decode(of_file.encode(TEXTS[2]).ids) == left_out
    ids = of_file.encode(TEXTS[2]).ids
    assert {of_file.token_to_id(SPECIAL), of_file.token_to_id(OF_USER)} <= set(ids)
    runs = len(of_file.encode("12345").ids)
    assert runs == 5 if digits else runs < 5
    for path in (folder, tmp_path / "a.gguf"):
        assert load_decoder(path, tokenizer=False).tokenizer is None


def test_a_tokenizer_neither_cuts_nor_fills_up(tmp_path):
    words = tokenizers.Tokenizer.from_str(byte_tokenizer(digits=False).to_str())
    words.enable_truncation(4)
    words.enable_padding(length=9)
    folder = write(tmp_path, GGUF, oracle.random_tensors(GGUF))
    words.save(str(folder / "tokenizer.json"))
    found = load_decoder(folder).tokenizer
    assert found.decode(found.encode(TEXTS[0]).ids) == TEXTS[0]
    assert len(found.encode("a").ids) == 1


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path):
    words = byte_tokenizer(digits=False)
    folder = write(tmp_path, oracle.LLAMA, oracle.random_tensors(oracle.LLAMA))
    words.save(str(folder / "tokenizer.json"))
    size = words.get_vocab_size()
    refused(folder, rf"tokenizer has {size} tokens, the model 13; they do not belong")
    assert load_decoder(folder, tokenizer=False).tokenizer is None
    gap = tokenizers.models.WordLevel({"a": 0, "b": 13}, "a")
    tokenizers.Tokenizer(gap).save(str(folder / "tokenizer.json"))
    refused(folder, r"tokenizer has 14 tokens, the model 13; they do not belong")


@pytest.mark.slow_cases
@pytest.mark.parametrize("text", ["", "{}", '{"version": "1.0", "model": {'])
def test_a_truncated_tokenizer(tmp_path, text):
    folder = write(tmp_path, oracle.LLAMA, oracle.random_tensors(oracle.LLAMA))
    (folder / "tokenizer.json").write_text(text)
    refused(folder, r"tokenizer.json is no tokenizer file \(")


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "llama"}, r"is of the kind 'llama', 'gpt-2', which is not covered"),
        ({"pre": "qwen2"}, r"'gpt2', 'qwen2', .*; read without: tokenizer=False"),
        ({"pre": ...}, r"'gpt2', None, which is not covered"),
        ({"merges": ...}, r"has no entry 'tokenizer.ggml.merges'; read without"),
        ({"token_type": ...}, r"has no entry 'tokenizer.ggml.token_type'"),
        ({"token_type": [1, 1, 1]}, r"tokenizer of .* does not fit together"),
        ({"merges": ["no pair"]}, r"tokenizer of .* does not fit together"),
        ({"merges": ["a b c"]}, r"tokenizer of .* does not fit together"),
    ],
)
def test_gguf_tokenizers_that_are_not_covered(tmp_path, change, match):
    tokens = gguf_tokens(byte_tokenizer(digits=False), "gpt-2") | change
    tokens = {name: x for name, x in tokens.items() if x is not ...}
    path = tmp_path / "a.gguf"
    write_gguf(path, oracle.random_tensors(GGUF), tokens=tokens)
    refused(path, match)
    assert load_decoder(path, tokenizer=False).tokenizer is None


def test_windows_are_pieces_of_the_texts():
    words = byte_tokenizer(digits=False)
    ids = [words.encode(text).ids for text in TEXTS]
    found = token_windows(words, iter(TEXTS), 5)
    assert found.dtype == np.int32
    wanted = [row[a : a + 5] for row in ids for a in range(0, len(row) - 4, 5)]
    assert found.tolist() == wanted
    first = token_windows(words, TEXTS, 6, start=7)
    assert first.tolist() == [[7, *row] for row in wanted]


def test_texts_that_fill_no_window():
    words = byte_tokenizer(digits=False)
    match = r"no text fills a window of 4 tokens, the longest of {} has {}; give more"
    for texts, num, longest in (([], 0, 0), ([""], 1, 0), (["", "a", "bc"], 3, 2)):
        with pytest.raises(ValueError, match=match.format(num, longest)):
            token_windows(words, texts, 4)
    with pytest.raises(ValueError, match=r"length must be at least 2, got 1"):
        token_windows(words, TEXTS, 1)
    with pytest.raises(TypeError, match=r"wanted several texts, got one; give \[text"):
        token_windows(words, TEXTS[0], 4)


# Without the extra.


@pytest.mark.parametrize("name", ["safetensors", "tokenizers", "gguf"])
def test_libraries_that_are_not_installed(tmp_path, monkeypatch, name):
    tensors = oracle.random_tensors(GGUF)
    path = write(tmp_path / "model", GGUF, tensors)
    byte_tokenizer(digits=False).save(str(path / "tokenizer.json"))
    if name == "gguf":
        path = tmp_path / "a.gguf"
        write_gguf(path, tensors)
    known = importlib.import_module

    def missing(wanted, *args):
        if wanted == name:
            raise ImportError(wanted)
        return known(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    refused(path, rf'{name} is not installed: pip install "toyfeat\[lm\]"', ImportError)
