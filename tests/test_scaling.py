"""The tables of what steps exchange on many devices, and of the largest run."""

import json

import pytest
from processes import ROOT, run_python

PAGE = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results"


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scale_plan
    import scaling

    return scaling, scale_plan


def test_the_tables_of_the_page_are_those_of_the_rows(benchmarks):
    scaling, scale_plan = benchmarks
    page = PAGE.read_text()
    rows = read_rows(RESULTS / "scaling-cpu.jsonl")
    assert {row["case"] for row in rows} == set(scaling.CASES)
    for name in scaling.CASES:
        assert scaling.describe([row for row in rows if row["case"] == name]) in page
    rows = read_rows(RESULTS / "scale-plan-cpu.jsonl")
    assert len(rows) >= 3
    for row in rows:
        assert scale_plan.describe(row) in page


def test_a_plan_is_the_arithmetic_of_its_figures(benchmarks):
    """Hours and dollars from bytes and operations, by hand."""
    options = benchmarks[1].Options()
    for row in read_rows(RESULTS / "scale-plan-cpu.jsonl"):
        devices = row["size"]["data"] * row["size"]["latents_axis"]
        products = row["operations"] / (495e12 * 0.4)
        hours = 1e9 / 8192 * (products + 2 * row["bytes"] / 50e9) / 3600
        assert row["hours"]["TF32"] == pytest.approx(hours, rel=1e-4)
        assert row["dollars"]["TF32"] == pytest.approx(hours * devices * 3, rel=1e-4)
        # Two matrices, two moments of each, and the batch are most of the arguments.
        state = 6 * options.dim * options.latents * 4 / row["size"]["latents_axis"]
        state += options.examples * options.dim * 4 / row["size"]["data"]
        assert state < row["state"] < 1.001 * state


@pytest.mark.slow
def test_what_is_exchanged_does_not_grow_with_the_tokens(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = "--devices", 8, 64, "--json", path
    done = run_python("benchmarks/scaling.py", *options, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(row["case"], row["size"]["devices"]): row for row in read_rows(path)}
    stored = read_rows(RESULTS / "scaling-cpu.jsonl")
    for row in stored:
        name, devices = row["case"], row["size"]["devices"]
        if (name, devices) in rows:
            again = rows[name, devices]
            assert again["bytes"] == pytest.approx(row["bytes"], rel=0.02, abs=1e4)
            assert again["memory"] == pytest.approx(row["memory"], rel=0.2)
    for name in {name for name, _ in rows}:
        few, many = rows[name, 8], rows[name, 64]
        if name != "latents":  # whose eight devices have no axis of examples
            assert many["bytes"] <= 1.1 * few["bytes"] + 1e4
        assert many["memory"] <= 1.1 * few["memory"] + 1e6
    # Two second moments of 768 dimensions, and no row.
    assert rows["statistics", 64]["largest"] == 768 * 768
    many = [row for row in stored if row["size"]["devices"] in (64, 512)]
    for name in {row["case"] for row in many}:
        few, most = (row["bytes"] for row in many if row["case"] == name)
        assert most <= 1.1 * few + 1e4


@pytest.mark.slow
def test_the_largest_run_is_compiled_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = "--meshes", 1, 64, "--json", path
    done = run_python("benchmarks/scale_plan.py", *options, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = read_rows(path)
    stored = read_rows(RESULTS / "scale-plan-cpu.jsonl")[0]
    assert row["size"] == stored["size"]
    for name in ("bytes", "state", "memory", "operations"):
        assert row[name] == pytest.approx(stored[name], rel=0.05)
