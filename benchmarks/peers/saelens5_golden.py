"""Writes tests/golden/published/saelens5: dictionaries that SAELens 5 saved and read.

    pip install sae-lens==5.11.0 "pyarrow<21"   # in an environment of its own
    python benchmarks/peers/saelens5_golden.py tests/golden/published/saelens5

For every architecture a small dictionary of random weights, and its codes and
reconstructions of random activations.  ``first_names`` has the settings and the tensors
of the first releases, as SAELens 5 still reads them.
"""

import json
import sys
from pathlib import Path

import torch
from golden_files import D, M, N, tensors, write_run, write_tensors, write_text
from sae_lens import SAE, SAEConfig

HEADS = 2
BASE = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": M,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "context_size": 128,
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext",
    "dataset_trust_remote_code": True,
    "normalize_activations": "none",
    "dtype": "torch.float32",
    "device": "cpu",
    "sae_lens_training_version": "5.11.0",
}
CASES = {
    "standard": {},
    "input_as_it_is": {"apply_b_dec_to_input": False},
    "topk": {
        "architecture": "topk",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
    },
    "topk_standard": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "heads": {"hook_name": "blocks.8.attn.hook_z"},
}


def main(folder):
    """Make, save, load, run."""
    for name, settings in CASES.items():
        sae = SAE(SAEConfig(**{**BASE, **settings}))
        with torch.no_grad():
            for key, value in sae.named_parameters():
                value += 0.4 * torch.randn_like(value)
                if key == "threshold":
                    value.abs_()
        sae.save_model(folder / name)
        run(folder / name)
    first_names(folder / "first_names")


def first_names(folder):
    """Settings named after the hook point, and a factor of 1 among the tensors."""
    renamed = {"hook_name": "hook_point", "hook_layer": "hook_point_layer"}
    absent = ("architecture", "apply_b_dec_to_input", "normalize_activations")
    absent += ("activation_fn_str", "sae_lens_training_version")
    settings = {renamed.get(k, k): v for k, v in BASE.items() if k not in absent}
    settings |= {"hook_point_head_index": None, "l1_coefficient": 8e-05, "lr": 0.0004}
    stored = {**tensors(), "scaling_factor": torch.ones(M)}
    write_text(folder / "cfg.json", settings)
    write_tensors(folder / "sae_weights.safetensors", stored)
    run(folder)


@torch.no_grad()
def run(folder):
    """Codes and reconstructions; activations of heads are apart."""
    sae = SAE.load_from_disk(folder)
    acts = torch.randn(N, D)
    hook = json.loads((folder / "cfg.json").read_text()).get("hook_name", "")
    given = acts.reshape(N, HEADS, -1) if hook.endswith("hook_z") else acts
    codes = sae.encode(given)
    write_run(folder / "run.npz", acts, codes, sae.decode(codes).reshape(N, D))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
