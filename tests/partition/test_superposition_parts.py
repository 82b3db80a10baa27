"""Five inputs in two dimensions are decomposed into five parts, end to end."""

import importlib
from pathlib import Path

import jax
import pytest

import toyfeat as ft

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_parts_of_a_toy_of_superposition_are_its_inputs(monkeypatch):
    """Fewer parts, rows and steps than published, at a higher rate."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    toys = importlib.import_module("partition_toys")
    bench = importlib.import_module("partition")
    steps = 3000
    targets = toys.train_targets("5-2", [0], steps=4000, batch=256)
    assert targets.correct.all()
    split = toys.decomposition_of("5-2", targets, 8)
    trainer = toys.TOYS["5-2"].preset.trainer(
        split, targets.params, networks=True, steps=steps, learning_rate=3e-3
    )
    trainer = ft.population(trainer)
    state = trainer.init(jax.random.split(jax.random.key(1000), 2)[:1])
    batches = toys.batches_of("5-2", jax.random.key(7), 256)
    state = ft.fit(trainer, state, batches, steps=steps, progress=False)
    row = bench.score("5-2", bench.make_judge("5-2", split), state, 0)
    assert row["mmcs"] > 0.999
    assert abs(row["ml2r"] - 1) < 0.03
    for site in ("weight", "weight#1"):
        assert row[f"identity_error {site} 0.2"] == 0
    assert row["alive"] == {"weight": 5, "weight#1": 5}
    assert row["l0"] == pytest.approx(0.5, abs=0.05)  # .25 inputs at two sites
    assert row["error adversarial"] < 1e-3
