"""Files that say what is not so: counts, sizes, types and offsets."""

import json
import shutil
import struct

import decoder_oracle as oracle
import ml_dtypes
import numpy as np
import pytest

from toyfeat.models.decoder import (
    load_decoder,
    stack_blocks,
    token_windows,
    unstack_blocks,
)

safetensors = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

WORDS = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))


def refused(path, match, kind=ValueError, **options):
    with pytest.raises(kind, match=match) as caught:
        load_decoder(path, **options)
    assert type(caught.value) is kind
    assert str(caught.value).startswith("load_decoder: ")
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 2000


# Folders.

LLAMA3 = oracle.CONFIGS["llama3"]["rope_parameters"]
NO_SIZES = [-1, 2**31, 10**400, 1e30, "12", None, [13], {}, True]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "model"
    folder.mkdir()
    tensors = oracle.random_tensors(oracle.LLAMA)
    safetensors.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(oracle.LLAMA))
    return folder


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def with_config(folder, **entries):
    (folder / "config.json").write_text(json.dumps(oracle.LLAMA | entries))
    return folder


@pytest.mark.parametrize(
    "content",
    [b"\xff{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"", b"[{}]", b"nul"],
    ids=["bytes", "deep", "long", "empty", "list", "cut"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_broken(folder, name, content):
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    refused(folder, rf"{name} must be a JSON object in UTF-8, got .*; fetch or save it")


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 2**31 - 1},
        {"vocab_size": 2**31 - 1},
        {"intermediate_size": 10**9},
        {"head_dim": 2**30, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "head_dim": 2**30,
            "rope_parameters": oracle.CONFIGS["llama3"]["rope_parameters"],
        },
    ],
)
def test_sizes_are_compared_with_the_tensors_first(folder, entries):
    refused(
        with_config(folder, **entries),
        r"(misses the tensors|has tensors of other shapes:) .*belong together\?",
    )


@pytest.mark.parametrize(
    "value", [-1, 2**31, 10**400, 1e30, "12", None, [13], {}, True]
)
def test_sizes_that_are_none_are_named_with_their_file(folder, value):
    for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
        refused(with_config(folder, **{name: value}), r"config.json: .*, got .*; give")


@pytest.mark.parametrize("value", [10**400, 1e39, -1.0, "1", float("nan"), None])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_scales_that_float32_does_not_have(folder, name, value):
    refused(with_config(folder, **{name: value}), r"config.json: .*must be positive")


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        ({"rope_type": "linear", "factor": 10**400}, r"want positive numbers, got"),
        ({"rope_type": "linear"}, r"has no entry 'factor'"),
        ({"rope_type": ["linear"]}, r"of type \['linear'\] are not covered"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5 is not cov"),
        ([1], r"rope_scaling must be entries, got \[1\]"),
    ],
)
def test_rotations_are_named_with_their_file(folder, rope, match):
    refused(with_config(folder, rope_scaling=rope), rf"config.json: .*{match}")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd"])
def test_shards_of_other_folders(folder, shard):
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"names of files must lie inside of .*, got '")


@pytest.mark.slow_cases
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, value):
    tensors = oracle.random_tensors(oracle.LLAMA)
    tensors["model.norm.weight"][3] = value
    safetensors.save_file(tensors, folder / "model.safetensors")
    refused(folder, r"must store finite numbers in norm.weight, got nan or inf")


def test_weights_beyond_a_dtype(folder):
    tensors = oracle.random_tensors(oracle.LLAMA)
    tensors["model.norm.weight"][3] = -7e4
    safetensors.save_file(tensors, folder / "model.safetensors")
    refused(folder, r"in norm.weight than the 65504 of float16; give", dtype=np.float16)


@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_parameters_of_another_dtype(folder, dtype):
    with pytest.raises(ValueError, match=r"^load_decoder: dtype must be a floating-po"):
        load_decoder(folder, dtype=dtype)


@pytest.mark.parametrize("path", [3, None, ["model"]])
def test_a_path_of_another_type(path):
    with pytest.raises(TypeError, match=r"^load_decoder: path must be a str or a Path"):
        load_decoder(path)


@pytest.mark.parametrize(
    ("length", "start", "match"),
    [
        ("3", None, r"length must be at least 2, got '3'; give"),
        (2.5, None, r"length must be at least 2, got 2.5; give"),
        (2, -1, r"start must be the id of a token, got -1; give"),
        (2, 99, r"start must be the id of a token, got 99; give"),
        (2, "a", r"start must be the id of a token, got 'a'; give"),
    ],
)
def test_windows_that_cannot_be(length, start, match):
    with pytest.raises(ValueError, match=rf"^token_windows: {match}"):
        token_windows(WORDS, ["a b"], length, start=start)


@pytest.mark.parametrize("change", [stack_blocks, unstack_blocks])
@pytest.mark.parametrize("params", [{"blocks_0": {}}, None, [1]])
def test_variables_without_parameters(change, params):
    match = rf"^{change.__name__}: wanted variables with 'params', got .*; give"
    with pytest.raises(ValueError, match=match):
        change(params)


