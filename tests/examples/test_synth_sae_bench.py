import json

import jax
import numpy as np
import pytest
from processes import run_python

import toyfeat as ft
from examples import synth_sae_bench
from toyfeat import worlds


def run(folder):
    arguments = "--out", folder, "--tiny", "--only", "jump_relu"
    done = run_python("scripts/synth_sae_bench.py", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_script_trains_scores_saves_and_goes_on(tmp_path):
    rows = run(tmp_path)
    assert [row["name"] for row in rows] == ["jump_relu"]
    assert 0 < rows[0]["mcc"] <= 1
    assert 0 < rows[0]["uniqueness"] <= 1
    assert rows[0]["published"]["mcc"] > 0.7
    folder = tmp_path / "jump_relu"
    lines = (folder / "metrics.jsonl").read_text()
    assert len(lines.splitlines()) == 1
    sae, _ = ft.interop.load_saelens(folder / "features")
    assert sae.config.architecture == "jumprelu"
    assert run(tmp_path) == rows  # from the checkpoint: nothing is trained again
    assert (folder / "metrics.jsonl").read_text() == lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch_topk", "matryoshka", "standard"])
def test_every_architecture_of_the_table_is_trained(name):
    recipe = synth_sae_bench.TINY._replace(steps=3)
    world = worlds.synth_sae_bench(jax.random.key(0), features=128, dim=16)
    sae, params = synth_sae_bench.train_dictionary(
        name, jax.random.key(1), world, recipe
    )
    start = sae.init(jax.random.split(jax.random.key(1))[0])
    assert all(np.isfinite(x).all() for x in params.values())
    assert not np.allclose(params["W_dec"], start["W_dec"])
    pairs = list(synth_sae_bench.evaluation_batches(jax.random.key(2), world, 300, 128))
    assert [acts.shape for acts, _ in pairs] == 3 * [(128, 16)]


def test_an_unknown_architecture_is_named():
    world = worlds.synth_sae_bench(jax.random.key(0), features=128, dim=16)
    with pytest.raises(ValueError, match="synth_sae_bench: 'other' is none of"):
        synth_sae_bench.train_dictionary(
            "other", jax.random.key(1), world, synth_sae_bench.TINY
        )
