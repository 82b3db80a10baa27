"""The benchmark of the lens runs, on tiny sizes and without torch."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_has_a_row_for_every_fit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("lens")
    config = bench.LensConfig(tiny=True, prompts=5, long=8, chunk=8, rounds=1)
    rows, missed = bench.measure(config, None, None)
    assert not missed
    by_name = {row["method"]: row for row in rows}
    assert len(by_name) == 9
    # The chain is the plain fit by another way.
    assert abs(by_name["chain"]["error"] - by_name["plain"]["error"]) < 1e-4
    assert all(row["error"] < 1.5 and row["peer_s"] is None for row in rows)