def test_messages_of_libraries_are_shortened(folder):
    (folder / "tokenizer.json").write_text(json.dumps({"a" * 9000: 0}))
    refused(folder, r"tokenizer.json is no tokenizer file")
    head = json.dumps({"x": {"dtype": "a" * 9000}}).encode()
    content = struct.pack("<Q", len(head)) + head
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model.safetensors is not a whole safetensors file")


def test_a_tensor_that_is_there_twice(folder):
    tensors = oracle.random_tensors(oracle.LLAMA)
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    safetensors.save_file(tensors, folder / "model.safetensors")
    refused(folder, r"has the tensor norm.weight twice, also as model.norm.weight")
    (folder / "model.safetensors").unlink()
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        safetensors.save_file(tensors, folder / name)
    index = {"weight_map": {"x": names[0], "y": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"has the tensor .* in b.safetensors and in another shard")


# Numbers of other types.

TYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16"}


def write_tensors(path, tensors, names=TYPES):
    """As the format has it: a length, a header, the numbers."""
    header, blobs, offset = {}, [], 0
    for name, x in tensors.items():
        blobs.append(x.tobytes())
        ends = [offset, offset + x.nbytes]
        kind = names[str(x.dtype)]
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": ends}
        offset += x.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", TYPES)
def test_short_floats_are_read_exactly(folder, dtype):
    tensors = oracle.random_tensors(oracle.LLAMA)
    tensors = {n: x.astype(getattr(ml_dtypes, dtype)) for n, x in tensors.items()}
    write_tensors(folder / "model.safetensors", tensors)
    params = load_decoder(folder).params["params"]
    expected = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)
    expected = tensors["model.layers.2.mlp.up_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["blocks_2"]["up"]["kernel"], expected.T)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["F4", "F6_E2M3"])
def test_types_that_numpy_does_not_have(folder, kind):
    bits = {"F4": 4, "F6_E2M3": 6}[kind]
    tensors = oracle.random_tensors(oracle.LLAMA)
    header, offset = {}, 0
    for name, x in tensors.items():
        ends = [offset, offset + x.size * bits // 8]
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(offset)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, rf"model.safetensors stores .* as {kind}, which cannot be read; ")


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, bool])
def test_integers_are_no_weights(folder, dtype):
    tensors = oracle.random_tensors(oracle.LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(dtype)
    safetensors.save_file(tensors, folder / "model.safetensors")
    refused(folder, r"must store layers.1.mlp.up_proj.weight in floating point, got ")


# GGUF files, as the format has them.


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def u32(value):
    return struct.pack("<I", value)


SIZES = {
    "block_count": 1,
    "attention.head_count": 2,
    "embedding_length": 4,
    "feed_forward_length": 4,
    "context_length": 4,
}
EMBEDDING = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)


def gguf_bytes(*, entries=(), tensors=(EMBEDDING,), counts=None, **sizes):
    """A header with the least that a Llama model needs, and some bytes of tensors."""
    fields = [entry("general.architecture", 8, text("llama"))]
    fields += [entry(f"llama.{k}", 4, u32(v)) for k, v in (SIZES | sizes).items()]
    eps = struct.pack("<f", 1e-5)
    fields += [entry("llama.attention.layer_norm_rms_epsilon", 6, eps), *entries]
    counts = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + 64)  # padding, and four rows of four floats


def array(kind, num, values=b""):
    return struct.pack("<IQ", kind, num) + values


def tensor(name, shape, kind=0, offset=0):
    rank = len(shape)
    return text(name) + struct.pack(f"<I{rank}QIQ", rank, *shape, kind, offset)


