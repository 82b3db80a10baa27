"""Writes tests/golden/published/circuit_tracer: transcoders that it saved and read.

    # in an environment of its own
    pip install git+https://github.com/decoderesearch/circuit-tracer@4bb8c0e
    python benchmarks/peers/circuit_tracer_golden.py \
        tests/golden/published/circuit_tracer

For every kind a small set of transcoders of random weights, one per layer or one across
layers, and the codes ``[layers, N, M]`` and reconstructions ``[layers, N, D]`` that
circuit-tracer computes after it read the files, those of Gemma Scope too.  It asks the
hub for files; here it is given the folder.
"""

import sys
from pathlib import Path

import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt
from circuit_tracer.utils import hf_utils
from golden_files import (
    D,
    M,
    N,
    tensors,
    thresholds,
    write_run,
    write_tensors,
    write_text,
)

LAYERS, K = 3, 3
ABOUT = {
    "model_kind": "transcoder_set",
    "model_name": "meta-llama/Llama-3.2-1B",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}
SETS = {
    "relu": {},
    "skip": {},
    "jump_relu": {},
    "topk": {"activation": "topk", "k": K},
}


def transcoder_sets(folder):
    """One file per layer; the encoder is stored as ``[M, D]``."""
    for name, settings in SETS.items():
        for layer in range(LAYERS):
            stored = tensors()
            stored["W_enc"] = stored["W_enc"].T
            if name == "skip":
                stored["W_skip"] = 0.5 * torch.randn(D, D)
            if name == "jump_relu":
                stored["activation_function.threshold"] = thresholds()
            if name == "topk":  # as with many latents, more than k codes are above 0
                stored["b_enc"] += 2
            write_tensors(folder / name / f"layer_{layer}.safetensors", stored)
        write_text(folder / name / "config.yaml", {**ABOUT, **settings})
        run(folder / name)


def cross_layer(folder):
    """Two files per layer: of what reads there, and of what it writes from there on."""
    about = {**ABOUT, "model_kind": "cross_layer_transcoder"}
    for name in ("cross_layer", "cross_layer_jump_relu"):
        for layer in range(LAYERS):
            drawn = tensors()
            drawn["W_enc"] = drawn["W_enc"].T
            encoder = {f"{k}_{layer}": drawn[k] for k in ("W_enc", "b_enc", "b_dec")}
            if name.endswith("jump_relu"):
                encoder[f"threshold_{layer}"] = thresholds()
            writers = 0.6 * torch.randn(M, LAYERS - layer, D)
            write_tensors(folder / name / f"W_enc_{layer}.safetensors", encoder)
            decoder = {f"W_dec_{layer}": writers}
            write_tensors(folder / name / f"W_dec_{layer}.safetensors", decoder)
        write_text(folder / name / "config.yaml", about)
        run(folder / name)


def gemma_scope(folder):
    """Transcoders of both Gemma Scopes, in a folder per layer."""
    place = "transcoder_all/layer_{}_width_16k_l0_small_affine/params.safetensors"
    files = {
        "gemma-scope": "layer_{}/width_16k/average_l0_7/params.npz",
        "gemma-scope-2": place,
    }
    for name, file in files.items():
        paths = [folder / name / file.format(layer) for layer in range(LAYERS)]
        for path in paths:
            stored = {**tensors(), "threshold": thresholds()}
            if name == "gemma-scope-2":
                stored["affine_skip_connection"] = 0.5 * torch.randn(D, D)
                stored = {key.lower(): x for key, x in stored.items()}
            write_tensors(path, stored)
        run(folder / name, transcoders=list(map(str, paths)))


def gemma_scope_2_cross_layer(folder):
    """A file per layer, with writers to all layers: 0 to those before its own."""
    folder /= "gemma-scope-2-clt/width_262k_l0_medium_affine"
    paths = {i: folder / f"params_layer_{i}.safetensors" for i in range(LAYERS)}
    for layer, path in paths.items():
        stored = {key.lower(): x for key, x in tensors().items()}
        stored["w_dec"] = 0.6 * torch.randn(M, LAYERS, D)
        stored["w_dec"][:, :layer] = 0
        stored["threshold"] = thresholds()
        stored["affine_skip_connection"] = 0.5 * torch.randn(D, D)
        write_tensors(path, stored)
    # It reads the paths before the last one, which is why there is one more.
    model = load_gemma_scope_2_clt(
        {i: str(path) for i, path in paths.items()} | {LAYERS: ""}, dtype=torch.float32
    )
    write(folder, model)


def run(folder, **config):
    """Load from what is told to be a snapshot of the hub, and run."""
    hf_utils.snapshot_download = lambda *_, **__: str(folder)
    hf_utils.hf_hub_download = lambda *_, filename, **__: str(folder / filename)
    if config:
        about = {**ABOUT, **config, "repo_id": f"own/{folder.name}", "scan": "own"}
        model = hf_utils.load_transcoders(about, dtype=torch.float32)
    else:
        model, _ = hf_utils.load_transcoder_from_hub(
            f"own/{folder.name}", dtype=torch.float32, use_cache=False
        )
    write(folder, model)


@torch.no_grad()
def write(folder, model):
    """Write codes and reconstructions of all layers."""
    acts = torch.randn(LAYERS, N, D)
    codes = model.encode(acts)
    write_run(folder / "run.npz", acts, codes, model.decode(codes, acts))


if __name__ == "__main__":
    torch.manual_seed(0)
    for make in (transcoder_sets, cross_layer, gemma_scope, gemma_scope_2_cross_layer):
        make(Path(sys.argv[1]))
