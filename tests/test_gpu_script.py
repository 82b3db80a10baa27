"""The script that measures one GPU, with parts that take no time."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parents[1]

# Stands for Python: writes the rows, fails for one part and sleeps for another.
FAKE = """#!{python}
import pathlib, sys, time
if "populations" in sys.argv:
    sys.exit("no such thing")
if sys.argv[1].endswith("tap.py"):
    time.sleep(60)
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(" ".join(sys.argv[1:]))
"""


def run_script(tmp_path, *arguments, limits=None):
    fake = tmp_path / "fake"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    script = (ROOT / "benchmarks" / "run_gpu.sh").read_text()
    for name, limit in (limits or {}).items():
        script = re.sub(rf"part {name} \d+ ", f"part {name} {limit} ", script)
    copy = tmp_path / "benchmarks" / "run_gpu.sh"
    copy.parent.mkdir()
    copy.write_text(script)
    return subprocess.run(
        ["bash", copy, *arguments],
        env=os.environ | {"PYTHON": str(fake)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path):
    folder = tmp_path / "rows"
    done = run_script(tmp_path, "--tiny", folder, limits={"tap": 1})
    assert done.returncode == 1
    failed = done.stdout.split("failed or missed a bar")[1]
    assert f"populations (1, see {folder}/populations.log)" in failed
    assert "tap (124" in failed  # out of time
    assert "linalg (" not in failed
    names = sorted(path.stem for path in folder.glob("*.jsonl"))
    others = ["svd", "ways", "partition", "world", "collect"]
    assert names == sorted(["cached", "lens", "linalg", "precision", *others])
    command = (folder / "lens.jsonl").read_text()
    assert command == f"benchmarks/lens.py --tiny --json {folder}/lens.jsonl"
    assert "no such thing" in (folder / "populations.log").read_text()


def test_all_parts_together_take_less_than_ten_minutes():
    lines = (ROOT / "benchmarks" / "run_gpu.sh").read_text().splitlines()
    limits = [int(line.split()[2]) for line in lines if line.startswith("part ")]
    assert len(limits) >= 11
    assert sum(limits) <= 600


@pytest.mark.slow
def test_speeds_are_measured_at_the_tiny_setting(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = run_python("benchmarks/accelerator.py", "--tiny", "--json", path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cases = [row["case"] for row in rows]
    assert [cases.count(case) for case in dict.fromkeys(cases)] == [3, 2, 2, 2]
    gathered, dense = (row["sum"] for row in rows if row["case"] == "ways")
    assert gathered == pytest.approx(dense, rel=1e-4)
    for row in rows:
        assert "unsupported" in row or row["step_s"] > 0
    assert 0 < rows[0]["share_of_peak"] < 1.5  # float32 is there on every device
    assert rows[-2]["gain"] == 1.0  # one member, against itself
    assert run_python("benchmarks/accelerator.py", "--only", "no").returncode == 1
