import runpy

import pytest
from processes import ROOT, run_in_turn

# Scripts that import ``examples``, which is not installed.
STUDIES = ("demo", "modular", "modular_lib", "squaring_dictionaries", "sweep")
STUDIES += ("synth_sae_bench",)


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("[!_]*.py"):
        code = [x for x in path.read_text().splitlines() if x.strip()]
        assert len(code) < 90, path
        assert "main" in runpy.run_path(str(path), run_name="not_main")


@pytest.mark.slow
def test_scripts_find_the_examples_from_any_folder(tmp_path):
    commands = [(f"scripts/{name}.py", "--help") for name in STUDIES]
    ends = run_in_turn(commands, cwd=tmp_path, env={"COLUMNS": "80"})
    for name, (status, output) in zip(STUDIES, ends, strict=True):
        assert status == 0, (name, output)
        assert "usage" in output, name
