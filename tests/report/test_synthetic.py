import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as tf
from toyfeat.report import synthetic

ROOT = Path(__file__).parents[2]


def run(folder):
    arguments = ["--out", str(folder), "--tiny", "--only", "jump_relu"]
    done = subprocess.run(
        [sys.executable, "scripts/synth_sae_bench.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_script_trains_scores_saves_and_goes_on(tmp_path):
    rows = run(tmp_path)
    assert [row["name"] for row in rows] == ["jump_relu"]
    assert 0 < rows[0]["mcc"] <= 1
    assert 0 < rows[0]["uniqueness"] <= 1
    assert rows[0]["published"]["mcc"] > 0.7
    folder = tmp_path / "jump_relu"
    lines = (folder / "metrics.jsonl").read_text()
    assert len(lines.splitlines()) == 1
    sae, _ = tf.load_saelens(folder / "features")
    assert sae.config.architecture == "jumprelu"
    assert run(tmp_path) == rows  # from the checkpoint: nothing is trained again
    assert (folder / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka", "standard"])
def test_every_architecture_of_the_table_is_trained(name):
    recipe = synthetic.TINY._replace(steps=3)
    world = tf.data.synth_sae_bench(jax.random.key(0), features=128, dim=16)
    sae, params = synthetic.fitted(name, jax.random.key(1), world, recipe)
    start = sae.init(jax.random.split(jax.random.key(1))[0])
    assert all(np.isfinite(x).all() for x in params.values())
    assert not np.allclose(params["W_dec"], start["W_dec"])
    pairs = list(synthetic.samples(jax.random.key(2), world, 300, 128))
    assert [acts.shape for acts, _ in pairs] == 3 * [(128, 16)]


@pytest.mark.parametrize("train", [False, True])
def test_scores_are_their_definitions(train):
    world = tf.data.synth_sae_bench(jax.random.key(0), features=128, dim=16)
    sae = tf.batch_topk(16, 24, 3)
    params = sae.init(jax.random.key(1))
    params |= {"b_dec": world.bias, "topk_threshold": jnp.asarray(0.02)}
    acts, planted = tf.data.world_batch(jax.random.key(2), world, 300)
    pairs = [(acts, planted)] if train else [(acts[:90], planted[:90])]
    pairs += [] if train else [(acts[90:], planted[90:])]
    got = synthetic.scores(sae, params, world.feature_vectors, pairs, train=train)
    x = np.asarray(acts, np.float64)
    rows = np.asarray(params["W_dec"], np.float64)
    size = np.linalg.norm(rows, axis=1)
    pre = (x - np.asarray(world.bias)) @ np.asarray(params["W_enc"], np.float64)
    codes = np.maximum(pre, 0) * size
    cut = np.sort(codes.ravel())[-3 * 300] if train else 0.02
    codes = codes * (codes >= cut)
    rest = x - (codes / size) @ rows - np.asarray(world.bias)
    variance = np.sum((x - x.mean(0)) ** 2)
    assert got["ev"] == pytest.approx(1 - np.sum(rest**2) / variance, abs=1e-5)
    assert got["l0"] == pytest.approx(np.sum(codes > 0) / 300)
    assert got["dead"] == np.sum(~np.any(codes > 0, axis=0))
    assert got["mcc"] == tf.match_features(rows, world.feature_vectors).mcc
    assert got["uniqueness"] == tf.uniqueness(rows, world.feature_vectors)
    same = tf.detection(rows, world.feature_vectors, [(codes, planted)])
    np.testing.assert_allclose([got[k] for k in same._fields], same, rtol=1e-6)