HUGE = 2**40
DAMAGED = {
    "numbers of an array": (
        {"entries": [entry("a", 9, array(0, HUGE))]},
        r"entry b'a' has 1099511627776 values, which is more than there are bytes",
    ),
    "numbers of the last array": (
        {"entries": [entry("a", 9, array(0, 2**63))]},
        r"more than there are bytes",
    ),
    "texts of an array": ({"entries": [entry("a", 9, array(8, HUGE))]}, ""),
    "arrays of an array": (
        {"entries": [entry("a", 9, array(9, HUGE))]},
        r"entry b'a' is of the unknown type 9",
    ),
    "length of a text": (
        {"entries": [entry("a", 8, struct.pack("<Q", HUGE))]},
        r"ends inside a text of 1099511627776 bytes",
    ),
    "type of an entry": ({"entries": [entry("a", 77, b"")]}, r"unknown type 77"),
    "entries": ({"counts": (1, 2**60)}, ""),
    "tensors": ({"counts": (2**60, 7)}, ""),
    "twice the same entry": (
        {"entries": [entry("a", 4, u32(1))] * 2},
        r"b'a' occurs tw",
    ),
    "bytes that are no text": (
        {"entries": [entry("a", 8, text(b"\xff\xfe"))]},
        r"can't decode byte 0xff",
    ),
    "alignment": ({"entries": [entry("general.alignment", 4, u32(0))]}, r"alignment"),
    "twice the same tensor": (
        {"tensors": [EMBEDDING] * 2},
        r"token_embd.* occurs twice",
    ),
    "dimensions": (
        {"tensors": [text("a") + struct.pack("<I", 2**31)]},
        r"'a' has 2147483648 dimensions",
    ),
    "size of a tensor": (
        {"tensors": [EMBEDDING, tensor("a", [HUGE], 0, 64)]},
        r"tensor 'a' ends at byte",
    ),
    "size that overflows": (
        {"tensors": [EMBEDDING, tensor("a", [2**33, 2**31], 0, 64)]},
        r"tensor 'a' ends at byte",
    ),
    "type of a tensor": (
        {"tensors": [EMBEDDING, tensor("a", [4], 99)]},
        r"a tensor is of the type 99, unknown to the gguf library",
    ),
    "offset beyond the end": (
        {"tensors": [EMBEDDING, tensor("a", [4], 0, HUGE)]},
        r"tensor 'a' must begin at 64, .* got 1099511627776",
    ),
    "offset in another tensor": (
        {"tensors": [EMBEDDING, tensor("a", [4], 0, 32)]},
        r"tensor 'a' must begin at 64, behind the one before, got 32",
    ),
    "another type of the last tensor": (
        {"tensors": [tensor("token_embd.weight", [4, 4], 1)]},
        r"last 32 bytes belong to no tensor",
    ),
    "rows that are no blocks": (
        {"tensors": [EMBEDDING, tensor("a", [33, 2], 8, 64)]},
        r"rows of its tensor 'a' must be blocks of 32",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_header_that_the_file_does_not_bear_out(tmp_path, name):
    options, match = DAMAGED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(**options))
    refused(path, rf"m.gguf is not a whole GGUF file \(.*{match}.*\); fetch it again")


@pytest.mark.parametrize(
    ("version", "match"),
    [
        (1, "version 1, known"),
        (0, "not a whole"),
        (4, "known"),
        (3 << 24, "high byte first"),
    ],
)
def test_other_versions_of_gguf(tmp_path, version, match):
    path = tmp_path / "m.gguf"
    content = gguf_bytes()
    path.write_bytes(content[:4] + u32(version) + content[8:])
    refused(path, match)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"block_count": 1 + 2**26}, r"misses the tensors .*belong together"),
        ({"block_count": 2**31}, r"m.gguf: decoder: sizes must be whole"),
        ({"block_count": 0}, r"m.gguf: decoder: sizes must be whole"),
        ({"feed_forward_length": 2**30}, r"misses the tensors"),
        ({"rope.dimension_count": 2**30}, r"misses the tensors"),
        ({"embedding_length": 2**30}, r"misses the tensors"),
        ({"attention.head_count": 0}, r"m.gguf: llama: heads must divide dim, got 0"),
        ({"attention.head_count": 3}, r"m.gguf: llama: heads must divide dim, got 3"),
    ],
)
def test_sizes_of_gguf_that_the_tensors_do_not_bear_out(tmp_path, sizes, match):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(**sizes))
    refused(path, match)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("attention.head_count_kv", array(4, 2, u32(2) * 2), r"'kv_heads': \[2, 2\]"),
        (
            "attention.head_count_kv",
            array(4, 900, u32(2) * 900),
            r"\[2, 2, 2, .*\.\.\.",
        ),
        ("rope.dimension_count", array(4, 1, u32(2)), r"'head_dim': \[2\]"),
        ("rope.freq_base", array(4, 1, u32(2)), r"must be positive, got"),
        ("expert_count", array(4, 1, u32(2)), r"it has experts"),
    ],
)
def test_arrays_in_the_place_of_numbers(tmp_path, name, value, match):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(entries=[entry(f"llama.{name}", 9, value)]))
    refused(path, rf"m.gguf: .*{match}")


def test_an_entry_that_may_change_what_is_computed(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(**{"rope.fraq_base": 5}))
    refused(path, r"its entry 'llama.rope.fraq_base' is not known here, and may change")


def test_an_embedding_without_sizes(tmp_path):
    path = tmp_path / "m.gguf"
    tensors = tensor("token_embd.weight", []), tensor("a", [8], 0, 32)
    path.write_bytes(gguf_bytes(tensors=tensors))
    refused(path, r"m.gguf: decoder: sizes must be whole .*'vocab': 0")


# Tokenizers whose library panics.

PANICS = {  # the first when it is read
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("part", PANICS)
def test_a_tokenizer_that_panics_when_it_is_read(folder, part):
    settings = json.loads(WORDS.to_str()) | {part: PANICS[part]}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    refused(folder, r"tokenizer.json is no tokenizer file \(.*; .*tokenizer=False")


def test_a_tokenizer_that_panics_when_it_is_used():
    settings = json.loads(WORDS.to_str())
    settings |= {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    words = tokenizers.Tokenizer.from_str(json.dumps(settings))
    match = r"token_windows: the tokenizer cannot encode text 1 \(chunk size must be"
    with pytest.raises(ValueError, match=match):
        token_windows(words, ["", "a b"], 2)
