"""Writes tests/golden/published/llama_scope, by the library that released the format.

    pip install torch transformer-lens==3.9.0 datasets pymongo
    git clone https://github.com/OpenMOSS/Language-Model-SAEs
    git -C Language-Model-SAEs checkout 1e71036   # 2024-10-30, of the release
    PYTHONPATH=Language-Model-SAEs/src python benchmarks/peers/llama_scope_golden.py \
        tests/golden/published/llama_scope

Small dictionaries of random weights in the published layout, and the codes and
reconstructions that ``SparseAutoEncoder.from_pretrained`` makes of activations as they
are.  Its codes are in units of rows of its decoder, whose ``lengths`` are mostly 1.
"""

import sys
from pathlib import Path

import torch
from golden_files import D, M, N, tensors, write_run, write_tensors, write_text
from lm_saes.sae import SparseAutoEncoder

BASE = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "d_model": D,
    "d_sae": M,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.35546875,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 10.8125, "out": 10.8125},
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "top_k": 3,
}
CASES = {
    "residual": {},
    "transcoder": {
        "hook_point_in": "blocks.15.ln2.hook_normalized",
        "hook_point_out": "blocks.15.hook_mlp_out",
        "dataset_average_activation_norm": {"in": 3.5, "out": 1.25},
    },
    "trained_as_topk": {"act_fn": "topk"},
    "topk": {"act_fn": "topk", "jump_relu_threshold": 0.0},
    "relu": {"act_fn": "relu", "apply_decoder_bias_to_pre_encoder": True},
    "lengths_left_alone": {"sparsity_include_decoder_norm": False},
    "scales_folded": {"norm_activation": "inference"},
}


@torch.no_grad()
def main(folder):
    """Write the files, load, run."""
    for name, settings in CASES.items():
        settings = {**BASE, **settings}
        drawn = tensors()
        stored = {
            "encoder.weight": drawn["W_enc"].T,
            "encoder.bias": drawn["b_enc"],
            "decoder.weight": drawn["W_dec"].T,
            "decoder.bias": drawn["b_dec"],
        }
        write_text(folder / name / "hyperparams.json", settings)
        write_tensors(folder / name / "checkpoints" / "final.safetensors", stored)
        sae = SparseAutoEncoder.from_pretrained(
            str(folder / name), device="cpu", dtype=torch.float32
        )
        length = settings["dataset_average_activation_norm"]["in"]
        if settings["norm_activation"] == "inference":
            length = D**0.5
        acts = torch.randn(N, D) * length / D**0.5
        codes, path = sae.encode(acts), folder / name / "run.npz"
        write_run(path, acts, codes, sae.decode(codes), lengths=sae.decoder_norm())


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
