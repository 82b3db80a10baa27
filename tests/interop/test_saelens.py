import errno
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyfeat as ft
from toyfeat.types import Diagnostics

# Written by benchmarks/peers/saelens_golden.py.
GOLDEN = Path(__file__).parents[1] / "golden" / "saelens"
D, M, K = 6, 16, 3
OURS = {
    "standard": ft.dictionaries.standard(D, M),
    "topk": ft.dictionaries.topk(D, M, K),
    "topk plain": ft.dictionaries.topk(D, M, K, rescale_acts_by_decoder_norm=False),
    "signed": ft.dictionaries.topk(D, M, K, signed=True),
    "jump": ft.dictionaries.jump_relu(D, M),
    "gated": ft.dictionaries.gated(D, M),
    "transcoder": ft.dictionaries.standard(D, M, target_dim=4),
    "jump transcoder": ft.dictionaries.jump_relu(D, M, target_dim=4),
    "gradient": ft.dictionaries.gradient_topk(D, M, K, weight=2.5),
    "gradient plain": ft.dictionaries.gradient_topk(
        D, M, K, weight=2.5, rescale_acts_by_decoder_norm=False
    ),
    "paired": ft.dictionaries.paired(D, M, K),
}
ALL_FILES = {"toyfeat.safetensors", "sae_weights.safetensors", "cfg.json"}


def random_params(sae, seed=0):
    params = sae.init(jax.random.key(0))
    rng = np.random.default_rng(seed)
    return {k: v + jnp.asarray(rng.random(v.shape), v.dtype) for k, v in params.items()}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir()))
def test_what_saelens_saved_gives_what_saelens_gives(name):
    sae, params = ft.interop.load_saelens(GOLDEN / name)
    run = np.load(GOLDEN / name / "run.npz")
    codes = sae.encode(params, jnp.asarray(run["acts"]))
    np.testing.assert_allclose(codes, run["codes"], atol=1e-5)
    np.testing.assert_allclose(sae.decode(params, codes), run["out"], atol=1e-5)
    assert 0 < (run["codes"] != 0).mean() < 1


@pytest.mark.parametrize("name", OURS)
def test_there_and_back(name, tmp_path):
    sae = OURS[name]
    params = random_params(sae)
    ft.interop.save_saelens(tmp_path / "new" / "folder", sae, params)
    again, same = ft.interop.load_saelens(tmp_path / "new" / "folder")
    assert again.config == sae.config
    assert set(same) == set(params)
    for tensor, value in params.items():
        np.testing.assert_array_equal(same[tensor], value)


@pytest.mark.slow_cases
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["batch", "matryoshka"])
def test_thresholds_are_folded_into_a_jump_relu(kind, rescale, tmp_path):
    options = {"rescale_acts_by_decoder_norm": rescale}
    sae = ft.dictionaries.batch_topk(D, M, K, **options)
    if kind == "matryoshka":
        sae = ft.dictionaries.matryoshka(D, M, K, widths=(4, M), **options)
    params = random_params(sae) | {"topk_threshold": jnp.array(0.7)}
    ft.interop.save_saelens(tmp_path, sae, params, metadata={"model_name": "toy"})
    about = json.loads((tmp_path / "cfg.json").read_text())
    assert about["architecture"] == "jumprelu"
    assert about["metadata"]["training_architecture"] == sae.config.architecture
    assert about["metadata"]["model_name"] == "toy"
    again, same = ft.interop.load_saelens(tmp_path)
    acts = jax.random.normal(jax.random.key(1), (50, D))
    before, after = sae.encode(params, acts), again.encode(same, acts)
    assert 0 < (before != 0).mean() < 1
    np.testing.assert_allclose(after, before, atol=1e-5)
    np.testing.assert_allclose(
        again.decode(same, after), sae.decode(params, before), rtol=1e-4, atol=1e-5
    )


def test_a_row_of_zeros_is_folded_without_harm(tmp_path):
    sae = ft.dictionaries.batch_topk(D, M, K)
    params = random_params(sae)
    params["W_dec"] = params["W_dec"].at[3].set(0)
    ft.interop.save_saelens(tmp_path, sae, params)
    again, same = ft.interop.load_saelens(tmp_path)
    acts = jax.random.normal(jax.random.key(1), (50, D))
    before, after = sae.encode(params, acts), again.encode(same, acts)
    assert np.any(before[:, 3] != 0)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def with_scale(sae, seed=0):
    return random_params(sae, seed) | {"grad_scale": jnp.array([1e-3, 0.7])}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def of_saelens_alone(folder):
    """What is read without what is ours in the metadata, as SAELens reads it."""
    path = folder / "cfg.json"
    settings = json.loads(path.read_text())
    settings["metadata"].pop("training_architecture")
    path.write_text(json.dumps(settings))
    return ft.interop.load_saelens(folder)


