"""Measure how long one of two processes runs on after the other has died.

    python scripts/stop_times.py

Starts a step of a tiny job in two processes on the devices of the CPU, kills one of
them (SIGKILL) in the middle of it, and times the end of the other: collecting, training
and the fit of a lens, each with either process as the victim.  No launcher helps: the
other notices by itself.  Prints a line for each, and the longest at the end; some
minutes on two busy cores.
"""

import argparse
import tempfile
from pathlib import Path

from _killed_job import BEGUN, collect, kill_one
from _soak_job import write_job, write_model

# So many gradients that a process collects for more than a heartbeat.
_DRAWS = ('readout = "sampled"', 'readout = "sampled"\ndraws = 200')
_LENS = """[lens]
prompts = 1800
batch = 2
checkpoint_every = 20
skip_first = 2
"""


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


if __name__ == "__main__":
    main()
