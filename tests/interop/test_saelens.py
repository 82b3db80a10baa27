import errno
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as tf

# Written by benchmarks/peers/saelens_golden.py.
GOLDEN = Path(__file__).parents[1] / "golden" / "saelens"
D, M, K = 6, 16, 3
OURS = {
    "standard": tf.standard(D, M),
    "topk": tf.topk(D, M, K),
    "topk plain": tf.topk(D, M, K, rescale_acts_by_decoder_norm=False),
    "signed": tf.topk(D, M, K, signed=True),
    "jump": tf.jump_relu(D, M),
    "gated": tf.gated(D, M),
    "transcoder": tf.standard(D, M, target_dim=4),
    "jump transcoder": tf.jump_relu(D, M, target_dim=4),
}


def random_params(sae):
    params = sae.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    return {k: v + jnp.asarray(rng.random(v.shape), v.dtype) for k, v in params.items()}


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir()))
def test_what_saelens_saved_gives_what_saelens_gives(name):
    sae, params = tf.load_saelens(GOLDEN / name)
    run = np.load(GOLDEN / name / "run.npz")
    codes = sae.encode(params, jnp.asarray(run["acts"]))
    np.testing.assert_allclose(codes, run["codes"], atol=1e-5)
    np.testing.assert_allclose(sae.decode(params, codes), run["out"], atol=1e-5)
    assert 0 < (run["codes"] != 0).mean() < 1


@pytest.mark.parametrize("name", OURS)
def test_there_and_back(name, tmp_path):
    sae = OURS[name]
    params = random_params(sae)
    tf.save_saelens(tmp_path / "new" / "folder", sae, params)
    again, same = tf.load_saelens(tmp_path / "new" / "folder")
    assert again.config == sae.config
    assert set(same) == set(params)
    for tensor, value in params.items():
        np.testing.assert_array_equal(same[tensor], value)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["batch", "matryoshka"])
def test_thresholds_are_folded_into_a_jump_relu(kind, rescale, tmp_path):
    options = {"rescale_acts_by_decoder_norm": rescale}
    sae = tf.batch_topk(D, M, K, **options)
    if kind == "matryoshka":
        sae = tf.matryoshka(D, M, K, widths=(4, M), **options)
    params = random_params(sae) | {"topk_threshold": jnp.array(0.7)}
    tf.save_saelens(tmp_path, sae, params, metadata={"model_name": "toy"})
    about = json.loads((tmp_path / "cfg.json").read_text())
    assert about["architecture"] == "jumprelu"
    assert about["metadata"]["training_architecture"] == sae.config.architecture
    assert about["metadata"]["model_name"] == "toy"
    again, same = tf.load_saelens(tmp_path)
    acts = jax.random.normal(jax.random.key(1), (50, D))
    before, after = sae.encode(params, acts), again.encode(same, acts)
    assert 0 < (before != 0).mean() < 1
    np.testing.assert_allclose(after, before, atol=1e-5)
    np.testing.assert_allclose(
        again.decode(same, after), sae.decode(params, before), rtol=1e-4, atol=1e-5
    )


def test_a_choice_by_gradients_is_saved_as_topk(tmp_path):
    sae = tf.gradient_topk(D, M, K)
    tf.save_saelens(tmp_path, sae, random_params(sae))
    again, _ = tf.load_saelens(tmp_path)
    assert again.config == tf.topk(D, M, K).config


def test_wrong_files_are_named(tmp_path):
    sae = OURS["standard"]
    params = random_params(sae)
    with pytest.raises(FileNotFoundError, match=r"no .*cfg\.json"):
        tf.load_saelens(tmp_path)
    with pytest.raises(ValueError, match=r"wants tensors .*'W_enc': \(6, 16\)"):
        tf.save_saelens(tmp_path, sae, params | {"W_enc": jnp.ones((16, 6))})
    assert not list(tmp_path.iterdir())
    tf.save_saelens(tmp_path, sae, params)
    good = json.loads((tmp_path / "cfg.json").read_text())
    for text in ("{", "[1]"):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=r"load_saelens: .*cfg\.json"):
            tf.load_saelens(tmp_path)
    for change, match in (
        ({"architecture": "temporal"}, "'temporal' is not known here; known are"),
        ({"metadata": {"sae_lens_version": "5.9"}}, "says 5.9"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' is not known here"),
        ({"architecture": "topk"}, "k must be an int in 1 .. latents = 16, got None"),
        ({"d_sae": 17}, "load_saelens: standard wants tensors"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=match):
            tf.load_saelens(tmp_path)


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
def test_an_old_dictionary_survives_a_full_disk(where, what, tmp_path, monkeypatch):
    sae, other = OURS["standard"], tf.topk(D, M, K)
    params = random_params(sae)
    tf.save_saelens(tmp_path, sae, params, metadata={"model_name": "old"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(where, what)
        with pytest.raises(OSError, match="No space left"):
            tf.save_saelens(tmp_path, other, random_params(other))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    tf.save_saelens(tmp_path, other, random_params(other))
    assert tf.load_saelens(tmp_path)[0].config == other.config
    assert set(before) == {p.name for p in tmp_path.iterdir()}


def test_the_weights_appear_before_the_settings(tmp_path, monkeypatch):
    names, replace = [], os.replace
    monkeypatch.setattr(
        "os.replace", lambda a, b: (names.append(b.name), replace(a, b))
    )
    sae = OURS["standard"]
    tf.save_saelens(tmp_path, sae, random_params(sae))
    assert names == ["sae_weights.safetensors", "cfg.json"]


def test_saelens_has_no_transcoder_of_topk(tmp_path):
    sae = tf.topk(D, M, K, target_dim=4)
    with pytest.raises(ValueError, match="SAELens has no topk_transcoder"):
        tf.save_saelens(tmp_path, sae, random_params(sae))


def test_without_safetensors_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install \"toyfeat\[sae\]\""):
        tf.load_saelens(tmp_path)
