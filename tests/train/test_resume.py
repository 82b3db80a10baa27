"""Processes that are killed, and what the next one makes of what they leave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_trainer import Stream, bits, on_device, tiny

from toyfeat.checkpoint import checkpoints
from toyfeat.train import fit

TINY = tiny()
START = TINY.init(jax.random.key(0))
SIZES = {"chunk": 4, "checkpoint_every": 2, "progress": False}

# Imports once, then forks for every run, before a device is touched.  A run kills
# itself where it is told to; all of this is the test's own.
CHILD = """
import json, os, signal, sys, threading, time, traceback, warnings
import jax
import numpy as np
sys.path.insert(0, {here!r})
from tiny_trainer import Stream, on_device, tiny
from toyfeat.checkpoint import checkpoints
from toyfeat.train import fit
from pathlib import Path

def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(0 if number == signal.SIGTERM else 60)

def run(kind, where, at, folder, steps, sizes):
    seen = [0]

    def at_call(fn, after=False):
        def wrapped(*args, **kwargs):
            seen[0] += 1
            if seen[0] == at and not after:
                die()
            result = fn(*args, **kwargs)
            if seen[0] == at and after:
                die()
            return result
        return wrapped

    if where == "write":
        np.lib.format.write_array = at_call(np.lib.format.write_array)
    if where == "sync":
        os.fsync = at_call(os.fsync)
    if where in ("replace", "replaced"):
        os.replace = at_call(os.replace, after=where == "replaced")

    def at_step(step):
        if where in ("step", "term") and step == at:
            die(signal.SIGTERM if where == "term" else signal.SIGKILL)

    def on_chunk(step, metrics):
        if where == "time" and not seen[0]:
            seen[0] = 1
            threading.Timer(at, die).start()

    trainer = tiny()
    state = trainer.init(jax.random.key(0))
    batches = on_device() if kind == "device" else Stream(at_step)
    fit(trainer, state, batches, steps=steps, directory=folder, on_chunk=on_chunk,
        **sizes)

def forked(*arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork")
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        run(*arguments)
        code = 7
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    os._exit(code)

kind, places, folder, steps, sizes = json.loads(sys.argv[1])
if len(places) == 1:
    run(kind, *places[0], folder, steps, sizes)
    sys.exit(7)
ends = []
for where, at in places:
    code = forked(kind, where, at, folder, steps, sizes)
    found = [step for step, _ in checkpoints(Path(folder) / "checkpoint")]
    ends.append((where, at, code, found))
print(json.dumps(ends))
"""


def started(kind, places, folder, steps, sizes):
    code = CHILD.format(here=str(Path(__file__).parent))
    arguments = json.dumps([kind, places, str(folder), steps, sizes])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def ends_of(*arguments):
    """Place, status and checkpoints after each of several runs in one folder."""
    child = started(*arguments)
    out, err = child.communicate(timeout=200)
    assert (child.returncode, err) == (0, "")
    return [tuple(end) for end in json.loads(out)]


def rows(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_times(lines):
    times = ("seconds", "examples_per_s")
    return [{k: v for k, v in row.items() if k not in times} for row in lines]


@pytest.fixture
def whole(tmp_path_factory):
    """A run that was not cut off."""
    folder = tmp_path_factory.mktemp("whole")
    state = fit(TINY, START, Stream(), steps=42, directory=folder, **SIZES)
    return bits(state), without_times(rows(folder))


@pytest.mark.slow
def test_killed_again_and_again_in_every_place(tmp_path, whole):
    leaves = len(jax.tree.leaves(START))
    wanted = [
        ("step", 6, -9, []),  # the first chunk is at work, the second being fetched
        ("write", leaves + 3, -9, [8]),  # in the second checkpoint
        ("replaced", 2, -9, [8, 16]),  # the lines first; 16 is there, just renamed
        ("sync", 1, -9, [8, 16]),  # 24 is written but not flushed
        ("replace", 2, -9, [8, 16]),  # the lines first; 24 is flushed, not renamed
        ("step", 35, -9, [16, 24]),
        ("term", 37, 0, [32, 36]),  # while 32 to 36 is at work
    ]
    places = [end[:2] for end in wanted]
    assert ends_of("host", places, tmp_path, 42, SIZES) == wanted
    last = fit(TINY, START, Stream(), steps=42, directory=tmp_path, **SIZES)
    assert bits(last) == whole[0]
    assert without_times(rows(tmp_path)) == whole[1]
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["step_00000040.npz", "step_00000042.npz"]


def finished(folder, sizes):
    """Go on for a little in this process; what a run without a break would give."""
    end = checkpoints(folder / "checkpoint")[-1][0] + 6
    again = fit(TINY, START, on_device(), steps=end, directory=folder, **sizes)
    assert bits(again) == bits(fit(TINY, START, on_device(), steps=end, **sizes))
    assert [row["step"] for row in rows(folder)] == [*range(4, end, 4), end]


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    delays = np.random.default_rng(seed).uniform(0, 0.4, 4)
    print("seed", seed, delays)
    sizes = {**SIZES, "checkpoint_every": 1}
    places = [("time", delay) for delay in delays]
    ends = ends_of("device", places, tmp_path, 100_000, sizes)
    assert [end[2] for end in ends] == [-9] * len(places)
    finished(tmp_path, sizes)


@pytest.mark.slow
def test_sigterm_from_outside_ends_a_process_with_status_0(tmp_path):
    child = started("device", [("nowhere", 0)], tmp_path, 100_000, SIZES)
    while not (tmp_path / "checkpoint").exists() and child.poll() is None:
        time.sleep(0.02)
    child.terminate()
    assert child.communicate(timeout=60) == ("", "")
    assert child.returncode == 0
    finished(tmp_path, SIZES)
    done = fit(TINY, START, on_device(), steps=42, directory=tmp_path / "b", **SIZES)
    never = dict.__getitem__  # the run is finished: no batch is asked for
    again = fit(TINY, START, never, steps=42, directory=tmp_path / "b", **SIZES)
    assert bits(again) == bits(done)
