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
    bytes_of, plain = {}, {}
    for latents in (512, 1024):
        path = tmp_path / f"{latents}.jsonl"
        options = "--tiny", "--latents", latents, "--json", path
        done = run_python("benchmarks/split_latents.py", *options, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        for line in path.read_text().splitlines():
            row = json.loads(line)
            where = bytes_of if row["method"] == "split" else plain
            size = row["size"]
            key = row["case"], size["latents_axis"], latents
            if where is bytes_of and size["data"] > 1:
                key = *key, size["data"]
            where[key] = row["step"]["bytes"]
    assert bytes_of["topk", 1, 512] == 0
    for case in ("topk", "batch_topk"):
        # Scores, counts and reconstructions; what is of a latent stays on its device.
        assert bytes_of[case, 8, 512] == bytes_of[case, 8, 1024] > 0
    # The codes of the batch, 64 examples of 4 bytes each, are gathered without a mesh.
    gathered = plain["topk", 1, 1024] - plain["topk", 1, 512]
    trained = bytes_of["topk", 1, 1024, 8] - bytes_of["topk", 1, 512, 8]
    assert gathered - trained >= 64 * 512 * 4
