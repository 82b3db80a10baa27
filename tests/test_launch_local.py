"""The launcher and the runtime, with two real processes."""

import os
import runpy
import subprocess
import sys
import time

import pytest
from processes import ROOT, run_python

from toyfeat import processes

LAUNCH = ROOT / "scripts" / "launch_local.py"

# Joins, and compares, gathers and fails as it is told.
_CHILD = """
import os, signal, sys, time
from toyfeat import processes
task = sys.argv[1]
assert processes.join_processes(heartbeat=10, timeout=60)
index = processes.process_index()
print("joined", index, "of", processes.num_processes())
if task == "gather":
    print(processes.gather({"index": index, "text": "é" * 100 * index}))
    for values in ({"job": 3}, {"job": 3, "version": index}):
        try:
            processes.check_same("child", values, "start both alike")
            print("same")
        except ValueError as error:
            print("refused:", error)
    try:
        with processes.together("child"):
            assert index == 0, "only one"
        print("not failed")
    except (RuntimeError, AssertionError) as error:
        print("failed:", type(error).__name__, error)
if task == "raise":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what the launcher sends
    processes.gather(0)
    if index == 1:
        raise KeyError("mine")
    processes.gather(0)
if task == "sleep":
    print("ready")
    time.sleep(100)
"""


def launch(*arguments, timeout=120):
    return run_python(LAUNCH, *arguments, timeout=timeout)


def lines_of(done, index):
    head = f"[{index}] "
    lines = done.stdout.splitlines()
    return [line.removeprefix(head) for line in lines if line.startswith(head)]


def test_output_status_and_variables_of_every_process():
    code = (
        "import os, sys; e = os.environ; print(e['JAX_PROCESS_ID'], "
        "e['JAX_NUM_PROCESSES'], e['JAX_COORDINATOR_ADDRESS'])"
    )
    done = launch("-n", 3, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    printed = [lines_of(done, i)[0].split() for i in range(3)]
    assert [row[:2] for row in printed] == [["0", "3"], ["1", "3"], ["2", "3"]]
    assert len({row[2] for row in printed}) == 1


def test_one_that_fails_stops_the_others_in_bounded_time():
    code = (
        "import os, signal, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(100)"
    )
    began = time.monotonic()
    done = launch("--grace", 1, "-n", 2, sys.executable, "-c", code)
    assert done.returncode == 7
    assert "process 1 of 2 ended with status 7" in done.stdout
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", 0, "python"), "-n of at least 1"),
        (("-n", 2), "a command"),
        (("-n", 2, "no-such-command"), "no command 'no-such-command'"),
    ],
)
@pytest.mark.slow_cases
def test_a_launch_that_cannot_be_is_refused(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_processes_exchange_compare_and_fail_together():
    done = launch("-n", 2, sys.executable, "-c", _CHILD, "gather")
    assert done.returncode == 0, done.stdout
    for index in range(2):
        lines = lines_of(done, index)
        assert f"joined {index} of 2" in lines
        assert str([{"index": i, "text": "é" * 100 * i} for i in range(2)]) in lines
        assert "same" in lines
        refused = next(x for x in lines if x.startswith("refused: "))
        assert "same version, got 0 in process 0 and 1 in process 1" in refused
        failed = next(x for x in lines if x.startswith("failed: "))
        assert "only one" in failed
        assert ("process 1 of 2 failed" in failed) == (index == 0)


@pytest.mark.slow
def test_an_exception_of_one_ends_the_other_with_a_message():
    began = time.monotonic()
    done = launch("--grace", 60, "-n", 2, sys.executable, "-c", _CHILD, "raise")
    assert done.returncode == 1
    assert time.monotonic() - began < 60
    assert any("KeyError: 'mine'" in line for line in lines_of(done, 1))
    said = [x for x in lines_of(done, 0) if "another process has ended" in x]
    assert said, done.stdout


@pytest.mark.slow
def test_a_killed_process_ends_another_that_waits_for_nothing(tmp_path):
    """No launcher: JAX's heartbeats alone."""
    port = launch_port()
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    children = []
    for index in range(2):
        own = env | {"JAX_PROCESS_ID": str(index), "JAX_PLATFORMS": "cpu"}
        with (tmp_path / str(index)).open("w") as log:
            children.append(start_child("sleep", own, log))
    try:
        wait_for(lambda: all("ready" in read(tmp_path, i) for i in range(2)), 60)
        children[1].kill()
        began = time.monotonic()
        assert children[0].wait(timeout=60) != 0
        assert time.monotonic() - began < 45
        assert "unhealthy (stopped sending heartbeats)" in read(tmp_path, 0)
    finally:
        for child in children:
            child.kill()
            child.wait(timeout=10)


def launch_port():
    return runpy.run_path(str(LAUNCH), run_name="not_main")["free_port"]()


def start_child(task, env, log):
    return subprocess.Popen(
        [sys.executable, "-u", "-c", _CHILD, task],
        env=os.environ | env,
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def read(folder, index):
    return (folder / str(index)).read_text(errors="replace")


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"NUM": "two"}, "JAX_NUM_PROCESSES must be a number, got 'two'"),
        ({"NUM": "2"}, "JAX_PROCESS_ID must be a number, got None"),
        ({"INDEX": "0"}, "JAX_NUM_PROCESSES must be a number, got None"),
        ({"NUM": "2", "INDEX": "2"}, "0 .. JAX_NUM_PROCESSES - 1, got 2 of 2"),
        ({"NUM": "2", "INDEX": "1"}, "must be host:port of process 0, got None"),
    ],
)
def test_variables_that_do_not_fit_are_named(values, message, monkeypatch):
    set_variables(monkeypatch, **values)
    with pytest.raises(ValueError, match=message):
        processes.join_processes()


def set_variables(monkeypatch, **values):
    names = {"ADDRESS": processes.ADDRESS}
    names |= {"NUM": processes.NUM, "INDEX": processes.INDEX}
    for short, name in names.items():
        monkeypatch.delenv(name, raising=False)
        if short in values:
            monkeypatch.setenv(name, values[short])


SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("env", "joined"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "4"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_NTASKS": "4", "JAX_NUM_PROCESSES": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_a_cluster_is_joined_and_nothing_else(env, joined, monkeypatch):
    set_variables(monkeypatch)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if "JAX_NUM_PROCESSES" in env:
        monkeypatch.setenv(processes.INDEX, "0")
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **x: calls.append(x))
    monkeypatch.setattr(processes, "_has_backends", lambda: False)
    before = processes.jax.config.jax_enable_preemption_service
    try:
        processes.join_processes()
    finally:
        processes.jax.config.update("jax_enable_preemption_service", before)
    assert bool(calls) == joined
    if joined:  # JAX finds the rest itself
        assert "process_id" not in calls[0]


def test_a_process_that_has_used_a_device_cannot_join(monkeypatch):
    set_variables(monkeypatch)
    for name, value in (SLURM | {"SLURM_NTASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    processes.jax.numpy.zeros(())
    with pytest.raises(RuntimeError, match=r"call join_processes\(\) first of all"):
        processes.join_processes()


def test_one_process_waits_for_nothing():
    assert processes.gather({"a": 1}) == [{"a": 1}]
    processes.check_same("test", {"a": 1}, "mend it")
    with pytest.raises(KeyError, match="mine"), processes.together("test"):
        raise KeyError("mine")
    with pytest.raises(SystemExit, match="over"):
        processes.leave("over")
