"""A small job for ``soak.py``: a random model, random text, a store, dictionaries."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from launch_local import free_port
from safetensors.numpy import save_file

from toyfeat.data import open_store, verify_store
from toyfeat.interop import load_saelens
from toyfeat.models.decoder import Decoder, llama

CONFIG = llama(
    vocab=64, layers=2, dim=16, heads=2, kv_heads=2, hidden=24, context=32, tied=True
)
_SITE = "blocks_1/resid_post"
_STORE = "stores/blocks_1-resid_post"
_COMMANDS = "import sys; from toyfeat.cli.main import main\n"
_COMMANDS += "for step in ('collect', 'train'): main([step, sys.argv[1]])"
_LIMIT = 400.0  # seconds for processes to stop after a hit, or to end without one
_NAMES = {"query": "q", "key": "k", "value": "v", "out": "o"}


def write_model(folder: Path) -> None:
    """Write a random decoder with a tokenizer of words, and texts of these."""
    folder.mkdir(parents=True)
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), int))
    tree = jax.tree.map(np.asarray, params["params"])
    tensors = {
        "model.embed_tokens.weight": tree["embed"]["embedding"],
        "model.norm.weight": tree["final_norm"]["scale"],
    }
    for i in range(CONFIG.layers):
        block, base = tree[f"blocks_{i}"], f"model.layers.{i}"
        tensors[f"{base}.input_layernorm.weight"] = block["attn_norm"]["scale"]
        tensors[f"{base}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        weights = {f"self_attn.{_NAMES[n]}": block["attn"][n] for n in _NAMES}
        weights |= {f"mlp.{n}": block[n] for n in ("gate", "up", "down")}
        for name, layer in weights.items():
            tensors[f"{base}.{name}_proj.weight"] = layer["kernel"].T.copy()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": CONFIG.vocab,
        "num_hidden_layers": CONFIG.layers,
        "hidden_size": CONFIG.dim,
        "num_attention_heads": CONFIG.heads,
        "num_key_value_heads": CONFIG.kv_heads,
        "intermediate_size": CONFIG.hidden,
        "max_position_embeddings": CONFIG.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = [f"w{i}" for i in range(CONFIG.vocab - 1)]
    numbers = {word: i for i, word in enumerate([*words, "?"])}
    model = tokenizers.models.WordLevel(numbers, "?")  # pyright: ignore
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        text = " ".join(rng.choice(words, 8000))
        (folder / "texts" / f"{i}.txt").write_text(text)


def write_job(model: Path, out: Path, tokens: int, steps: int) -> Path:
    """Write the file of the job; returns it."""
    text = f"""
model = {json.dumps(str(model))}
text = {json.dumps(str(model / "texts"))}
out = {json.dumps(str(out))}
[collect]
sites = ["{_SITE}"]
readout = "sampled"
tokens = {tokens}
held_out = 64
length = 16
batch = 4
rows_per_shard = 1000
every = 3
[train]
kinds = ["acts", "gradients"]
ks = [2]
latents = 32
steps = {steps}
batch = 64
"""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".toml")
    path.write_text(text)
    return path


def is_finished(out: Path) -> bool:
    """Tell whether both dictionaries are saved."""
    return len(list((out / "train").glob("*/features/cfg.json"))) == 2


def difference(out: Path, wanted: Path) -> float:
    """Verify a store and compare it and the dictionaries with those of another run.

    Returns:
      The largest difference of parameters.

    Raises:
      ValueError: if shards differ.
    """
    verify_store(out / _STORE)
    stores = [open_store(folder / _STORE) for folder in (out, wanted)]
    if stores[0].shards != stores[1].shards:
        raise ValueError(f"{out / _STORE} has other shards than {wanted / _STORE}")
    largest = 0.0
    for features in (wanted / "train").glob("*/features"):
        _, params = load_saelens(out / features.relative_to(wanted))
        for name, value in load_saelens(features)[1].items():
            largest = max(largest, float(jnp.max(jnp.abs(params[name] - value))))
    return largest


def run(
    job: Path, moment: float | None = None, victims: Sequence[int] = ()
) -> tuple[float, bool]:
    """Start two processes, hit them at a moment, and wait for their ends.

    Returns:
      Seconds from the hit, or from the start, to the end, and whether they were hit.
    """
    address, log = f"127.0.0.1:{free_port()}", job.with_suffix(".log").open("ab")
    env = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "TOYFEAT_CACHE": str(job.parent)}
    command = [sys.executable, "-c", _COMMANDS, str(job)]
    children = [
        subprocess.Popen(
            command, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=log, stderr=log
        )
        for i in range(2)
    ]
    began, hit = time.monotonic(), False
    while any(child.poll() is None for child in children):
        time.sleep(0.05)
        if moment is not None and time.monotonic() - began > moment:
            kind = signal.SIGTERM if len(victims) > 1 else signal.SIGKILL
            alive = [children[i] for i in victims if children[i].poll() is None]
            for child in alive:
                child.send_signal(kind)
            began, hit = time.monotonic(), bool(alive)
            moment = None
        if time.monotonic() - began > _LIMIT:
            for child in children:
                child.kill()
            sys.exit(f"soak: processes did not end within {_LIMIT} s; {log.name}")
    log.close()
    if not hit and any(child.returncode for child in children):
        sys.exit(f"soak: a run that was not hit failed:\n{Path(log.name).read_text()}")
    return time.monotonic() - began, hit
