"""The table of what a split dictionary exchanges, and its benchmark."""

import json

import pytest
from processes import ROOT, run_python

ROWS = ROOT / "benchmarks" / "results" / "split-latents-cpu.jsonl"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import split_latents

    return split_latents


def test_the_table_of_the_page_is_that_of_the_rows(benchmark):
    page = (ROOT / "docs" / "scale.md").read_text()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert benchmark.describe(row) in page


@pytest.mark.slow
def test_what_a_step_exchanges_does_not_grow_with_the_latents(tmp_path):
    steps = {}
    for latents in (512, 1024):
        path = tmp_path / f"{latents}.jsonl"
        options = "--tiny", "--latents", latents, "--json", path
        done = run_python("benchmarks/split_latents.py", *options, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        for row in map(json.loads, path.read_text().splitlines()):
            size = row["size"]
            mesh = size["data"], size["latents_axis"]
            steps[row["case"], row["method"], *mesh, latents] = row["step"]["bytes"]
    # Scores, counts and reconstructions; what is of a latent stays on its device.
    assert steps["topk", "split", 1, 1, 512] == 0
    for case in ("topk", "batch_topk"):
        sizes = [steps[case, "split", 1, 8, latents] for latents in (512, 1024)]
        assert sizes[0] == sizes[1] > 0
    # Without a mesh the codes of the batch, of 64 examples, are gathered.
    growth = {
        method: steps["topk", method, 8, 1, 1024] - steps["topk", method, 8, 1, 512]
        for method in ("plain", "split")
    }
    assert growth["plain"] - growth["split"] >= 64 * 512 * 4
