"""Everything that takes batches gives the numbers of one device on any mesh.

The oracle of every number is one device; meshes have eight virtual devices, or those of
two real processes, and axes of both types.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, run_python

CHILD = Path(__file__).parent / "mesh_child.py"
LAUNCH = ROOT / "scripts" / "launch_local.py"
CASES = [
    "tap",
    "compiled_tap",
    "moments",
    "bases",
    "interaction",
    "singular_values",
    "many_rows",
    "lenses",
    "lens_in_parts",
    "lens_goes_on",
    "parts_of_weights",
    "dictionary",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Function that runs the child and returns what it wrote, by layout."""
    programs = tmp_path_factory.mktemp("programs")

    def run_child(layouts, *, devices=1, num=1):
        folder = tmp_path_factory.mktemp("mesh")
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        env |= {"JAX_COMPILATION_CACHE_DIR": str(programs)}
        command = CHILD, layouts, folder
        if num > 1:
            command = LAUNCH, "-n", num, sys.executable, *command
        done = run_python(*command, env=env, timeout=500)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return {x.stem: json.loads(x.read_text()) for x in folder.glob("*.json")}

    return run_child


@pytest.fixture(scope="module")
def one(run):
    return run("one")["one"]


@pytest.fixture(scope="module")
def eight(run):
    return run("auto,explicit", devices=8)


@pytest.fixture(scope="module")
def two(run):
    return run("auto", num=2)["auto"]


def assert_same(results, wanted):
    assert len(results) == len(wanted) > 0
    for result, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["auto", "explicit"])
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_give_the_numbers_of_one(case, layout, one, eight):
    assert set(one) == set(CASES)
    assert_same(eight[layout][case], one[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_numbers_of_one(case, one, two):
    assert_same(two[case], one[case])
