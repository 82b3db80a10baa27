"""Small valid inputs of the formats that the library reads, and their readers."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat import dictionary, interop
from toyfeat.checkpoint import load_tree, newest_checkpoint, save_checkpoint, save_tree
from toyfeat.data.store import open_store, shard_taps, verify_store
from toyfeat.data.writing import store_writer
from toyfeat.models.decoder import load_decoder
from toyfeat.types import Taps
from toyfeat.worlds import load_synthetic_model

_GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
_FOLDER_PER_LAYER = ("gemma-scope", "gemma-scope-2")  # as circuit-tracer has them
_VOCAB, _DIM, _HEADS, _HIDDEN, _LAYERS = 24, 16, 4, 24, 2  # of the language model


def write_samples(folder: Path) -> None:
    """Write ``FORMAT/NAME`` folders of files, several for some formats."""
    for name, source, omitted in (
        ("sparsify", "sparsify", "run.npz"),
        ("dictionary_learning", "dictionary_learning", "run.npz"),
        ("world", "synthetic", "samples.npz"),
    ):
        ignored = shutil.ignore_patterns(omitted)
        shutil.copytree(_GOLDEN / source, folder / name, ignore=ignored)
    _copy_published(folder / "published")
    for path in folder.rglob("*"):  # golden files may be read-only
        path.chmod(0o755 if path.is_dir() else 0o644)
    _write_dictionaries(folder / "saelens")
    _write_language_model(folder / "decoder" / "llama")
    _write_gguf(folder / "gguf" / "llama")
    _write_store(folder / "store" / "taps")
    tree = _tree()
    save_tree(folder / "checkpoint" / "tree" / "tree.npz", tree)
    save_checkpoint(folder / "checkpoint" / "run", 3, tree, {"seed": 0}, keep=1)


def _copy_published(folder: Path) -> None:
    """Copy dictionaries of the formats that only ``load_dictionary`` reads."""
    for i, run in enumerate(sorted((_GOLDEN / "published").rglob("run.npz"))):
        if any(part in run.parts for part in ("saelens5", *_FOLDER_PER_LAYER)):
            continue
        ignored = shutil.ignore_patterns("run.npz")
        shutil.copytree(run.parent, folder / str(i), ignore=ignored)


def _write_dictionaries(folder: Path) -> None:
    """Write dictionaries as SAELens has them, and some with tensors of their own."""
    for sae in (
        dictionary.standard(4, 8),
        dictionary.topk(4, 8, k=2),
        dictionary.gated(4, 8),
        dictionary.jump_relu(4, 8),
        dictionary.paired(4, 8, k=2),
    ):
        params = sae.init(jax.random.key(0))
        interop.save_saelens(folder / sae.config.architecture, sae, params)


def _tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the tensors of a small Llama model, under the names of transformers."""
    square, wide, tall = (_DIM, _DIM), (_HIDDEN, _DIM), (_DIM, _HIDDEN)
    shapes = {"model.embed_tokens": (_VOCAB, _DIM), "model.norm": (_DIM,)}
    for i in range(_LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj": square for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj": wide for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": tall, f"{layer}.input_layernorm": (_DIM,)}
        shapes[f"{layer}.post_attention_layernorm"] = (_DIM,)
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _write_language_model(folder: Path) -> None:
    """Write a Llama model and its tokenizer as transformers does."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "vocab_size": _VOCAB,
        "num_hidden_layers": _LAYERS,
        "hidden_size": _DIM,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "intermediate_size": _HIDDEN,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file = importlib.import_module("safetensors.numpy").save_file
    save_file(_tensors(np.random.default_rng(0)), folder / "model.safetensors")
    tokenizers = importlib.import_module("tokenizers")
    vocabulary = {f"word{i}": i for i in range(_VOCAB)}
    model = tokenizers.models.WordLevel(vocabulary, "word0")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))


def _write_gguf(folder: Path) -> None:
    """Write the same model and a tokenizer of bytes as llama.cpp does."""
    folder.mkdir(parents=True)
    writer = importlib.import_module("gguf").GGUFWriter(folder / "model.gguf", "llama")
    for name, value in {
        "block_count": _LAYERS,
        "embedding_length": _DIM,
        "feed_forward_length": _HIDDEN,
        "context_length": 32,
        "attention.head_count": _HEADS,
        "rope.dimension_count": _DIM // _HEADS,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    # A tokenizer of a few bytes and one pair of them.
    names = [chr(ord("a") + i) for i in range(_VOCAB - 1)]
    for name, value in (("model", "gpt2"), ("pre", "gpt-2")):
        writer.add_string(f"tokenizer.ggml.{name}", value)
    writer.add_array("tokenizer.ggml.tokens", [*names, "ab"])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_array("tokenizer.ggml.token_type", [1] * _VOCAB)
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    for name, value in _tensors(np.random.default_rng(0)).items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_store(folder: Path) -> None:
    """Write a store of three shards, the last one short."""
    rng = np.random.default_rng(0)
    acts, grads = rng.standard_normal((10, 3)), rng.standard_normal((10, 1, 3))
    with store_writer(folder, dim=3, readouts=1, rows_per_shard=4) as writer:
        writer.append(Taps(acts, grads, np.ones(10)))  # pyright: ignore[reportArgumentType]


def _tree() -> dict[str, Any]:
    """Make a tree with every kind of leaf."""
    return {
        "w": jnp.arange(6.0).reshape(2, 3),
        "half": jnp.ones(3, jnp.bfloat16),
        "key": jax.random.key(0),
        "step": 3,
        "host": np.arange(4),
    }


def _read_store(folder: Path) -> None:
    """Open a store, read all of its rows and verify it."""
    store = open_store(folder)
    for index in range(len(store.shards)):
        jax.tree.map(np.sum, shard_taps(store, index))
    verify_store(folder)


def _read_checkpoint(folder: Path) -> None:
    """Load a file of arrays, or the newest checkpoint of a folder."""
    if (folder / "tree.npz").exists():
        load_tree(folder / "tree.npz", _tree())
    else:
        newest_checkpoint(folder, _tree())


def _layer(folder: Path) -> int | None:
    """Look up a layer that a folder has files of."""
    return next((layer for layer in (1, 5) if any(folder.glob(f"*_{layer}.*"))), None)


READERS: dict[str, Callable[[Path], object]] = {
    "saelens": interop.load_saelens,
    "sparsify": interop.load_sparsify,
    "dictionary_learning": interop.load_dictionary_learning,
    "published": lambda folder: interop.load_dictionary(folder, layer=_layer(folder)),
    "world": load_synthetic_model,
    "decoder": load_decoder,
    "gguf": lambda folder: load_decoder(folder / "model.gguf"),
    "store": _read_store,
    "checkpoint": _read_checkpoint,
}
