"""The benchmark of decompositions, on tiny sizes."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_has_a_row_for_every_seed_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("partition")
    options = {"tiny": True, "seeds": 2, "batch": 16, "out": tmp_path}
    config = bench.PartitionConfig(toys=("5-2+identity",), steps=4, **options)
    rows, missed = bench.measure(config)
    assert missed  # four steps do not reach the bars
    assert [row["size"]["seed"] for row in rows] == [0, 1]
    names = {"mmcs", "ml2r", "l0", "alive", "error adversarial", "target_correct"}
    assert names <= set(rows[0])
    assert "dense_error identity 0.1" in rows[0]
    again, _ = bench.measure(config)
    assert again[1]["mmcs"] == rows[1]["mmcs"]
    config = bench.PartitionConfig(map=True, steps=2, **options)
    mapped, _ = bench.measure(config)
    assert len(mapped) == 2 * 5 * 3 * 2
    timed, _ = bench.measure(bench.PartitionConfig(speed=True, **options))
    assert [row["size"]["seeds"] for row in timed] == [1, 16, 16]
