"""Training over two real processes; the oracle is one process on one device."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, run_python

from toyfeat.data import store_writer
from toyfeat.types import Taps

CHILD = Path(__file__).parent / "several_child.py"
LAUNCH = ROOT / "scripts" / "launch_local.py"
DIM, ROWS = 8, 210


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "store"
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(ROWS, DIM)).astype(np.float32) ** 3
    grads = rng.normal(size=(ROWS, 2, DIM)).astype(np.float32)
    weights = (rng.uniform(size=ROWS) > 0.1).astype(np.float32)
    with store_writer(folder, dim=DIM, readouts=2, rows_per_shard=40) as writer:
        writer.append(Taps(acts, grads, weights))
    return folder


def start(num, settings, *, devices=1, timeout=200, grace=20):
    """Run the child in ``num`` processes; returns its end and its report."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {"XLA_FLAGS": f"--xla_backend_optimization_level=0 {flags}"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    cache = Path(settings["store"]).parent / "programs"  # of all children of the store
    env |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = CHILD, json.dumps(settings)
    if num > 1:
        command = LAUNCH, "--grace", grace, "-n", num, sys.executable, *command
    done = run_python(*command, env=env, timeout=timeout)
    lines = [x.partition("REPORT")[2] for x in done.stdout.splitlines()]
    reports = [json.loads(line) for line in lines if line]
    assert len(reports) <= 1
    return done, reports[0] if reports else None


def assert_close(report, wanted):
    for name in ("params", "losses"):
        assert report[name].keys() == wanted[name].keys()
        for key in wanted[name]:
            got, want = report[name][key], wanted[name][key]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=key)
    assert report["key"] == wanted["key"]
    for got, want in zip(report["moments"], wanted["moments"], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def alone(store):
    done, report = start(1, {"store": str(store)})
    assert report is not None, done.stderr
    assert not report["several"]
    return report


def lines_in(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[2, 1], [1, 2]])
def test_two_processes_give_the_numbers_of_one(mesh, store, alone, tmp_path):
    settings = {"store": str(store), "mesh": mesh, "folder": str(tmp_path / "run")}
    done, report = start(2, settings)
    assert report is not None, done.stdout
    assert report["several"]
    assert_close(report, alone)
    # One process writes lines, all write checkpoints.
    assert lines_in(tmp_path / "run") == [2, 4, 6, 8, 10, 12]
    names = sorted(x.name for x in (tmp_path / "run" / "checkpoint").iterdir())
    assert names == ["step_00000008", "step_00000012"]


@pytest.mark.slow
def test_a_population_over_two_processes_is_that_of_one(store):
    settings = {"store": str(store), "members": 2, "steps": 4}
    done, wanted = start(1, settings)
    assert wanted is not None, done.stderr
    done, report = start(2, settings | {"mesh": [2, 1]})
    assert report is not None, done.stdout
    assert_close(report, wanted)


@pytest.mark.slow
def test_data_in_memory_is_drawn_alike_in_both(store):
    settings = {"store": str(store), "device": True, "steps": 4}
    done, wanted = start(1, settings)
    assert wanted is not None, done.stderr
    done, report = start(2, settings | {"mesh": [2, 1]})
    assert report is not None, done.stdout
    assert_close(report, wanted)


@pytest.mark.slow
def test_a_run_goes_on_with_other_meshes_and_numbers_of_processes(
    store, alone, tmp_path
):
    settings = {"store": str(store), "folder": str(tmp_path / "run")}
    # SIGTERM to one of two processes: both save and end with status 0.
    first = settings | {"mesh": [2, 1], "hits": {"term": [[1, 2]]}}
    done, report = start(2, first)
    assert (done.returncode, report) == (0, None), done.stdout
    names = [x.name for x in (tmp_path / "run" / "checkpoint").iterdir()]
    assert names == ["step_00000004"]
    # One process of two devices, latents split; then two again, with latents split.
    done, report = start(1, settings | {"mesh": [1, 2], "steps": 8}, devices=2)
    assert report is not None, done.stderr
    assert list(report["losses"]) == ["6", "8"]
    done, report = start(2, settings | {"mesh": [1, 2], "steps": 10})
    assert report is not None, done.stdout
    assert list(report["losses"]) == ["10"]
    # Four devices of two processes, and the end is that of an undisturbed run.
    done, report = start(2, settings | {"mesh": [2, 2]}, devices=2)
    assert report is not None, done.stdout
    wanted = alone | {"losses": {"12": alone["losses"]["12"]}}
    assert_close(report, wanted)
    assert lines_in(tmp_path / "run") == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_sigterm_in_the_last_chunk_ends_all_processes(store, tmp_path):
    settings = {"store": str(store), "folder": str(tmp_path / "run"), "mesh": [2, 1]}
    done, report = start(2, settings | {"steps": 2, "hits": {"term": [[1, 2]]}})
    assert (done.returncode, report) == (0, None), done.stdout
    names = [x.name for x in (tmp_path / "run" / "checkpoint").iterdir()]
    assert names == ["step_00000002"]


@pytest.mark.slow
def test_a_killed_process_stops_the_other_and_the_run_goes_on(store, alone, tmp_path):
    settings = {"store": str(store), "mesh": [2, 1], "folder": str(tmp_path / "run")}
    began = time.monotonic()
    done, report = start(2, settings | {"hits": {"kill": [[1, 10]]}}, grace=60)
    assert time.monotonic() - began < 90
    assert done.returncode != 0
    assert report is None
    assert "process 1 of 2 ended with SIGKILL" in done.stdout
    assert "another process has ended" in done.stdout
    # A damaged file of the newest checkpoint: the one before it is taken.
    folders = sorted((tmp_path / "run" / "checkpoint").glob("step_*"))
    assert [x.name for x in folders] == ["step_00000004", "step_00000008"]
    victim = max((x for x in folders[1].rglob("*") if x.is_file()), key=size_of)
    flip(victim)
    done, report = start(2, settings)
    assert report is not None, done.stdout
    assert "does not have the SHA-256" in done.stdout
    warned = [x for x in done.stdout.splitlines() if "going back to step 4" in x]
    assert len(warned) == 1  # of process 0
    assert warned[0].startswith("[0]")
    assert list(report["losses"]) == ["6", "8", "10", "12"]
    losses = {step: alone["losses"][step] for step in report["losses"]}
    assert_close(report, alone | {"losses": losses})


def size_of(path):
    return path.stat().st_size


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": {"steps": 14}}, "same steps, got 12 in process 0 and 14 in"),
        ({"second": {"warm_up": 9}}, "same hyper-parameters"),
        ({"batch": 25}, "2 devices of the axis 'data' must divide the batch, got 25"),
        ({"local": True}, "must be arrays of all processes, as the state is"),
        ({"device": True, "second": {"seed": 2}}, "must be the same in all processes"),
    ],
)
def test_work_that_does_not_fit_is_named_before_it_begins(
    changes, message, store, tmp_path
):
    settings = {"store": str(store), "mesh": [2, 1], "folder": str(tmp_path / "run")}
    done, report = start(2, settings | changes)
    assert done.returncode == 1
    assert report is None
    assert message in done.stdout
    assert not (tmp_path / "run" / "checkpoint").exists()
