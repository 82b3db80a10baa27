"""Mutated files of every format load, or end in an error that names them."""

import json

import pytest
from processes import run_python

MUTATIONS = 300


@pytest.mark.slow
def test_no_damaged_file_crashes_hangs_or_fills_the_memory(tmp_path):
    for name in ("gguf", "tokenizers", "safetensors", "tyro", "rich"):
        pytest.importorskip(name)
    # In a process of its own: it forks, which this one, where JAX runs, must not.
    out = tmp_path / "out"
    options = "--mutations", MUTATIONS, "--seed", 11, "--out", out
    done = run_python("scripts/fuzz.py", *options, timeout=1800)
    faults = out / "faults.jsonl"
    report = faults.read_text() if faults.exists() else done.stderr
    counts = json.loads((out / "counts.json").read_text())
    assert len(counts) == 9
    for name, row in counts.items():
        ends = [row[key] for key in ("crashes", "hangs", "memory")]
        assert ends == [0, 0, 0], (name, report)
        assert row["unnamed errors"] <= 0.005 * MUTATIONS, (name, report)
        assert row["loaded"] > 0 < row["named errors"]
    assert done.returncode == 0, report
