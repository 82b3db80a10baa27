import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.models.decoder import Decoder, llama

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))  # for tiny_collection

CONFIG = llama(
    vocab=48, layers=3, dim=16, heads=4, kv_heads=2, hidden=24, context=64, tied=True
)
WORDS = [f"w{i}" for i in range(47)] + ["?"]


def tensors(params):
    """Named and laid out as transformers does."""
    tree = jax.tree.map(np.asarray, params["params"])
    found = {
        "model.embed_tokens.weight": tree["embed"]["embedding"],
        "model.norm.weight": tree["final_norm"]["scale"],
    }
    for i in range(CONFIG.layers):
        block, base = tree[f"blocks_{i}"], f"model.layers.{i}"
        found[f"{base}.input_layernorm.weight"] = block["attn_norm"]["scale"]
        found[f"{base}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        for ours, theirs in zip(("query", "key", "value", "out"), "qkvo", strict=True):
            kernel = block["attn"][ours]["kernel"]
            found[f"{base}.self_attn.{theirs}_proj.weight"] = kernel.T.copy()
        for name in ("gate", "up", "down"):
            found[f"{base}.mlp.{name}_proj.weight"] = block[name]["kernel"].T.copy()
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small language model with a tokenizer, and texts for it."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model")
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), int))
    params = jax.tree.map(lambda x: 1.5 * x, params)
    safetensors.save_file(tensors(params), path / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": 48,
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(path / "tokenizer.json"))
    texts = path / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        some = rng.choice(WORDS[:47], 200)
        (texts / f"{i}.txt").write_text(" ".join(some))
    return path
