"""Two processes of a step of a job, of which one is killed, for ``stop_times.py``."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch_local import free_port

# Files of which a step has some when it is in the middle of its work, and how many.
BEGUN = {
    "collect": ("stores/*/shard*", 4),
    "train": ("train/*/metrics.jsonl", 1),
    "lens": ("lens/step_*", 1),
}
_LIMIT = 300.0  # seconds for a step to begin, and for a process to end
_SAID = "another process has ended", "another task died"  # ours, JAX's


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


def wait(
    is_time: Callable[[], bool], children: list[subprocess.Popen], logs: list[Path]
) -> None:
    """Wait until a step is in the middle of its work."""
    end = time.monotonic() + _LIMIT
    while not is_time():
        time.sleep(0.02)
        ended = [i for i in range(2) if children[i].poll() is not None]
        if ended or time.monotonic() > end:
            said = logs[ended[0] if ended else 0].read_text(errors="replace")
            sys.exit(f"the step did not begin:\n{said}")
