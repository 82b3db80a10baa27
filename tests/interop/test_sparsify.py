import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from toyfeat.interop import load_sparsify

# Written by benchmarks/peers/dictionary_golden.py.
GOLDEN = Path(__file__).parents[1] / "golden" / "sparsify"
D, M, K = 6, 10, 3


def copied(folder, drop=(), **settings):
    """The folder of a golden dictionary with other settings."""
    shutil.copytree(GOLDEN / "topk", folder, dirs_exist_ok=True)
    path = folder / "cfg.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(kept | settings))
    return folder


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_codes_and_reconstructions_are_those_of_the_library(name):
    sae, params = load_sparsify(GOLDEN / name)
    assert (sae.config.architecture, sae.config.d_in, sae.config.k) == ("topk", D, K)
    latents = {"topk_by_factor": 2 * D, "multi_topk": 4 * D}
    assert sae.config.d_sae == latents.get(name, M)
    assert sae.config.d_out == (D if name == "transcoder" else None)
    assert all(x.dtype == jnp.float32 for x in params.values())
    run = np.load(GOLDEN / name / "run.npz")
    codes = sae.encode(params, jnp.asarray(run["acts"]))
    np.testing.assert_allclose(codes, run["codes"], atol=1e-5)
    np.testing.assert_allclose(sae.decode(params, codes), run["out"], atol=1e-5)
    assert 0 < (run["codes"] != 0).mean() < 1


def test_a_second_loss_with_more_codes_does_not_change_what_is_read(tmp_path):
    one = load_sparsify(copied(tmp_path, multi_topk=False))
    two = load_sparsify(copied(tmp_path, multi_topk=True))
    assert one[0].config == two[0].config
    assert json.loads((GOLDEN / "multi_topk" / "cfg.json").read_text())["multi_topk"]


def test_settings_that_older_files_do_not_have_are_the_defaults(tmp_path):
    absent = ("activation", "transcode", "skip_connection", "multi_topk")
    sae, _ = load_sparsify(copied(tmp_path, drop=absent, signed=False))
    assert sae.config == load_sparsify(GOLDEN / "topk")[0].config


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax' is not known here; known"),
        ({"skip_connection": True}, "skip_connection = True asks for a linear path"),
        ({"signed": True}, "signed = True asks for codes of both signs"),
        ({"jump": 0.1}, r"'jump' in .*cfg\.json is not known here, got 0.1"),
        ({"k": 11}, "k must be an int in 1 .. 10, the latents, got 11"),
        ({"k": None}, r"'k' in .*cfg\.json must be an int at least 1, got None"),
        ({"k": True}, "'k' in .* must be an int at least 1, got True"),
        ({"d_in": "6"}, "'d_in' in .* must be an int at least 1, got '6'"),
        ({"transcode": "false"}, "'transcode' in .* must be true or .*got 'false'"),
        ({"transcoed": False}, "'transcoed' in .*; 'transcode' is known"),
        ({"num_latents": 10.0}, "'num_latents' in .* must be an int .*got 10.0"),
        ({"num_latents": 9}, r"topk wants tensors .*'W_enc': \(6, 9\)"),
        ({"d_in": 5}, r"topk wants tensors .*'W_enc': \(5, 10\)"),
        ({"drop": ("d_in",)}, r"'d_in' in .*cfg\.json must be .*got nothing; add it"),
        ({"drop": ("k",)}, r"'k' in .*cfg\.json must be .*got nothing; add it"),
    ],
)
def test_settings_that_are_not_known_are_named(settings, match, tmp_path):
    folder = copied(tmp_path, **settings)
    with pytest.raises(ValueError, match=match):
        load_sparsify(folder)


def test_missing_files_and_other_tensors_are_named(tmp_path):
    for name in ("cfg.json", "sae.safetensors"):
        folder = copied(tmp_path)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"there is no .*{name}"):
            load_sparsify(folder)
    folder = copied(tmp_path)
    tensors = load_file(GOLDEN / "topk" / "sae.safetensors")
    for change in (
        {**tensors, "W_skip": np.ones((D, D))},
        {k: v for k, v in tensors.items() if k != "W_dec"},
    ):
        save_file(change, folder / "sae.safetensors")
        with pytest.raises(
            ValueError, match=r"load_sparsify: wanted tensors \['W_dec'"
        ):
            load_sparsify(folder)


def test_without_safetensors_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install \"toyfeat\[sae\]\""):
        load_sparsify(GOLDEN / "topk")
