"""A Llama of transformers: forward, and forward + backward to all sites.

The sites are read by torch's hooks, or in a trace of nnsight (a process of its own:
it patches ``torch.Tensor`` when it is imported).  Answers one JSON line per order:
``make`` random weights of a size in a folder, ``version`` of nnsight or null, ``run``
a method (seconds), ``save`` the gradients that it returned.
"""

import importlib.metadata
import json
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

STATE = {}
NNSIGHT = Path(sys.prefix) / "nnsight"  # from setup.sh; dictionary_learning has another

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
    STATE["grads"] = {name: value.grad for name, value in seen.items()}
    return seen


def traced():
    """The same activations and gradients, in a trace of nnsight.

    What a layer returns is what the next one is given, and nnsight gives the gradient
    of a tensor once: each is read as ``resid_pre``, and the last as ``resid_post``.
    """
    if str(NNSIGHT) not in sys.path:
        sys.path.insert(0, str(NNSIGHT))
    import nnsight

    if "envoy" not in STATE:
        STATE["envoy"] = nnsight.NNsight(STATE["model"])
    model, tokens = STATE["envoy"], STATE["tokens"]
    with model.trace(input_ids=tokens, use_cache=False):
        seen, grads = nnsight.save({}), nnsight.save({})
        model.model.embed_tokens.output.requires_grad_(True)
        for i, layer in enumerate(model.model.layers):
            seen[f"{i}/resid_pre"] = layer.input
            seen[f"{i}/attn_out"] = layer.self_attn.output[0]
            seen[f"{i}/mlp_hidden"] = layer.mlp.down_proj.input
            seen[f"{i}/mlp_out"] = layer.mlp.output
        seen[f"{i}/resid_post"] = layer.output
        logits = model.output.logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            tokens[:, 1:].reshape(-1),
            reduction="sum",
        )
        with loss.backward():
            for name in reversed(seen):
                grads[name] = seen[name].grad
    for i in range(len(model.model.layers) - 1):
        seen[f"{i}/resid_post"] = seen[f"{i + 1}/resid_pre"]
        grads[f"{i}/resid_post"] = grads[f"{i + 1}/resid_pre"]
    STATE["grads"] = grads
    return seen


METHODS = {"forward": forward, "hooked": hooked, "nnsight": traced}


def version():
    """Version of the nnsight that is traced with, or None."""
    found = importlib.metadata.distributions(name="nnsight", path=[str(NNSIGHT)])
    return next((package.version for package in found), None)


def main():
    """Answer orders."""
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("what")
        answer = {}
        if what == "make":
            make(**order)
        elif what == "run":
            method = METHODS[order["method"]]
            start = time.perf_counter()
            method()
            answer["seconds"] = time.perf_counter() - start
        elif what == "version":
            answer["version"] = version()
        elif what == "save":
            names = order["sites"]
            grads = STATE["grads"]
            arrays = {name.replace("/", "."): grads[name].numpy() for name in names}
            np.savez(order["path"], **arrays)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
