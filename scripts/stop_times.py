"""Measure how long one of two processes runs on after the other has died.

    python scripts/stop_times.py

Starts a step of a tiny job in two processes on the devices of the CPU, kills one of
them (SIGKILL) in the middle of it, and times the end of the other: collecting, training
and the fit of a lens, each with either process as the victim.  No launcher helps: the
other notices by itself.  Prints a line for each, and the longest at the end; some
minutes on two busy cores.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _soak_job import write_job, write_model
from launch_local import free_port

# Files of which a step has some when it is in the middle of its work, and how many.
BEGUN = {
    "collect": ("stores/*/shard*", 4),
    "train": ("train/*/metrics.jsonl", 1),
    "lens": ("lens/step_*", 1),
}
# So many gradients that a process collects for more than a heartbeat.
_DRAWS = ('readout = "sampled"', 'readout = "sampled"\ndraws = 200')
_LENS = """[lens]
prompts = 1800
batch = 2
every = 20
skip_first = 2
"""
_LIMIT = 300.0  # seconds for a step to begin, and for a process to end
_SAID = "another process has ended", "another task died"  # ours, JAX's


def main(arguments: list[str] | None = None) -> None:
    """Kill either process of every step, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", choices=BEGUN, default=list(BEGUN))
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args(arguments)
    longest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for number in range(args.repeats):
            for step in args.steps:
                for victim in range(2):
                    out = folder / f"{step} {victim} {number}"
                    job = write_job(folder / "model", out, 30_000, 1_000_000)
                    text = job.read_text() + _LENS
                    if step == "collect":
                        text = text.replace(*_DRAWS)
                    job.write_text(text)
                    if step == "train":
                        collect(job)
                    seconds = kill_one(step, job, out, victim)
                    longest = max(longest, seconds)
                    print(
                        f"{step}, process {victim} killed: {seconds:.1f} s", flush=True
                    )
    print(f"longest: {longest:.1f} s")


def environment(job: Path) -> dict[str, str]:
    """Variables of the processes; programs are compiled once for all jobs."""
    env = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    return env | {"TOYFEAT_CACHE": str(job.parent)}


def collect(job: Path) -> None:
    """Collect the store of a job, in one process."""
    command = [sys.executable, "-m", "toyfeat.cli.main", "collect", str(job)]
    env, limit = environment(job), 2 * _LIMIT
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=limit)


def kill_one(step: str, job: Path, out: Path, victim: int) -> float:
    """Start a step in two processes, kill one, and wait for the other.

    Returns:
      Seconds from the kill to the end of the other.
    """
    env = environment(job) | {"JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, "-m", "toyfeat.cli.main", step, str(job)]
    logs = [job.with_suffix(f".{step}.{i}.log") for i in range(2)]
    children = []
    try:
        for i in range(2):
            own = env | {"JAX_PROCESS_ID": str(i)}
            with logs[i].open("wb") as log:
                children.append(
                    subprocess.Popen(command, env=own, stdout=log, stderr=log)
                )
        pattern, num = BEGUN[step]
        wait(lambda: len([*out.glob(pattern)]) >= num, children, logs)
        children[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        status = children[1 - victim].wait(timeout=_LIMIT)
        seconds = time.monotonic() - began
    finally:
        for child in children:
            child.kill()
            child.wait()
    said = logs[1 - victim].read_text(errors="replace")
    if not status or not any(words in said for words in _SAID):
        sys.exit(f"{step}: the other process ended with {status} and said:\n{said}")
    return seconds


def wait(is_time, children: list[subprocess.Popen], logs: list[Path]) -> None:
    """Wait until a step is in the middle of its work."""
    end = time.monotonic() + _LIMIT
    while not is_time():
        time.sleep(0.02)
        ended = [i for i in range(2) if children[i].poll() is not None]
        if ended or time.monotonic() > end:
            said = logs[ended[0] if ended else 0].read_text(errors="replace")
            sys.exit(f"the step did not begin:\n{said}")


if __name__ == "__main__":
    main()
