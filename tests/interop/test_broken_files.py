"""Files of dictionaries that are broken, wrongly typed, elsewhere or of a full disk."""

import errno
import json
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyfeat as ft

GOLDEN = Path(__file__).parents[1] / "golden"
D, M, K = 6, 16, 3
SAES = {
    "standard": ft.dictionaries.standard(D, M),
    "topk": ft.dictionaries.topk(D, M, K),
    "gradient": ft.dictionaries.gradient_topk(D, M, K, weight=2.5),
    "paired": ft.dictionaries.paired(D, M, K),
}
LOADERS = {  # function: a golden folder, its file of settings
    "load_saelens": ("saelens/topk", "cfg.json"),
    "load_sparsify": ("sparsify/topk", "cfg.json"),
    "load_dictionary_learning": ("dictionary_learning/topk", "config.json"),
}
BROKEN = {
    "cut off": b'{"a": ',
    "not UTF-8": b"\xff{}",
    "too deep": b"[" * 200_000,
    "long number": b'{"d_in": ' + b"9" * 6000 + b"}",
    "list": b"[]",
    "null": b"null",
}


@pytest.fixture
def saved(tmp_path):
    """``name, changes -> folder`` of a dictionary with other settings."""

    def save(name, change=lambda settings: None):
        sae = SAES[name]
        params = sae.init(jax.random.key(0))
        ft.interop.save_saelens(tmp_path, sae, params, metadata={"model_name": "toy"})
        settings = json.loads((tmp_path / "cfg.json").read_text())
        change(settings)
        (tmp_path / "cfg.json").write_text(json.dumps(settings))
        return tmp_path

    return save


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("loader", LOADERS)
def test_settings_that_are_not_json_are_refused_by_name(loader, fault, tmp_path):
    golden, settings = LOADERS[loader]
    shutil.copytree(GOLDEN / golden, tmp_path, dirs_exist_ok=True)
    (tmp_path / settings).write_bytes(BROKEN[fault])
    with pytest.raises(ValueError, match=f"^{loader}: .*{settings} must be a JSON obj"):
        getattr(ft.interop, loader)(tmp_path)


DETAILS = "training_architecture_details"


