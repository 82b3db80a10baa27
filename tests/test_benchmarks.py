import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


LIMITS = {"tap.py": 1e-5, "controllers.py": 1.0}  # of errors; others 1e-2


def test_the_leaderboard_runs_every_method_and_goes_on(tmp_path):
    command = [sys.executable, "benchmarks/leaderboard.py", "--tiny", "--seeds", "2"]
    command += ["--out", str(tmp_path)]
    few = [*command, "--methods", "random,TopK"]
    outputs = []
    for arguments in (few, command, command):
        if outputs:  # as a kill would leave it
            with (tmp_path / "rows.jsonl").open("a") as file:
                file.write('{"case": "product sp')
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    methods = 18 if importlib.util.find_spec("sklearn") else 16
    assert outputs[0].count("seed 0") == 2
    assert outputs[1].count("seed 0") == methods - 2  # those two not again
    assert "seed" not in outputs[2].replace("seeds", "")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({(row["method"], row["seed"]) for row in rows}) == len(rows)
    assert {"consensus", "oracle", "LIB", "four-term loss"} <= {
        r["method"] for r in rows
    }
    assert all(0 <= row["readers"] <= 1 and row["seconds"] > 0 for row in rows)
    assert (tmp_path / "leaderboard.html").stat().st_size > 20_000


def test_brittleness_is_swept_once_and_drawn(tmp_path):
    path = tmp_path / "shares.jsonl"
    command = [sys.executable, "benchmarks/brittleness.py", "--tiny", "--out"]
    command += [str(tmp_path / "out"), "--json", str(path)]
    texts = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        texts.append(path.read_text())
    assert texts[0] == texts[1]  # kept, not swept again
    rows = [json.loads(line) for line in texts[0].splitlines()]
    methods = [row["method"] for row in rows]
    assert methods == ["published", "robust", "consensus"]
    assert [row["size"]["runs"] for row in rows] == [8, 8, 4]
    assert all(0 <= row["b"] <= row["a"] <= 1 for row in rows[1:])
    assert all(0 < row["best"] <= 1 and row["target"] == 2 for row in rows)
    assert (tmp_path / "out" / "product-space.png").stat().st_size > 5000
    assert (tmp_path / "out" / "brittleness.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    "name",
    [
        "tap.py",
        "linalg.py",
        "world.py",
        "synthetic.py",
        "controllers.py",
        "dictionary.py",
    ],
)
def test_a_benchmark_runs_at_its_tiny_setting(name, tmp_path):
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}", "--tiny", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    for row in rows:
        error = row["error"]  # nothing to compare with, or products alone: none
        assert error is None or not error > LIMITS.get(name, 1e-2)
        assert row["ours_s"] > 0
        assert {"case", "size", "method", "ratio", "device", "versions"} <= set(row)
