"""Writes tests/golden/published/saelens: other formats, as SAELens' loaders read them.

    pip install torch sae-lens==6.54.12   # in an environment of its own
    python benchmarks/peers/published_golden.py tests/golden/published/saelens

For every format a small dictionary of random weights in its published layout, below the
names of its repository on the hub, and the codes and reconstructions that SAELens
computes after its loader converted the files.  The loaders ask the hub for files; here
they are given those of the folder.
"""

import sys
from pathlib import Path

import torch
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
from huggingface_hub.utils import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor
from safetensors import safe_open

LAYERS = 3
SIZES = {"d_in": D, "d_sae": M}  # Gemma Scope's are those of its models, in the loader


def gemma_scope(folder):
    """Residual stream, then transcoder: upper-case names in an archive of NumPy."""
    for repo, loader, sizes in (
        ("google/gemma-scope-2b-pt-res", "gemma_2", SIZES),
        (
            "google/gemma-scope-2b-pt-transcoders",
            "gemma_2_transcoder",
            {**SIZES, "d_out": D},
        ),
    ):
        name = "layer_20/width_16k/average_l0_71"
        stored = {**tensors(), "threshold": thresholds()}
        write_tensors(folder / repo / name / "params.npz", stored)
        run(folder, repo, name, loader, sizes)


def gemma_scope_2(folder):
    """Residual stream, transcoders, a layer of a cross-layer transcoder."""
    repo = "google/gemma-scope-2-1b-pt"
    about = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}
    places = {
        "resid_post/layer_17_width_16k_l0_medium": {
            "hf_hook_point_in": "model.layers.17.output"
        },
        "transcoder/layer_9_width_16k_l0_small": {},
        "transcoder/layer_9_width_16k_l0_small_affine": {"affine_connection": True},
    }
    for name, more in places.items():
        stored = {key.lower(): x for key, x in tensors().items()}
        stored["threshold"] = thresholds()
        if "transcoder" in name:
            layer = "model.layers.9."
            more["hf_hook_point_in"] = layer + "pre_feedforward_layernorm.output"
            more["hf_hook_point_out"] = layer + "post_feedforward_layernorm.output"
        if "affine" in name:
            stored["affine_skip_connection"] = 0.5 * torch.randn(D, D)
        write_tensors(folder / repo / name / "params.safetensors", stored)
        write_text(folder / repo / name / "config.json", {**about, **more})
        run(folder, repo, name, "gemma_3")
    # A file per layer; layer 1 writes to itself and to layer 2 only.
    name = "clt/width_262k_l0_medium/params_layer_1"
    stored = {key.lower(): x for key, x in tensors().items()}
    stored["w_dec"] = 0.6 * torch.randn(M, LAYERS, D)
    stored["w_dec"][:, 0] = 0
    stored["threshold"] = thresholds()
    write_tensors(folder / repo / f"{name}.safetensors", stored)
    run(folder, repo, name, "gemma_3")


def llama_scope(folder):
    """Activations of mean length sqrt(D); rows of the decoder have length 1."""
    release, sae_id = "llama_scope_lxr_8x", "l15r_8x"
    repo = "fnlp/Llama3_1-8B-Base-LXR-8x"
    name = "Llama3_1-8B-Base-L15R-8x"
    factor = get_norm_scaling_factor(release, sae_id)  # SAELens' table has it, too
    length = D**0.5 / factor
    settings = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.35546875 / factor,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": length, "out": length},
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
        "d_model": D,
        "d_sae": M,
    }
    drawn = tensors()
    drawn["W_dec"] /= drawn["W_dec"].norm(dim=1, keepdim=True)
    stored = {
        "encoder.weight": drawn["W_enc"].T,
        "encoder.bias": drawn["b_enc"],
        "decoder.weight": drawn["W_dec"].T,
        "decoder.bias": drawn["b_dec"],
    }
    write_text(folder / repo / name / "hyperparams.json", settings)
    write_tensors(folder / repo / name / "checkpoints/final.safetensors", stored)
    run(folder, repo, name, "llama_scope", release=(release, sae_id), scale=1 / factor)


def transcoders(folder):
    """ReLU transcoders, a file per layer, and a layer that writes to later ones."""
    hooks = {
        "model_name": "Qwen/Qwen3-4B",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    repo, name = "mwhanna/qwen3-4b-transcoders", "layer_5.safetensors"
    stored = tensors()
    stored["W_enc"] = stored["W_enc"].T
    sizes = {"d_model": D, "d_feature": M, "batch_size": 64}
    training = {name: {"value": value} for name, value in sizes.items()}
    write_tensors(folder / repo / name, stored)
    write_text(folder / repo / "config.yaml", hooks)
    write_text(folder / repo / "wandb-config.yaml", training)
    run(folder, repo, name, "mwhanna_transcoder")
    repo = "mntss/clt-gemma-2-2b-426k"
    hooks |= {"model_name": "google/gemma-2-2b", "feature_input_hook": "hook_resid_mid"}
    drawn = tensors()
    encoder = {f"{key}_1": drawn[key] for key in ("W_enc", "b_enc", "b_dec")}
    encoder["W_enc_1"] = encoder["W_enc_1"].T
    write_tensors(folder / repo / "W_enc_1.safetensors", encoder)
    writers = 0.6 * torch.randn(M, LAYERS - 1, D)
    write_tensors(folder / repo / "W_dec_1.safetensors", {"W_dec_1": writers})
    write_text(folder / repo / "config.yaml", hooks)
    run(folder, repo, "1", "mntss_clt_layer_transcoder")


def run(folder, repo, name, loader, sizes=None, release=None, scale=1.0):
    """Load with SAELens, which is told that the files are on this disk; run."""

    def local(repo_id, filename, subfolder=None, **_):
        path = folder / repo_id / (subfolder or "") / filename
        if not path.exists():
            raise EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id, filename):
        with safe_open(local(repo_id, filename), "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118

    def convert(**options):
        options["repo_id"], options["folder_name"] = repo, name
        options["cfg_overrides"] = {**options["cfg_overrides"], **(sizes or {})}
        return loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](**options)

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    ids = release or (repo, name)
    sae = SAE.from_pretrained(*ids, device="cpu", dtype="float32", converter=convert)
    sae.eval()
    acts = scale * torch.randn(N, D)
    with torch.no_grad():
        codes = sae.encode(acts)
        out = sae(acts)
    place = folder / repo / name
    place = place if place.is_dir() else place.parent
    write_run(place / "run.npz", acts, codes, out)


if __name__ == "__main__":
    torch.manual_seed(0)
    for write in (gemma_scope, gemma_scope_2, llama_scope, transcoders):
        write(Path(sys.argv[1]))