def assert_equal(params, want):
    assert set(params) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(params[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient", "gradient plain", "paired"])
def test_scales_of_gradients_come_back_and_choose_the_same(name, tmp_path):
    sae = OURS[name]
    params = with_scale(sae)
    ft.interop.save_saelens(tmp_path, sae, params)
    again, same = ft.interop.load_saelens(tmp_path)
    assert again.config == sae.config
    assert_equal(same, params)
    rng = np.random.default_rng(1)
    acts = jnp.asarray(rng.normal(size=(50, D)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(50, 2, D)), jnp.float32)
    codes = sae.encode(params, acts, grads=grads)
    np.testing.assert_array_equal(again.encode(same, acts, grads=grads), codes)
    assert np.any((codes != 0) != (sae.encode(params, acts) != 0))
    init = jax.eval_shape(again.init, jax.random.key(0))
    assert set(init) == set(params) - {"grad_scale"}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["gradient", "gradient plain", "paired"])
def test_a_choice_by_gradients_is_topk_to_saelens(name, tmp_path):
    sae = OURS[name]
    params = with_scale(sae)
    about = {"model_name": "toy", "training_architecture_details": {"gradient": 1}}
    ft.interop.save_saelens(tmp_path, sae, params, metadata=about)
    settings = json.loads((tmp_path / "cfg.json").read_text())
    assert (settings["architecture"], settings["k"]) == ("topk", K)
    assert settings["metadata"]["training_architecture"] == sae.config.architecture
    assert settings["metadata"]["model_name"] == "toy"
    plain, tensors = of_saelens_alone(tmp_path)
    rescaled = name != "gradient plain"
    topk = ft.dictionaries.topk(D, M, K, rescale_acts_by_decoder_norm=rescaled)
    assert plain.config == topk.config
    four = ("W_enc", "b_enc", "W_dec", "b_dec")
    assert_equal(tensors, {name: params[name] for name in four})
    acts = jax.random.normal(jax.random.key(1), (50, D))
    codes, want = plain.encode(tensors, acts), sae.encode(params, acts)
    np.testing.assert_array_equal(codes != 0, want != 0)
    length = np.linalg.norm(params["W_dec"], axis=1) if name == "paired" else 1.0
    np.testing.assert_allclose(codes, np.asarray(want) * length, rtol=1e-5)
    got, want = plain.decode(tensors, codes), sae.decode(params, want)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_others_can_read_the_files_as_any_new_file(tmp_path):
    sae = ft.dictionaries.paired(D, M, K)
    ft.interop.save_saelens(tmp_path / "folder", sae, random_params(sae))
    (tmp_path / "new").touch()
    want = (tmp_path / "new").stat().st_mode
    files = list((tmp_path / "folder").iterdir())
    assert {path.name for path in files} == ALL_FILES
    assert {path.stat().st_mode for path in files} == {want}


def test_a_file_beside_is_there_only_where_it_is_needed(tmp_path):
    sae = OURS["paired"]
    ft.interop.save_saelens(tmp_path, sae, random_params(sae))
    assert names_in(tmp_path) == ALL_FILES
    assert set(load_file(tmp_path / "toyfeat.safetensors")) == {"W_read", "P"}
    old = (tmp_path / "toyfeat.safetensors").read_bytes()
    for name in ("topk", "gradient"):
        plain, params = OURS[name], random_params(OURS[name])
        ft.interop.save_saelens(tmp_path, sae, random_params(sae))
        metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
        ft.interop.save_saelens(tmp_path, plain, params, metadata=metadata)
        assert names_in(tmp_path) == ALL_FILES - {"toyfeat.safetensors"}
        (tmp_path / "toyfeat.safetensors").write_bytes(old)  # as if it had stayed
        again, same = ft.interop.load_saelens(tmp_path)
        assert again.config == plain.config
        assert_equal(same, params)


@pytest.mark.parametrize("name", ["gradient", "paired"])
def test_files_of_two_dictionaries_are_not_read_as_one(name, tmp_path):
    sae = OURS[name]
    one, two = with_scale(sae), with_scale(sae, seed=1)
    two["grad_scale"] = 2 * two["grad_scale"]
    ft.interop.save_saelens(tmp_path / "one", sae, one)
    for part in ("toyfeat.safetensors", "sae_weights.safetensors"):
        ft.interop.save_saelens(tmp_path / "two", sae, two)
        shutil.copy(tmp_path / "one" / part, tmp_path / "two" / part)
        match = rf"not of one {sae.config.architecture} dictionary: .* save the dict"
        with pytest.raises(ValueError, match=match):
            ft.interop.load_saelens(tmp_path / "two")
    ft.interop.save_saelens(tmp_path / "two", sae, two)
    (tmp_path / "two" / "toyfeat.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no .*toyfeat.safetensors, which hold"
    ):
        ft.interop.load_saelens(tmp_path / "two")
    assert of_saelens_alone(tmp_path / "two")[0].config.architecture == "topk"
    path = tmp_path / "one" / "cfg.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"apply_b_dec_to_input": False}))
    if name == "paired":  # which always subtracts it
        with pytest.raises(ValueError, match="weights or settings were changed"):
            ft.interop.load_saelens(tmp_path / "one")


def test_weights_that_were_only_written_anew_still_fit(tmp_path):
    sae = OURS["paired"]
    params = with_scale(sae)
    ft.interop.save_saelens(tmp_path, sae, params)
    path = tmp_path / "sae_weights.safetensors"
    turned = {k: v for k, v in sorted(load_file(path).items(), reverse=True)}
    save_file(turned, path, metadata={"format": "pt"})
    assert_equal(ft.interop.load_saelens(tmp_path)[1], params)


def stop_at(monkeypatch, call, function, stop):
    """Let the given call of ``os.replace`` or ``os.rename`` stop the save."""
    calls, plain = [], getattr(os, function)

    def patched(source, target):
        calls.append(target)
        if len(calls) == call + 1:
            stop()
        plain(source, target)

    monkeypatch.setattr(f"os.{function}", patched)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("function", ["rename", "replace"])
@pytest.mark.parametrize("name", ["standard", "paired"])
def test_a_save_that_is_interrupted_leaves_the_old_dictionary(
    name, function, call, tmp_path, monkeypatch
):
    sae = OURS[name]
    old, new = random_params(sae), random_params(sae, seed=1)
    ft.interop.save_saelens(tmp_path, sae, old)
    files = names_in(tmp_path)
    if call < len(files):
        with monkeypatch.context() as patch:
            stop_at(patch, call, function, interrupt)
            with pytest.raises(KeyboardInterrupt):
                ft.interop.save_saelens(tmp_path, sae, new)
    assert_equal(ft.interop.load_saelens(tmp_path)[1], old)
    assert names_in(tmp_path) == files
    ft.interop.save_saelens(tmp_path, sae, new)
    assert_equal(ft.interop.load_saelens(tmp_path)[1], new)


def test_a_save_that_is_killed_never_mixes_weights_and_settings(tmp_path, monkeypatch):
    """The dictionaries differ in a setting that fits the weights of both."""
    old, new, folder = OURS["topk"], OURS["topk plain"], tmp_path / "sae"
    params = {"old": random_params(old), "new": random_params(new, seed=1)}
    ft.interop.save_saelens(folder, old, params["old"])
    copies = []

    def copy_before(function):
        def copy_and_call(source, target):
            copies.append(tmp_path / f"killed {len(copies)}")
            shutil.copytree(folder, copies[-1])
            function(source, target)

        return copy_and_call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(f"os.{name}", copy_before(getattr(os, name)))
        ft.interop.save_saelens(folder, new, params["new"])
    assert_equal(ft.interop.load_saelens(folder)[1], params["new"])
    assert_equal(ft.interop.load_saelens(copies[0])[1], params["old"])
    for copy in copies[1:]:
        with pytest.raises(FileNotFoundError, match=r"a save was cut off here, save"):
            ft.interop.load_saelens(copy)
        ft.interop.save_saelens(copy, new, params["new"])
        assert names_in(copy) == {"sae_weights.safetensors", "cfg.json"}
        assert_equal(ft.interop.load_saelens(copy)[1], params["new"])
    assert len(copies) == 4


def test_wrong_files_are_named(tmp_path):
    sae = OURS["standard"]
    params = random_params(sae)
    with pytest.raises(FileNotFoundError, match=r"no .*cfg\.json"):
        ft.interop.load_saelens(tmp_path)
    with pytest.raises(ValueError, match=r"wants tensors .*'W_enc': \(6, 16\)"):
        ft.interop.save_saelens(tmp_path, sae, params | {"W_enc": jnp.ones((16, 6))})
    assert not list(tmp_path.iterdir())
    ft.interop.save_saelens(tmp_path, sae, params)
    good = json.loads((tmp_path / "cfg.json").read_text())
    for text in ("{", "[1]"):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=r"load_saelens: .*cfg\.json"):
            ft.interop.load_saelens(tmp_path)
    for change, match in (
        ({"architecture": "temporal"}, "'temporal' is not known here; known are"),
        ({"metadata": {"sae_lens_version": "5.9"}}, "says 5.9"),
        ({"metadata": {"sae_lens_version": "six"}}, "says six"),
        ({"metadata": "x"}, r"'metadata' in .*cfg\.json must be an object, got 'x'"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' is not known here"),
        (
            {"architecture": "topk"},
            "k must be an int in 1 .. 16, .* got None",
        ),
        ({"d_sae": 17}, r"load_saelens: .*\.safetensors: standard wants tensors"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=match):
            ft.interop.load_saelens(tmp_path)


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_and_full_disk(_arrays, path):
    path.write_bytes(b"half of it")
    full_disk()


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("safetensors.numpy.save_file", full_disk),
        ("safetensors.numpy.save_file", half_and_full_disk),
        ("pathlib.Path.write_text", full_disk),
        ("os.replace", full_disk),
    ],
    ids=["weights", "half of the weights", "settings", "names"],
)
@pytest.mark.parametrize(("old", "new"), [("standard", "topk"), ("paired", "gradient")])
def test_an_old_dictionary_survives_a_full_disk(
    old, new, where, what, tmp_path, monkeypatch
):
    sae, other = OURS[old], OURS[new]
    params = random_params(sae)
    ft.interop.save_saelens(tmp_path, sae, params, metadata={"model_name": "old"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(where, what)
        with pytest.raises(OSError, match="No space left"):
            ft.interop.save_saelens(tmp_path, other, random_params(other))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    ft.interop.save_saelens(tmp_path, other, random_params(other))
    assert ft.interop.load_saelens(tmp_path)[0].config == other.config
    assert names_in(tmp_path) == ALL_FILES - {"toyfeat.safetensors"}


def test_the_weights_appear_before_the_settings(tmp_path, monkeypatch):
    names, replace = [], os.replace
    monkeypatch.setattr(
        "os.replace", lambda a, b: (names.append(b.name), replace(a, b))
    )
    sae = OURS["standard"]
    ft.interop.save_saelens(tmp_path, sae, random_params(sae))
    assert names == ["sae_weights.safetensors", "cfg.json"]
    sae = OURS["paired"]
    ft.interop.save_saelens(tmp_path, sae, random_params(sae))
    assert names[2:] == ["toyfeat.safetensors", *names[:2]]


def test_what_saelens_does_not_have_is_named(tmp_path):
    for make, name in (
        (ft.dictionaries.topk, "topk"),
        (ft.dictionaries.gradient_topk, "topk"),
    ):
        sae = make(D, M, K, target_dim=4)
        with pytest.raises(ValueError, match=f"SAELens has no {name}_transcoder"):
            ft.interop.save_saelens(tmp_path, sae, random_params(sae))
    eye, none = jnp.eye(D), jnp.zeros(D)
    basis = ft.Basis(none, eye, eye, none, Diagnostics(*(jnp.array(D),) * 4))
    with pytest.raises(
        ValueError, match=r"no linear architecture; .*toyfeat.save_tree"
    ):
        ft.interop.save_saelens(tmp_path, *ft.dictionaries.from_basis(basis))
    sae = ft.dictionaries.topk(D, M, K)
    with pytest.raises(ValueError, match="save_saelens: topk wants tensors"):
        ft.interop.save_saelens(tmp_path, sae, with_scale(sae))
    assert not names_in(tmp_path)


def test_what_is_not_finite_is_not_saved(tmp_path):
    sae = ft.dictionaries.standard(D, M)
    params = sae.init(jax.random.key(0))
    params["b_dec"] = params["b_dec"].at[1].set(jnp.nan)
    with pytest.raises(ValueError, match="save_saelens: b_dec must be finite"):
        ft.interop.save_saelens(tmp_path, sae, params)
    assert not names_in(tmp_path)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    sae = OURS["paired"]
    for name in ("sae_weights.safetensors", "toyfeat.safetensors"):
        ft.interop.save_saelens(tmp_path, sae, with_scale(sae))
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{name} is not a whole safetensors"):
            ft.interop.load_saelens(tmp_path)


def test_without_safetensors_the_extra_is_named(monkeypatch, tmp_path):
    sae = ft.dictionaries.standard(D, M)
    ft.interop.save_saelens(tmp_path, sae, sae.init(jax.random.key(0)))
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install \"toyfeat\[sae\]\""):
        ft.interop.load_saelens(tmp_path)
