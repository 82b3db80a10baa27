"""Five inputs in two dimensions are decomposed into five parts, end to end."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import toyfeat as ft

ROOT = Path(__file__).parents[2]


def decompose(monkeypatch, seeds, parts, steps, controller=None, **hyper):
    """Rows of a score for each seed, on targets of their own; ten times the rate."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    toys = importlib.import_module("partition_toys")
    bench = importlib.import_module("partition")
    targets = toys.train_targets("5-2", list(range(seeds)), steps=4000, batch=256)
    assert targets.correct.all()
    split = toys.decomposition_of("5-2", targets, parts)
    trainer = toys.TOYS["5-2"].preset.trainer(
        split,
        targets.params,
        networks=True,
        steps=steps,
        learning_rate=3e-3,
        controller=controller,
    )
    trainer = ft.population(trainer)
    keys = jax.random.split(jax.random.key(1000), 2)[:seeds]
    hyper = {name: jnp.full(seeds, value) for name, value in hyper.items()}
    state = trainer.init(keys, network=jnp.arange(seeds), **hyper)
    batches = toys.batches_of("5-2", jax.random.key(7), 256)
    state = ft.fit(trainer, state, batches, steps=steps, progress=False)
    judge = bench.make_judge("5-2", split)
    return [bench.score("5-2", judge, state, seed) for seed in range(seeds)]


def check(row, tolerance):
    """The row is that of a right decomposition."""
    assert row["mmcs"] > 0.999
    assert abs(row["ml2r"] - 1) < 0.03
    for site in ("weight", "weight#1"):
        assert row[f"identity_error {site} {tolerance}"] == 0
    assert row["alive"] == {"weight": 5, "weight#1": 5}
    assert row["error adversarial"] < 1e-3


@pytest.mark.slow
def test_parts_of_a_toy_of_superposition_are_its_inputs(monkeypatch):
    """Fewer parts, rows and steps than published."""
    (row,) = decompose(monkeypatch, 1, parts=8, steps=3000)
    check(row, tolerance=0.2)
    assert row["l0"] == pytest.approx(0.5, abs=0.05)  # .25 inputs at two sites


@pytest.mark.slow
def test_an_error_makes_ten_times_the_coefficient_right(monkeypatch):
    """With the coefficient itself fewer than five parts are left."""
    control = ft.controllers.target_error(
        2e-4, measures="stochastic", term="importance"
    )
    rows = decompose(
        monkeypatch, 2, parts=20, steps=6000, controller=control, importance=3e-2
    )
    for row in rows:
        check(row, tolerance=0.1)
    fixed = decompose(monkeypatch, 2, parts=20, steps=6000, importance=3e-2)
    assert max(row["alive"]["weight"] for row in fixed) < 5
