"""Ten things that people do with TransformerLens and SAELens, on small random models.

``python transformerlens.py FOLDER`` writes for GPT-2 and Llama shapes the folder that
transformers saves, loads it into a ``HookedTransformer`` without processing, and writes
what that computes to ``.npz``; it writes a dictionary with SAELens, and prints one JSON
line.  float32.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers as tr
from sae_lens import StandardSAE, StandardSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_gpt2_weights,
    convert_llama_weights,
)

LAYERS, WIDTH, HEADS, HIDDEN, VOCAB, LENGTH, LATENTS = 3, 32, 4, 128, 61, 16, 48
SITE = "blocks.1.hook_resid_post"
SHARED = {
    "d_model": WIDTH,
    "d_head": WIDTH // HEADS,
    "n_heads": HEADS,
    "d_mlp": HIDDEN,
    "n_layers": LAYERS,
    "n_ctx": 64,
    "d_vocab": VOCAB,
}
BLOCK = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "mlp.hook_post",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_pattern",
)


def models():
    """Yield names of models, configurations in both libraries, and the conversion."""
    tokens = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    yield "gpt2", *gpt2(tokens), convert_gpt2_weights
    yield "llama", *llama(tokens), convert_llama_weights


def gpt2(tokens):
    """Configure GPT-2 for transformers and for TransformerLens."""
    config = tr.GPT2Config(
        **tokens, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64
    )
    return config, HookedTransformerConfig(
        **SHARED, act_fn="gelu_new", normalization_type="LN", eps=1e-5
    )


def llama(tokens):
    """Configure Llama for transformers and for TransformerLens."""
    config = tr.LlamaConfig(
        **tokens,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=HIDDEN,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    return config, HookedTransformerConfig(
        **SHARED,
        act_fn="silu",
        normalization_type="RMS",
        eps=1e-5,
        positional_embedding_type="rotary",
        rotary_dim=WIDTH // HEADS,
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        n_key_value_heads=2,
    )


def make(config):
    """Build a model whose weights are of the size of trained ones."""
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.ndim == 1 else max(parameter.shape) ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def hooked(config, model, convert):
    """Load the weights into a HookedTransformer, without processing."""
    lens = HookedTransformer(config)
    state = convert(model, config)
    lens.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return lens.eval()


def run(lens, tokens, vector):
    """Do the jobs of a model; returns arrays by name, and activations at the site."""
    logits, cache = lens.run_with_cache(tokens)
    out = {"tokens": tokens, "vector": vector, "logits": logits}
    out |= {
        f"cache {name}": cache[name]
        for name in cache
        if name.split(".", 2)[-1] in BLOCK
    }
    out |= gradients(lens, tokens)
    out |= interventions(lens, tokens, vector)
    out["logit lens"] = lens.unembed(lens.ln_final(cache[SITE]))
    out["generated"] = generate(lens, tokens, vector)
    return {name: value.detach().numpy() for name, value in out.items()}, cache[SITE]


def gradients(lens, tokens):
    """Compute the loss, and its gradients at four sites by backward hooks."""
    kept = {}

    def keep(grad, hook):
        kept[f"grad {hook.name}"] = grad.detach().clone()

    lens.reset_hooks()
    for name in (
        *(f"blocks.{i}.hook_resid_post" for i in range(LAYERS)),
        SITE.replace("hook_resid_post", "hook_mlp_out"),
    ):
        lens.add_hook(name, keep, dir="bwd")
    loss = lens(tokens, return_type="loss")
    loss.backward()
    lens.reset_hooks()
    return kept | {"loss": loss}


def interventions(lens, tokens, vector):
    """Compute logits with a vector added, a head set to 0, a cache patched in."""

    def without_head(value, hook):
        value = value.clone()
        value[:, :, 2] = 0.0
        return value

    other = lens.run_with_cache(tokens.flip(0))[1][SITE]
    hooks = {
        "steered": (SITE, lambda value, hook: value + vector),
        "ablated": ("blocks.1.attn.hook_z", without_head),
        "patched": (SITE, lambda value, hook: other),
    }
    return {
        name: lens.run_with_hooks(tokens, fwd_hooks=[hook])
        for name, hook in hooks.items()
    }


def generate(lens, tokens, vector):
    """Continue the beginnings of texts greedily, with a vector added."""
    with lens.hooks(fwd_hooks=[(SITE, lambda value, hook: value + vector)]):
        return lens.generate(
            tokens[:, :4],
            max_new_tokens=8,
            do_sample=False,
            stop_at_eos=False,
            # With its cache, GPT-2 without a tokenizer draws other tokens than without.
            use_past_kv_cache=False,
            verbose=False,
        )


def write_sae(folder, acts):
    """A dictionary of SAELens with random weights, and what it computes."""
    config = StandardSAEConfig(d_in=WIDTH, d_sae=LATENTS, apply_b_dec_to_input=True)
    config.metadata.hook_name = SITE
    sae = StandardSAE(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    sae.save_model(folder / "sae")
    codes = sae.encode(acts)
    with torch.no_grad():
        spliced = sae.decode(codes)
    return {"codes": codes.detach().numpy(), "decoded": spliced.numpy()}


def main(folder):
    """Write everything."""
    torch.manual_seed(1)
    tokens = torch.randint(VOCAB, (3, LENGTH))
    vector = torch.randn(WIDTH)
    for name, config, lens_config, convert in models():
        model = make(config)
        model.save_pretrained(folder / name)
        lens = hooked(lens_config, model, convert)
        arrays, acts = run(lens, tokens, vector)
        if name == "llama":
            torch.manual_seed(2)
            arrays |= write_sae(folder, acts.detach())
        np.savez(folder / f"{name}.npz", **arrays)
    names = ("transformer-lens", "sae-lens", "transformers", "torch")
    print(json.dumps({name: version(name) for name in names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
