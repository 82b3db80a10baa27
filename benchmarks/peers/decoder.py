"""A Llama of transformers with hooks: forward, and forward + backward to all sites.

Answers one JSON line per order: ``make`` random weights of a size in a folder, ``run``
a method (seconds), ``save`` what the hooks saw.
"""

import json
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

STATE = {}

# As in the process that this is compared with; its package is not installed here.
MEMORY = Path(__file__).parents[2] / "toyfeat" / "jobs" / "memory.py"
runpy.run_path(str(MEMORY))["keep_memory"]()


def make(folder, tokens, layers, dim, heads, kv_heads, hidden, vocab):
    """Random weights, saved; tokens for both."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, safe_serialization=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    STATE.update(model=model, tokens=torch.from_numpy(np.load(tokens)).long())


def forward():
    """No gradients, no hooks."""
    with torch.no_grad():
        STATE["model"](STATE["tokens"], use_cache=False).logits.sum().item()


def hooked():
    """Activations and gradients of the summed cross-entropy at five sites a layer."""
    model, tokens, seen = STATE["model"], STATE["tokens"], {}

    def keep(name, value):
        value.retain_grad()
        seen[name] = value

    hooks = []
    for i, layer in enumerate(model.model.layers):

        def before(module, args, i=i):
            keep(f"{i}/resid_pre", args[0])

        def attended(module, args, out, i=i):
            keep(f"{i}/attn_out", out[0])

        def inside(module, args, i=i):
            keep(f"{i}/mlp_hidden", args[0])

        def mixed(module, args, out, i=i):
            keep(f"{i}/mlp_out", out)

        def after(module, args, out, i=i):
            keep(f"{i}/resid_post", out[0] if isinstance(out, tuple) else out)

        hooks += [
            layer.register_forward_pre_hook(before),
            layer.self_attn.register_forward_hook(attended),
            layer.mlp.down_proj.register_forward_pre_hook(inside),
            layer.mlp.register_forward_hook(mixed),
            layer.register_forward_hook(after),
        ]
    embedded = model.model.embed_tokens(tokens).requires_grad_(True)
    logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="sum"
    )
    loss.backward()
    for hook in hooks:
        hook.remove()
    STATE["seen"] = seen
    return seen


def main():
    """Answer orders."""
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("what")
        answer = {}
        if what == "make":
            make(**order)
        elif what == "run":
            method = {"forward": forward, "hooked": hooked}[order["method"]]
            start = time.perf_counter()
            method()
            answer["seconds"] = time.perf_counter() - start
        elif what == "save":
            names = order["sites"]
            seen = STATE["seen"]
            arrays = {name.replace("/", "."): seen[name].grad.numpy() for name in names}
            np.savez(order["path"], **arrays)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
