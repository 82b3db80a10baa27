"""Decoders of every family by transformers: random weights, logits, sites, gradients.

``python decoder_families.py FOLDER [--small]`` writes for every family the folder that
transformers saves and a ``.npz`` of what the model computes, and prints one JSON line.
Everything is float32 with attention written out (``eager``), which alone has soft caps;
logits in bfloat16 stand beside them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers as tr

LENGTHS = (16, 256, 1024)
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}


def cases(small):
    """Make configurations by name: those of the gate, or tiny ones of golden files."""
    sizes = sizes_of(small)
    return old_families(sizes) | llamas(sizes, small) | windowed(sizes, small)


def sizes_of(small):
    """Choose the sizes that the families share, in the words of most of them."""
    return {
        "vocab_size": 19 if small else 97,
        "hidden_size": 16 if small else 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24 if small else 128,
        "num_hidden_layers": 3 if small else 6,
        "max_position_embeddings": 32 if small else 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def old_families(sizes):
    """Configure the two families with learned positions or parallel blocks."""
    gpt2 = {"vocab_size": sizes["vocab_size"], "n_embd": sizes["hidden_size"]}
    gpt2 |= {"n_layer": sizes["num_hidden_layers"], "n_head": 4}
    gpt2 |= {"n_positions": sizes["max_position_embeddings"]}
    neox = {k: v for k, v in sizes.items() if k != "num_key_value_heads"}
    return {
        "gpt2": tr.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0),
        "gpt_neox": tr.GPTNeoXConfig(**neox),
    }


def llamas(sizes, small):
    """Configure Llama, with rotations that grow with the text, too."""
    grown = {**sizes, "max_position_embeddings": 8 if small else 512}
    return {
        "llama": tr.LlamaConfig(**sizes),
        "llama, yarn": tr.LlamaConfig(**grown, rope_parameters=YARN),
        "llama, dynamic": tr.LlamaConfig(**grown, rope_parameters=DYNAMIC),
    }


def windowed(sizes, small):
    """Configure families with windows, heads of a width of their own, or norms more."""
    window = {"sliding_window": 4 if small else 64}
    wide = {**sizes, "head_dim": 8 if small else 32}
    upper = {**window, "use_sliding_window": True, "max_window_layers": 1}
    gemma = {**wide, **window, "query_pre_attn_scalar": 12}
    mixed = ["sliding_attention", "full_attention"] * 3
    scaled = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    }
    return {
        "mistral": tr.MistralConfig(**wide, **window),
        "qwen2": tr.Qwen2Config(**sizes, **upper),
        "qwen3": tr.Qwen3Config(**wide),
        "gemma2": tr.Gemma2Config(
            **gemma, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
        ),
        "gemma3_text": tr.Gemma3TextConfig(
            **gemma,
            layer_types=mixed[: sizes["num_hidden_layers"]],
            rope_parameters=scaled,
        ),
        "olmo2": tr.Olmo2Config(**sizes),
        "phi3": tr.Phi3Config(**sizes, **window, partial_rotary_factor=0.5),
    }


def make(config, seed=0):
    """Build a model whose weights are of the size of trained ones."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = tr.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                fan = parameter.shape[0] if "c_" in name else parameter.shape[1]
                parameter.copy_(torch.randn_like(parameter) * fan**-0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def blocks_of(model):
    """Return the blocks, the part of each that reads the middle, and the last norm."""
    inner = model.base_model
    blocks = inner.h if hasattr(inner, "h") else inner.layers
    for name in ("ln_f", "final_layer_norm", "norm"):
        if hasattr(inner, name):
            return blocks, getattr(inner, name)
    raise ValueError("no last norm")


def middle_of(kind, block):
    """Return the module that reads the stream between attention and MLP."""
    if kind == "gpt2":
        return block.ln_2
    if kind.startswith("gemma"):
        return block.pre_feedforward_layernorm
    return block.mlp if kind == "olmo2" else block.post_attention_layernorm


def run(model, tokens):
    """Compute logits, the stream at every site, its gradients, and the patterns."""
    kind, kept = model.config.model_type, {}
    blocks, last = blocks_of(model)

    def keep(name):
        def hook(module, args, kwargs):
            value = args[0] if args else kwargs["hidden_states"]
            value.retain_grad()
            kept[name] = value

        return hook

    hooks = []
    for i, block in enumerate(blocks):
        before = {"with_kwargs": True}
        hooks += [block.register_forward_pre_hook(keep(f"{i}.resid_pre"), **before)]
        if kind != "gpt_neox":  # there the parts read the same stream
            middle = middle_of(kind, block)
            hooks += [
                middle.register_forward_pre_hook(keep(f"{i}.resid_mid"), **before)
            ]
    final = f"{len(blocks) - 1}.resid_post"
    hooks += [last.register_forward_pre_hook(keep(final), with_kwargs=True)]
    out = model(tokens, use_cache=False, output_attentions=True)
    vocab = out.logits.shape[-1]
    torch.nn.functional.cross_entropy(
        out.logits[:, :-1].reshape(-1, vocab),
        tokens[:, 1:].reshape(-1),
        reduction="sum",
    ).backward()
    for hook in hooks:
        hook.remove()
    arrays = {"tokens": tokens, "logits": out.logits}
    for name, value in kept.items():
        arrays[f"{name}.acts"], arrays[f"{name}.grads"] = value, value.grad
    for i, pattern in enumerate(out.attentions):
        arrays[f"{i}.pattern"] = pattern
    return {name: value.detach().numpy() for name, value in arrays.items()}


def main():
    """Write the folders and the arrays of all families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    lengths = (12,) if args.small else LENGTHS
    for name, config in cases(args.small).items():
        folder = args.folder / name.replace(", ", "-")
        model = make(config)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        for length in lengths:
            generator = torch.Generator().manual_seed(length)
            shape = (2 if args.small else 1, length)
            tokens = torch.randint(config.vocab_size, shape, generator=generator)
            arrays = run(model, tokens)
            if not args.small:
                with torch.no_grad():
                    half = make(config).bfloat16()(tokens, use_cache=False).logits
                arrays["logits_bfloat16"] = half.float().numpy()
            else:  # patterns of one layer are enough, and keep the files small
                arrays = {
                    k: v for k, v in arrays.items() if k[2:] != "pattern" or k[0] == "1"
                }
            path = folder / "expected.npz" if args.small else folder / f"{length}.npz"
            np.savez_compressed(path, **arrays)
    versions = {"transformers": tr.__version__, "torch": torch.__version__}
    print(json.dumps({"lengths": lengths, "versions": versions}))


if __name__ == "__main__":
    main()
