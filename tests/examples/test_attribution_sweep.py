import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import toyfeat as ft
from examples import attribution_sweep
from toyfeat.models.planted.task import Truth

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"coefficients": (0.1,)}, r"coefficients must be two positive .* got \(0\.1,"),
        ({"learning_rates": (1e-3, 0.0)}, "learning_rates must be two positive"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_a_sweep_is_checked_before_anything_is_trained(change, match):
    sweep = attribution_sweep.Sweep((0.1, 1.0), (1e-3, 1e-2))
    attribution_sweep.check_sweep(sweep)
    with pytest.raises(ValueError, match=match):
        attribution_sweep.check_sweep(sweep._replace(**change))


@pytest.mark.slow
def test_the_script_writes_all_of_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tyro")
    arguments = ["--steps", "12", "--network-steps", "20", "--examples", "600"]
    arguments += ["--coefficients", "0.1", "1", "--learning-rates", "0.001", "0.01"]
    arguments += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "sweep.py"), run_name="__main__")
    whole = json.loads((tmp_path / "sweep.json").read_text())
    assert [m["family"] for m in whole["members"]] == ["published"] * 4 + ["robust"] * 4
    settings = [tuple(m["settings"].values()) for m in whole["members"]]
    assert settings[:4] == [(r, s) for r in (1e-3, 1e-2) for s in (0.1, 1)]
    assert settings[4:] == settings[:4]
    assert all(0 < m["figures"]["writers"] < 1 for m in whole["members"])
    names = ("brittleness.png", "pareto.png", "sweep.html")
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    assert "published" in capsys.readouterr().out


def test_scores_are_coverages_and_nan_where_a_member_diverged(key):
    rows, columns = jax.random.normal(key, (2, 3, 6, 4))
    truth = Truth(readers=columns[0, :2], writers=rows[0, :2], frequency=np.ones(2))
    params = {"W_dec": rows.at[2].set(np.nan), "W_enc": columns.swapaxes(1, 2)}
    scores = attribution_sweep.score_members(params, truth)
    assert scores["writers"][0] == pytest.approx(1)
    assert scores["readers"][0] == pytest.approx(1)
    other = ft.metrics.match_features(rows[1], truth.writers).coverage
    assert scores["writers"][1] == pytest.approx(other)
    assert np.isnan(scores["writers"]).tolist() == [False, False, True]
