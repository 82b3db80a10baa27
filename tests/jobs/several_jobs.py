"""Jobs of tests that run in one process or several: files, children and folders."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

from processes import ROOT, run_python

LAUNCH = ROOT / "scripts" / "launch_local.py"
SITE = "blocks_1/resid_post"
STORE = "stores/blocks_1-resid_post"
BOUND = 60
"""Seconds in which a process ends when another has died: two heartbeats of JAX."""

# Job and folder to run it in, of each process, in its turn; the second has a prelude.
_EACH_ITS_OWN = """
import os, sys
index = int(os.environ.get("JAX_PROCESS_ID", 0))
prelude, command, *places = sys.argv[1:]
if index == 1:
    exec(prelude)
from toyfeat.cli.main import main
job, folder = places[2 * index : 2 * index + 2]
os.chdir(folder)
main([command, job])
"""


def write_job(folder, out, **changes):
    """Write a job file; returns it."""
    collect = {"sites": [SITE], "readout": "sampled", "draws": 2, "tokens": 512}
    collect |= {"held_out": 64, "length": 16, "batch": 4, "rows_per_shard": 100}
    collect |= {"every": 3}
    train = {"kinds": ["acts", "gradients"], "ks": [2], "latents": 24, "steps": 6}
    train |= {"batch": 64, "seeds": [0, 1]}
    lens = {"prompts": 7, "batch": 2, "skip_first": 2}
    lines = [f"model = {json.dumps(str(changes.get('model', folder)))}"]
    lines += [f"text = {json.dumps(str(changes.get('text', folder / 'texts')))}"]
    lines += [f"out = {json.dumps(str(out))}"]
    if "source" in changes:
        lines += [f"source = {json.dumps(changes['source'])}"]
    tables = {"collect": collect, "train": train, "lens": lens, "read": {}}
    for name, table in tables.items():
        lines += [f"[{name}]"]
        table = table | changes.get(name, {})
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    path = out.with_suffix(changes.get("suffix", ".toml"))
    path.write_text("\n".join(lines))
    return path


def environment(folder, devices=1):
    """Variables of every child; programs are compiled once for all of them."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 {flags}",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(
    num,
    folder,
    command,
    *jobs,
    timeout=240,
    grace=40,
    devices=1,
    places=None,
    prelude="",
):
    """Run a command in ``num`` processes, each with its job if there are several.

    ``places`` are the folders that they run in, ``prelude`` what the second runs first.
    """
    if len(jobs) == 1 and places is None and not prelude:
        rest = ["-m", "toyfeat.cli.main", command, str(jobs[0])]
    else:
        jobs = jobs if len(jobs) == num else num * jobs
        places = num * [ROOT] if places is None else places
        pairs = [str(x) for pair in zip(jobs, places, strict=True) for x in pair]
        rest = ["-c", _EACH_ITS_OWN, prelude, command, *pairs]
    if num > 1:
        rest = [LAUNCH, "--grace", grace, "-n", num, sys.executable, *rest]
    return run_python(*rest, env=environment(folder, devices), timeout=timeout)


def run_and_kill(victim, folder, command, job, is_time, logs, *, patience=180):
    """Run a command in two processes, without the launcher, and kill one of them.

    It is killed as soon as ``is_time()``.  Returns the status of the other, and the
    seconds that it ran on.
    """
    address = f"127.0.0.1:{free_port()}"
    children = []
    for index in range(2):
        own = {"JAX_COORDINATOR_ADDRESS": address}
        own |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        own |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        with logs[index].open("w") as log:
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "toyfeat.cli.main", command, str(job)],
                    env=os.environ | environment(folder) | own,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        end = time.monotonic() + patience
        while not is_time():
            assert time.monotonic() < end, logs[victim].read_text()
            assert children[victim].poll() is None, logs[victim].read_text()
            time.sleep(0.01)
        children[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        status = children[1 - victim].wait(timeout=120)
        return status, time.monotonic() - began
    finally:
        for child in children:
            child.kill()
            child.wait(timeout=10)


def content(folder):
    """Record and shards of a store, bit by bit."""
    names = sorted(path.name for path in folder.iterdir())
    return {name: (folder / name).read_bytes() for name in names}


def free_port():
    """Find a port that nobody listens on."""
    return runpy.run_path(str(LAUNCH), run_name="not_main")["free_port"]()
