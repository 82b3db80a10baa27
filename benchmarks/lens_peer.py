"""The reference estimator of the Jacobian lens in torch, written from its definition.

Answers one JSON line per order: ``make`` random weights of a size in a folder, ``load``
weights of one, ``run`` a prompt (seconds), ``save`` the Jacobians of the last prompt.
A prompt is repeated ``batch`` times, and each copy is given another cotangent.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

STATE: dict[str, Any] = {}


def make(folder: str, **size: int) -> None:
    """Save random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["dim"],
        intermediate_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)


def load(folder: str) -> None:
    """Load weights in float32, in evaluation mode, of a folder or a ``.gguf`` file."""
    path, options = Path(folder), {}
    if path.suffix == ".gguf":
        path, options = path.parent, {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    STATE["model"] = model


def jacobians(
    tokens: list[int],
    batch: int,
    skip_first: int,
    skip_last: int,
    rows: int | None = None,
) -> Any:
    """Mean Jacobian ``[layers - 1, D, D]`` of one prompt, out times in.

    Only its first ``rows`` rows, if they are given.
    """
    model = STATE["model"]
    streams: list[Any] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        streams.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    copies = torch.tensor(tokens)[None].repeat(batch, 1)
    embedded = model.model.embed_tokens(copies).requires_grad_(True)
    model.model(inputs_embeds=embedded, use_cache=False)
    for hook in hooks:
        hook.remove()
    *sources, final = streams
    valid = slice(skip_first, len(tokens) - skip_last)
    dim = final.shape[-1]
    most = dim if rows is None else rows
    result = torch.zeros(len(sources), most, dim)
    for start in range(0, most, batch):
        num = min(batch, most - start)
        # Copy j has cotangent e_(start + j) at all valid positions at once.
        cotangent = torch.zeros_like(final)
        index = torch.arange(num)
        cotangent[index, valid, start + index] = 1.0
        grads = torch.autograd.grad(final, sources, cotangent, retain_graph=True)
        for layer, grad in enumerate(grads):
            result[layer, start : start + num] = grad[:num, valid].mean(dim=1)
    return result


def main() -> None:
    """Answer orders."""
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("what")
        answer: dict[str, Any] = {}
        if what == "make":
            make(**order)
        elif what == "load":
            load(**order)
        elif what == "run":
            start = time.perf_counter()
            STATE["jacobians"] = jacobians(**order)
            answer["seconds"] = time.perf_counter() - start
        elif what == "save":
            np.save(Path(order["path"]), STATE["jacobians"].numpy())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
