import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Scripts that import ``examples``, which is not installed.
STUDIES = ("demo", "modular", "modular_lib", "squaring_dictionaries", "sweep")
STUDIES += ("synth_sae_bench",)


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("[!_]*.py"):
        code = [x for x in path.read_text().splitlines() if x.strip()]
        assert len(code) < 90, path
        assert "main" in runpy.run_path(str(path), run_name="not_main")


@pytest.mark.parametrize("name", STUDIES)
def test_a_script_finds_the_examples_from_any_folder(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