def set_detail(name, value):
    return lambda settings: settings["metadata"][DETAILS].update({name: value})


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("standard", "d_in", "6"),
        ("standard", "d_in", 6.0),
        ("standard", "d_in", None),
        ("standard", "d_in", 0),
        ("standard", "d_sae", True),
        ("standard", "d_sae", 10**30),
        ("standard", "apply_b_dec_to_input", "false"),
        ("standard", "apply_b_dec_to_input", [0]),
        ("standard", "apply_b_dec_to_input", 1),
        ("standard", "architecture", ["standard"]),
        ("standard", "metadata", [1]),
        ("standard", "k", "x"),
        ("topk", "k", True),
        ("topk", "k", 3.0),
        ("topk", "rescale_acts_by_decoder_norm", "no"),
        ("topk", "rescale_acts_by_decoder_norm", None),
        ("topk", "rescale_act_by_decoder_norm", True),
        ("topk", "aply_b_dec_to_input", False),
        ("topk", "num_phases", 4),
        ("topk", "dtype", 32),
    ],
)
def test_a_setting_of_another_type_or_name_is_refused(saved, name, key, value):
    folder = saved(name, lambda settings: settings.update({key: value}))
    with pytest.raises(ValueError, match=rf"^load_saelens: '{key}' in .*cfg\.json .*"):
        ft.interop.load_saelens(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", True, None, -1.0])
def test_a_setting_in_the_metadata_has_its_type(saved, value):
    folder = saved("gradient", set_detail("gradient_weight", value))
    with pytest.raises(ValueError, match=r"'gradient_weight' in .*cfg\.json must be a"):
        ft.interop.load_saelens(folder)


@pytest.mark.parametrize("details", [None, {}, {"x": 1}, ...])
@pytest.mark.parametrize("name", ["gradient", "paired"])
def test_a_dictionary_without_its_details_is_not_read_as_another(saved, name, details):
    def change(settings):
        settings["metadata"].pop(DETAILS)
        if details is not ...:
            settings["metadata"][DETAILS] = details

    match = rf"load_saelens: {DETAILS} in .*cfg\.json must have .*; save the dictionary"
    with pytest.raises(ValueError, match=match):
        ft.interop.load_saelens(saved(name, change))


@pytest.mark.parametrize("key", ["d_in", "d_sae", "architecture", "metadata"])
def test_a_missing_setting_is_named_with_its_file(saved, key):
    folder = saved("standard", lambda settings: settings.pop(key))
    with pytest.raises(ValueError, match=r"^load_saelens: .*cfg\.json"):
        ft.interop.load_saelens(folder)


def test_a_transcoder_and_a_choice_by_k_need_their_numbers(saved):
    folder = saved("standard", lambda s: s.update(architecture="transcoder"))
    with pytest.raises(ValueError, match=r"'d_out' in .*cfg\.json must be an int, got"):
        ft.interop.load_saelens(folder)
    folder = saved("paired", lambda settings: settings.pop("k"))
    with pytest.raises(ValueError, match=rf"load_saelens: {folder}: paired: k must be"):
        ft.interop.load_saelens(folder)


def test_switches_that_are_off_and_settings_of_the_training_pass(saved):
    extra = {"new_switch": False, "noise": None, "l1_coefficient": 5.0}
    folder = saved("standard", lambda settings: settings.update(extra))
    assert ft.interop.load_saelens(folder)[0].config == SAES["standard"].config


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("tensor", ["W_enc", "b_dec"])
def test_weights_that_are_not_finite_are_refused_by_name(saved, tensor, value):
    path = saved("standard") / "sae_weights.safetensors"
    weights = {name: x.astype(np.float64) for name, x in load_file(path).items()}
    weights[tensor].flat[3] = value
    save_file(weights, path)
    match = rf"^load_saelens: tensor '{tensor}' in .*sae_weights\.safetensors must be f"
    with pytest.raises(ValueError, match=match):
        ft.interop.load_saelens(path.parent)


def test_weights_of_ints_are_refused(saved):
    path = saved("standard") / "sae_weights.safetensors"
    weights = {name: x.astype(np.int8) for name, x in load_file(path).items()}
    save_file(weights, path)
    with pytest.raises(ValueError, match="must have floating-point numbers, got int8"):
        ft.interop.load_saelens(path.parent)


def test_weights_of_the_other_libraries_must_be_finite(tmp_path):
    shutil.copytree(GOLDEN / "sparsify/topk", tmp_path / "sparsify")
    path = tmp_path / "sparsify" / "sae.safetensors"
    weights = load_file(path)
    weights["encoder.bias"] = np.full_like(weights["encoder.bias"], np.nan)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"tensor 'b_enc' in .*sae\.safetensors must"):
        ft.interop.load_sparsify(path.parent)
    # The same for a pickle of torch, one number of which is overwritten.
    shutil.copytree(GOLDEN / "dictionary_learning/new", tmp_path / "new")
    path = tmp_path / "new" / "ae.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    largest = max((n for n in members if "/data/" in n), key=lambda n: len(members[n]))
    members[largest] = np.float32(np.nan).tobytes() + members[largest][4:]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"tensor 'W_\w+' in .*ae\.pt must be finite"):
        ft.interop.load_dictionary_learning(path.parent)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ({"a"}, TypeError, r"metadata\['x'\] must be a JSON value, got a set: {'a'}"),
        ([1, {"y": b"z"}], TypeError, r"metadata\['x'\]\[1\]\['y'\] .* got a bytes"),
        (jnp.ones(2), TypeError, r"metadata\['x'\] must be a JSON value"),
        ({3: 4}, TypeError, r"keys of metadata\['x'\] must be strings, got 3"),
        (float("nan"), ValueError, r"metadata\['x'\] must be finite"),
    ],
)
def test_metadata_that_json_does_not_have_is_refused(value, error, match, tmp_path):
    sae = SAES["standard"]
    params = sae.init(jax.random.key(0))
    with pytest.raises(error, match=f"save_saelens: {match}"):
        ft.interop.save_saelens(tmp_path, sae, params, metadata={"x": value})
    assert not list(tmp_path.iterdir())


