"""Published dictionaries of every format, written here from the definitions.

The oracles are the formulas in numpy, float64, on random tensors in the layout of each
format (``test_reference_readers.py`` has what each format's own reader computes).
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_map

import toyfeat as ft
from toyfeat.interop import load_dictionary, site_name

safetensors = pytest.importorskip("safetensors.numpy")

N, D, F = 7, 4, 9
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def tensors(out=D):
    names = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, out), "b_dec": (out,)}
    return {name: draw(*shape) for name, shape in names.items()}


def jump(pre, threshold):
    return np.where(pre > threshold, np.maximum(pre, 0), 0)


def check(loaded, codes, out):
    """Codes and reconstructions, by encode, decode and forward."""
    sae, params, _ = loaded
    got = sae.encode(params, jnp.asarray(X))
    np.testing.assert_allclose(got, codes, rtol=1e-5, atol=1e-5)
    assert 0.1 < np.mean(codes != 0) < 0.9
    for recon in (
        sae.decode(params, got, acts=jnp.asarray(X)),
        sae.forward(params, jnp.asarray(X)).recon,
    ):
        np.testing.assert_allclose(recon, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_skip", [False, True])
def test_gemma_scope_2(tmp_path, has_skip):
    folder = tmp_path / "transcoder" / "layer_9_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    t, theta, skip = tensors(), np.abs(draw(F)), draw(D, D)
    stored = {name.lower(): x for name, x in t.items()} | {"threshold": theta}
    if has_skip:
        stored["affine_skip_connection"] = skip  # stored as [in, out]
    safetensors.save_file(stored, folder / "params.safetensors")
    about = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}
    about["hf_hook_point_in"] = "model.layers.9.pre_feedforward_layernorm.output"
    (folder / "config.json").write_text(json.dumps(about))
    loaded = load_dictionary(folder)
    codes = jump(X @ t["W_enc"] + t["b_enc"], theta)
    check(loaded, codes, codes @ t["W_dec"] + t["b_dec"] + has_skip * (X @ skip))
    assert loaded.metadata["model_name"] == about["model_name"]
    assert loaded.dictionary.config.d_out == D
    if has_skip:  # is no part of the codes
        with pytest.raises(ValueError, match="decode: wanted acts, got none"):
            loaded.dictionary.decode(loaded.params, jnp.asarray(codes, jnp.float32))
        with pytest.raises(ValueError, match="save_saelens: wanted codes alone"):
            ft.interop.save_saelens(tmp_path / "s", *loaded[:2])


def test_gemma_scope_of_the_stream_knows_its_hook(tmp_path):
    folder = tmp_path / "resid_post" / "layer_17_width_16k_l0_medium"
    folder.mkdir(parents=True)
    t, theta = tensors(), np.abs(draw(F))
    stored = {name.lower(): x for name, x in t.items()} | {"threshold": theta}
    safetensors.save_file(stored, folder / "params.safetensors")
    loaded = load_dictionary(folder / "params.safetensors")
    assert loaded.metadata["hook_name"] == "blocks.17.hook_resid_post"
    assert loaded.dictionary.config.d_out is None
    # The first Gemma Scope, of the same tensors with upper-case names.
    old = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "average_l0_71"
    old.mkdir(parents=True)
    np.savez(old / "params.npz", **t, threshold=theta)
    again = load_dictionary(old)
    assert again.metadata["hook_name"] == "blocks.20.hook_resid_post"
    tree_map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize(
    ("repository", "hook"),
    [
        ("gemma-scope-2b-pt-att", "blocks.20.attn.hook_z"),
        ("gemma-scope-9b-pt-mlp", "blocks.20.hook_mlp_out"),
        ("gemma-scope-2b-pt-transcoders", None),
    ],
)
def test_names_of_folders_of_gemma_scope_say_the_hook(tmp_path, repository, hook):
    # Folders of one's own around them are named like places.
    mine = tmp_path / "layer_3-res" / "transcoders"
    folder = mine / repository / "layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **tensors(), threshold=np.abs(draw(F)))
    loaded = load_dictionary(folder)
    assert loaded.metadata.get("hook_name") == hook
    assert loaded.dictionary.config.d_out == (D if hook is None else None)


def test_a_layer_of_gemma_scope_2_has_writers_to_all_layers(tmp_path):
    file = tmp_path / "params_layer_1.safetensors"
    stored = {name.lower(): x for name, x in tensors().items()}
    stored["threshold"] = np.abs(draw(F))
    safetensors.save_file({**stored, "w_dec": draw(F, 3, D)}, file)
    loaded = load_dictionary(file)
    assert loaded.metadata["layers"] == [1, 2]
    assert loaded.dictionary.config.d_out == 2 * D
    safetensors.save_file(stored, file)
    with pytest.raises(ValueError, match=r"W_dec of \[latents, layers, D\] up to"):
        load_dictionary(file)
    # No writers to its own layer.
    safetensors.save_file({**stored, "w_dec": draw(F, 1, D)}, file)
    with pytest.raises(ValueError, match="up to layer 1 or later, got"):
        load_dictionary(file)
    crosscoder = tmp_path / "crosscoder" / "layer_7_13_17_22_width_262k_l0_medium"
    crosscoder.mkdir(parents=True)
    file.rename(crosscoder / file.name)
    with pytest.raises(ValueError, match=r"wanted a cross-layer .* got a crosscoder"):
        load_dictionary(crosscoder, layer=1)


LLAMA_SCOPE = {
    "d_model": D,
    "d_sae": F,
    "jump_relu_threshold": 0.3,
    "dataset_average_activation_norm": {"in": 5.0, "out": 4.0},
    "hook_point_in": "blocks.3.hook_resid_post",
}


def llama_scope(folder, **changes):
    t = tensors()
    stored = {
        "encoder.weight": np.ascontiguousarray(t["W_enc"].T),
        "encoder.bias": t["b_enc"],
        "decoder.weight": np.ascontiguousarray(t["W_dec"].T),
        "decoder.bias": t["b_dec"],
    }
    (folder / "checkpoints").mkdir(exist_ok=True)
    safetensors.save_file(stored, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps({**LLAMA_SCOPE, **changes}))
    return t


@pytest.mark.parametrize("by_length", [False, True])
def test_llama_scope(tmp_path, by_length):
    t = llama_scope(tmp_path, sparsity_include_decoder_norm=by_length)
    read, written = D**0.5 / 5.0, D**0.5 / 4.0
    threshold = 0.3 * read
    if by_length:
        threshold = 0.3 * written / np.linalg.norm(t["W_dec"], axis=1)
    codes = jump(read * X @ t["W_enc"] + t["b_enc"], threshold)
    loaded = load_dictionary(tmp_path)
    check(loaded, codes, (codes @ t["W_dec"] + t["b_dec"]) / written)
    assert site_name(loaded.metadata["hook_name"]) == "blocks_3/resid_post"
    assert loaded.dictionary.config.d_out is None


def test_llama_scope_of_mlps_is_a_transcoder(tmp_path):
    llama_scope(tmp_path, hook_point_out="blocks.3.hook_mlp_out")
    loaded = load_dictionary(tmp_path)
    assert loaded.dictionary.config.d_out == D
    assert loaded.metadata["hook_name_out"] == "blocks.3.hook_mlp_out"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dataset_average_activation_norm": {"in": 0.0}}, "mean length above 0"),
        ({"act_fn": "silu"}, "act_fn in .* must be one of jumprelu, topk, relu, got"),
        ({"norm_activation": "token-wise"}, "norm_activation in .* 'token-wise'; load"),
        ({"use_glu_encoder": True}, "wanted an encoder that is a matrix, got use_glu"),
        ({"act_fn": "topk"}, "top_k"),
    ],
)
def test_settings_of_llama_scope_that_are_not_known(tmp_path, changes, match):
    llama_scope(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        load_dictionary(tmp_path)
    safetensors.save_file({}, tmp_path / "checkpoints" / "final.safetensors")
    (tmp_path / "hyperparams.json").write_text(json.dumps(LLAMA_SCOPE))
    with pytest.raises(ValueError, match="weights and biases of encoder and decoder"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize("has_skip", [False, True])
def test_transcoders_of_circuit_tracer(tmp_path, has_skip):
    t, skip = tensors(), draw(D, D)
    stored = {**t, "W_enc": np.ascontiguousarray(t["W_enc"].T)}
    if has_skip:
        stored["W_skip"] = skip  # stored as [out, in]
    safetensors.save_file(stored, tmp_path / "layer_5.safetensors")
    (tmp_path / "config.yaml").write_text(
        'model_name: "Qwen/Qwen3-4B"\nfeature_input_hook: mlp.hook_in\n'
        "feature_output_hook: hook_mlp_out\n"
    )
    codes = np.maximum(X @ t["W_enc"] + t["b_enc"], 0)
    for given, options in (
        (tmp_path, {"layer": 5}),
        (tmp_path / "layer_5.safetensors", {}),
    ):
        loaded = load_dictionary(given, **options)
        out = codes @ t["W_dec"] + t["b_dec"]
        check(loaded, codes, out + has_skip * (X @ skip.T))
        assert loaded.metadata == {
            "format": "transcoder",
            "model_name": "Qwen/Qwen3-4B",
            "hook_name": "blocks.5.mlp.hook_in",
            "hook_name_out": "blocks.5.hook_mlp_out",
        }
    with pytest.raises(FileNotFoundError, match=r"known format for layer 3.*layer_5"):
        load_dictionary(tmp_path, layer=3)
    for wrong in ("5", 5.0):
        with pytest.raises(TypeError, match="load_dictionary: layer must be an int"):
            load_dictionary(tmp_path, layer=wrong)


@pytest.mark.parametrize(
    ("lines", "k"),
    [
        ("activation: topk  # of the k\nk: 3", 3),
        ("\ufeffactivation: topk\nk: 3", 3),  # as editors begin a file
        ("activation: relu", None),
    ],
)
def test_settings_of_transcoders_say_which_codes_are_kept(tmp_path, lines, k):
    safetensors.save_file(
        {**tensors(), "W_enc": draw(F, D)}, tmp_path / "layer_0.safetensors"
    )
    (tmp_path / "config.yaml").write_text(lines + "\n", encoding="utf-8")
    assert load_dictionary(tmp_path, layer=0).dictionary.config.k == k
    for wrong in ("activation: topk\nk: null", "activation: gelu"):
        (tmp_path / "config.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=r"config.yaml in .* must have relu, jump"):
            load_dictionary(tmp_path, layer=0)
    (tmp_path / "config.yaml").write_text('{"activation": "topk"}')
    with pytest.raises(ValueError, match=r"config.yaml must have a line 'key: value'"):
        load_dictionary(tmp_path, layer=0)


def test_a_layer_of_a_cross_layer_transcoder_writes_to_all_later_ones(tmp_path):
    t, writers = tensors(), draw(F, 3, D)
    encoder = {"W_enc_1": np.ascontiguousarray(t["W_enc"].T), "b_enc_1": t["b_enc"]}
    encoder["b_dec_1"] = t["b_dec"]
    safetensors.save_file(encoder, tmp_path / "W_enc_1.safetensors")
    safetensors.save_file({"W_dec_1": writers}, tmp_path / "W_dec_1.safetensors")
    loaded = load_dictionary(tmp_path, layer=1)
    codes = np.maximum(X @ t["W_enc"] + t["b_enc"], 0)
    out = np.einsum("nf,fld->nld", codes, writers)
    out[:, 0] += t["b_dec"]
    check(loaded, codes, out.reshape(N, -1))
    assert loaded.metadata["layers"] == [1, 2, 3]
    of_file = load_dictionary(tmp_path / "W_enc_1.safetensors")
    tree_map(np.testing.assert_array_equal, of_file.params, loaded.params)
    (tmp_path / "config.yaml").write_text("activation: topk\nk: 3\n")
    with pytest.raises(ValueError, match="of ReLU or JumpReLU codes, got topk"):
        load_dictionary(tmp_path, layer=1)


OLD = {
    "d_in": D,
    "d_sae": F,
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "model_name": "gpt2-small",
    "activation_fn_str": "relu",
    "normalize_activations": "none",
    "l1_coefficient": 8e-5,
    "dtype": "torch.float32",
}


def old_saelens(folder, **changes):
    folder.mkdir(exist_ok=True)
    t = tensors()
    extra = {"scaling_factor": np.ones(F, np.float32)}
    safetensors.save_file({**t, **extra}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**OLD, **changes}))
    return t


def test_saelens_before_6(tmp_path):
    t = old_saelens(tmp_path)
    loaded = load_dictionary(tmp_path)
    codes = np.maximum((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 0)
    check(loaded, codes, codes @ t["W_dec"] + t["b_dec"])
    about = loaded.metadata
    assert about["hook_name"] == "blocks.8.hook_resid_pre"
    assert about["model_name"] == "gpt2-small"
    # Top-k was an activation function, and b_dec may be left alone.
    options = {"activation_fn_kwargs": {"k": 2}, "apply_b_dec_to_input": False}
    t = old_saelens(tmp_path, activation_fn_str="topk", **options)
    pre = X @ t["W_enc"] + t["b_enc"]
    kept = np.sort(pre, axis=1)[:, -2:-1]
    codes = np.where(pre >= kept, np.maximum(pre, 0), 0)
    check(load_dictionary(tmp_path), codes, codes @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn must be relu, or topk"),
        ({"activation_fn_str": "topk"}, "got 'topk' with {}"),
        ({"finetuning_scaling_factor": True}, "'finetuning_scaling_factor': True"),
        ({"normalize_activations": "layer_norm"}, "takes* activations as they are"),
        ({"architecture": "attention"}, "architecture 'attention' is not known"),
    ],
)
def test_old_settings_that_change_what_is_computed(tmp_path, changes, match):
    old_saelens(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        load_dictionary(tmp_path)


def test_skip_transcoders_of_saelens(tmp_path):
    t, skip = tensors(), draw(D, D)
    safetensors.save_file({**t, "W_skip": skip}, tmp_path / "sae_weights.safetensors")
    settings = {"architecture": "skip_transcoder", "d_in": D, "d_sae": F, "d_out": D}
    settings |= {"metadata": {"sae_lens_version": "6.54.12"}}
    (tmp_path / "cfg.json").write_text(json.dumps(settings))
    codes = np.maximum(X @ t["W_enc"] + t["b_enc"], 0)
    out = codes @ t["W_dec"] + t["b_dec"] + X @ skip.T  # stored as [out, in]
    check(load_dictionary(tmp_path), codes, out)


def test_what_is_no_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*; give a folder"):
        load_dictionary("hub:google/gemma-scope-2b-pt-res")
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"known format, it has README.md"):
        load_dictionary(tmp_path)
    wrong = {"w_enc": draw(D, F), "threshold": draw(F)}
    safetensors.save_file(wrong, tmp_path / "params.safetensors")
    with pytest.raises(ValueError, match="must have an encoder and a decoder"):
        load_dictionary(tmp_path)
    wrong |= {"w_dec": draw(F, D), "b_enc": draw(F), "b_dec": draw(D + 1)}
    safetensors.save_file(wrong, tmp_path / "params.safetensors")
    with pytest.raises(ValueError, match=r"jumprelu wants tensors .*b_dec.*\(4,\)"):
        load_dictionary(tmp_path)
