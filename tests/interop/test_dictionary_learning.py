import json
import pickle
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.interop import load_dictionary_learning

# Written by benchmarks/peers/dictionary_golden.py.
GOLDEN = Path(__file__).parents[1] / "golden" / "dictionary_learning"
D, M, K = 6, 10, 3
ARCHITECTURES = {
    "standard": "standard",
    "new": "standard",
    "topk": "topk",
    "topk_bfloat16": "topk",
    "batchtopk": "batchtopk",
    "batchtopk_untrained": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
    "jumprelu": "jumprelu",
    "gated": "gated",
}


def copied(name, folder, **trainer):
    """The folder of a golden dictionary with other settings of its trainer."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["trainer"].update(trainer)
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_codes_and_reconstructions_are_those_of_the_library(name):
    assert set(ARCHITECTURES) == {path.name for path in GOLDEN.iterdir()}
    sae, params = load_dictionary_learning(GOLDEN / name)
    assert sae.config.architecture == ARCHITECTURES[name]
    assert (sae.config.d_in, sae.config.d_sae) == (D, M)
    assert all(x.dtype == jnp.float32 for x in params.values())
    run = np.load(GOLDEN / name / "run.npz")
    codes = sae.encode(params, jnp.asarray(run["acts"]))
    np.testing.assert_allclose(codes, run["codes"], atol=1e-5)
    np.testing.assert_allclose(sae.decode(params, codes), run["out"], atol=1e-5)
    assert 0 < (run["codes"] != 0).mean() < 1


def test_what_is_beside_the_weights_is_read_too():
    read = lambda name: load_dictionary_learning(GOLDEN / name)  # noqa: E731
    assert read("topk")[0].config.k == K
    assert read("matryoshka")[0].config.matryoshka_widths == (2, 5, 10)
    assert read("jumprelu")[0].config.bandwidth == 0.001
    assert not read("jumprelu")[0].config.apply_b_dec_to_input
    assert read("standard")[0].config.apply_b_dec_to_input
    rows = read("standard")[1]["W_dec"]
    np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1.0, rtol=1e-5)
    assert float(read("batchtopk_untrained")[1]["topk_threshold"]) == -1.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_init_makes_parameters_of_the_same_shapes(name):
    sae, params = load_dictionary_learning(GOLDEN / name)
    fresh = jax.eval_shape(sae.init, jax.random.key(0))
    assert {k: v.shape for k, v in fresh.items()} == {
        k: v.shape for k, v in params.items()
    }


@pytest.mark.parametrize(
    ("name", "trainer", "match"),
    [
        (
            "topk",
            {"dict_class": "CrossCoder"},
            "must be one of AutoEncoder, .*got 'CrossCoder'",
        ),
        ("topk", {"dict_class": ["x"]}, r"got \['x'\]"),
        ("topk", {"k": 4}, r"k must be one number, got \[4\] in .* and \[3\] in ae.pt"),
        (
            "topk",
            {"dict_class": "AutoEncoder"},
            r"AutoEncoder wants tensors \['bias', .*got \['b_dec'",
        ),
        (
            "gated",
            {"dict_class": "AutoEncoderTopK"},
            r"AutoEncoderTopK wants .*'decoder_bias'",
        ),
        ("topk", {"activation_dim": 7}, r"wants tensors .*\(7, 10\).*got .*\(6, 10\)"),
        ("standard", {"dict_size": 11}, r"standard wants tensors .*'W_enc': \(6, 11\)"),
        ("jumprelu", {"dict_size": "10"}, r"'dict_size' in .*config\.json .* got '10'"),
        ("jumprelu", {"bandwidth": float("nan")}, "'bandwidth' in .* got nan"),
        ("batchtopk", {"k": True}, "'k' in .* must be an int at least 1, got True"),
        ("topk", {"activation_dim": 6.0}, "'activation_dim' in .* got 6.0"),
    ],
)
def test_settings_that_do_not_fit_are_named(name, trainer, match, tmp_path):
    folder = copied(name, tmp_path, **trainer)
    with pytest.raises(ValueError, match=f"load_dictionary_learning: .*{match}"):
        load_dictionary_learning(folder)


def test_missing_and_foreign_files_are_named(tmp_path):
    for name in ("config.json", "ae.pt"):
        folder = copied("topk", tmp_path)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"there is no .*{name}"):
            load_dictionary_learning(folder)
    folder = copied("topk", tmp_path)
    for text, match in {
        "{}": r"'trainer' in .*config\.json must be an object, got nothing",
        '{"trainer": 3}': r"'trainer' in .*config\.json must be an object, got 3",
        '{"trainer": {}}': r"'dict_class' in .*config\.json must be a string, got no",
        "not json": r"config\.json must be a JSON object",
    }.items():
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            load_dictionary_learning(folder)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_a_file_that_would_run_something_is_refused(tmp_path):
    folder = copied("topk", tmp_path / "sae")
    for state in (Malicious(tmp_path / "ran"), {"b_dec": Malicious(tmp_path / "ran")}):
        with zipfile.ZipFile(folder / "ae.pt", "w") as archive:
            archive.writestr("ae/data.pkl", pickle.dumps(state, 2))
        with pytest.raises(ValueError, match=r"asks for (builtins|__builtin__)\.exec"):
            load_dictionary_learning(folder)
    assert not (tmp_path / "ran").exists()