def test_metadata_can_be_read_and_saved_again(saved):
    folder = saved("paired")
    metadata = ft.interop.saelens_metadata(folder)
    assert metadata["model_name"] == "toy"
    assert metadata["training_architecture"] == "paired"
    sae, params = ft.interop.load_saelens(folder)
    ft.interop.save_saelens(folder, sae, params, metadata=metadata)
    assert ft.interop.saelens_metadata(folder) == metadata
    with pytest.raises(FileNotFoundError, match=r"saelens_metadata: .*none.cfg\.json"):
        ft.interop.saelens_metadata(folder / "none")


@pytest.mark.parametrize("name", ["gpt2-small-res-jb", "hub:google/gemma-scope-2b"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_name_that_is_no_folder_says_what_to_do(loader, name):
    with pytest.raises(FileNotFoundError, match=f"{loader}: there is no .*hf download"):
        getattr(ft.interop, loader)(name)


def test_a_folder_of_another_library_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match="this folder is one for load_sparsify"):
        ft.interop.load_dictionary_learning(GOLDEN / "sparsify/topk")
    for i in range(9):
        (tmp_path / f"layer_{i}").mkdir()
    match = r"the folder has layer_0, .*layer_5, \.\.\.; give the folder that has it"
    with pytest.raises(FileNotFoundError, match=match):
        ft.interop.load_saelens(tmp_path)


def gemma_scope_arrays():
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return arrays | {"threshold": rng.uniform(0.2, 1.5, M).astype(np.float32)}


def test_gemma_scope_is_read_as_its_paper_says(tmp_path):
    arrays = gemma_scope_arrays()
    np.savez(tmp_path / "params.npz", **arrays)
    sae, params = ft.interop.load_saelens(tmp_path)
    acts = np.random.default_rng(1).normal(size=(50, D)).astype(np.float32)
    codes = sae.encode(params, jnp.asarray(acts))
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    pre = acts @ wide["W_enc"] + wide["b_enc"]
    expected = np.where(pre > wide["threshold"], pre, 0.0)
    assert 0 < (expected != 0).mean() < 1
    np.testing.assert_allclose(codes, expected, rtol=1e-4, atol=1e-5)
    recon = expected @ wide["W_dec"] + wide["b_dec"]
    np.testing.assert_allclose(sae.decode(params, codes), recon, rtol=1e-4, atol=1e-4)


def test_other_archives_in_its_place_are_refused(tmp_path):
    arrays, path = gemma_scope_arrays(), tmp_path / "params.npz"
    for change, match in (
        ({"W_skip": np.ones((D, D))}, r"params\.npz must have the tensors \['W_dec'"),
        ({"b_enc": arrays["b_enc"] * np.nan}, "tensor 'b_enc' in .* must be finite"),
        ({"b_enc": np.ones(3, np.float32)}, r"params\.npz: jumprelu wants tensors"),
        ({"b_enc": np.array([{}])}, r"params\.npz is not a whole archive of arrays"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(ValueError, match=f"load_saelens: .*{match}"):
            ft.interop.load_saelens(tmp_path)
    np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError, match=r"params\.npz is not .*without compression"):
        ft.interop.load_saelens(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is not a whole archive"):
        ft.interop.load_saelens(tmp_path)


def test_a_disk_that_is_full_is_named_and_leaves_the_old_files(saved):
    """A limit on the size of files stands for the disk: its writes really fail."""
    folder = saved("standard")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sae = ft.dictionaries.standard(D, 4000)
    params = sae.init(jax.random.key(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"save_saelens: could not write .*sae_wei"):
            ft.interop.save_saelens(folder, sae, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_path_that_is_a_file_is_named(tmp_path):
    sae = SAES["standard"]
    (tmp_path / "taken").write_text("x")
    with pytest.raises(
        OSError, match=r"save_saelens: could not write .*taken"
    ) as error:
        ft.interop.save_saelens(tmp_path / "taken", sae, sae.init(jax.random.key(0)))
    assert error.value.errno == errno.EEXIST
