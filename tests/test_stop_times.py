"""The script that times the end of a process whose other has died."""

import re

import pytest
from processes import ROOT, run_python

BOUND = 60
"""Seconds: two heartbeats, after the first of which JAX counts a process as dead."""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["collect", "train", "lens"])
def test_a_step_stops_in_bounded_time_when_a_process_has_died(step):
    script = ROOT / "scripts" / "stop_times.py"
    env = {"PYTHONPATH": str(ROOT)}
    done = run_python(script, "--steps", step, env=env, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(rf"{step}, process (\d) killed: ([\d.]+) s", done.stdout)
    assert [victim for victim, _ in found] == ["0", "1"]
    assert all(float(seconds) < BOUND for _, seconds in found)
    longest = max(float(seconds) for _, seconds in found)
    assert f"longest: {longest:.1f} s" in done.stdout
