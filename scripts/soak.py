"""Hit a job of two processes at random moments; it must end as if nothing had been.

    python scripts/soak.py --hits 10

The job collects a store and trains two dictionaries on it, at tiny sizes.  In turn one
of its processes gets SIGKILL, or both get SIGTERM; then the same command starts again.
Prints a line for every hit, and at the end how many there were, the largest difference
of a parameter to an undisturbed run and the longest time that the processes took to
stop.  Two to three minutes for each hit on two busy cores.
"""

import argparse
import random
import tempfile
from pathlib import Path

from _soak_job import difference, is_finished, run, write_job, write_model


def main(arguments: list[str] | None = None) -> None:
    """Run the job undisturbed, then with hits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hits", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=200, help="of each dictionary")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), args)


def soak(folder: Path, args: argparse.Namespace) -> None:
    """Hit runs of the job until there were enough hits; compare those that end."""
    write_model(folder / "model")
    moments = random.Random(args.seed)

    def new_job(name: str) -> tuple[Path, Path]:
        out = folder / name
        return out, write_job(folder / "model", out, args.tokens, args.steps)

    whole, job = new_job("undisturbed")
    seconds, _ = run(job)
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    hits, runs, largest, slowest = 0, 0, 0.0, 0.0
    while hits < args.hits:
        out, job = new_job(f"run {runs}")
        while not is_finished(out):
            moment = moments.uniform(2, seconds) if hits < args.hits else None
            both = hits % 2 == 1
            took, hit = run(job, moment, victims=[0, 1] if both else [hits // 2 % 2])
            if hit:
                hits, slowest = hits + 1, max(slowest, took)
                name = "SIGTERM to both" if both else "SIGKILL to one"
                line = f"hit {hits}: {name} after {moment:.1f} s"
                print(f"{line}, all had stopped {took:.1f} s later", flush=True)
        runs += 1
        largest = max(largest, difference(out, whole))
    print(
        f"{hits} hits in {runs} runs: stores identical, largest difference of a "
        f"parameter {largest:.2g}, slowest stop {slowest:.1f} s"
    )


if __name__ == "__main__":
    main()
