"""Load damaged files of every format that the library reads, and judge how it ends.

    python scripts/fuzz.py --mutations 2000 --seed 0

Bits, blocks, counts and JSON values of small valid files are changed at random.  Each
is loaded in a child process with a clock and a limit of memory.  A file may load, or
end in an error that names the function and the file.  Everything else is a fault: other
errors, crashes, more than 20 seconds, more than 2 GB.  The table says how often;
``out/fuzz/faults.jsonl`` has the faults, and beside it are their files.  The exit
status is 1 where a format crashes, hangs or fills the memory, or where more than .5 %
of its files end in an error that does not name them.

Linux, ``pip install "toyfeat[lm,scripts]"``; seven minutes of CPU time, no fault.
"""

import json
import multiprocessing
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import _fuzz_samples as samples
import numpy as np
import tyro
from _fuzz_children import FAULTS, MEASURED, OUTCOMES, Child
from _fuzz_mutations import mutate_folder
from rich.console import Console
from rich.table import Table

from toyfeat.files.atomic import output_folder, write_whole

_MAX_UNNAMED = 0.005  # share of mutations


@dataclass(frozen=True)
class Config:
    """Settings of the fuzzing."""

    mutations: int = 2000
    """Mutated files per format."""
    seed: int = 0
    """Root of all randomness."""
    first: int = 0
    """Number of the first mutation, to repeat one of them."""
    formats: tuple[str, ...] = tuple(samples.READERS)
    """Formats to be read."""
    seconds: float = 20.0
    """Time that a file may take."""
    memory: int = 2048
    """Memory that a file may take, in MB."""
    out: Path = Path("out/fuzz")
    """Folder of the counts and of the faults, which replace older ones."""


def main(config: Config) -> None:
    """Mutate, load, count."""
    (output_folder(config.out) / "faults.jsonl").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # In a child: this process must not start JAX, because it forks.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            pool.apply(samples.write_samples, (Path(folder),))
        counts = {x: _fuzz(config, x, Path(folder, x)) for x in config.formats}
    write_whole(config.out / "counts.json", json.dumps(counts, indent=1) + "\n")
    table = Table("format", *next(iter(counts.values())))
    for name, row in counts.items():
        table.add_row(name, *(f"{round(value, 2):g}" for value in row.values()))
    Console(width=max(120, Console().width)).print(table)
    fatal = sum(row[x] for row in counts.values() for x in FAULTS[1:])
    most = max(
        row["unnamed errors"] / max(row["mutations"], 1) for row in counts.values()
    )
    if fatal or most > _MAX_UNNAMED:
        raise SystemExit(1)


def _fuzz(config: Config, name: str, folder: Path) -> dict[str, float]:
    """Count how the loading of mutations of one format ends."""
    originals = sorted(folder.iterdir())
    child = Child(name, originals, config.seconds, config.memory)
    counts: dict[str, float] = {x: 0.0 for x in ("mutations", *OUTCOMES, *MEASURED)}
    case = folder / "case"
    for number in range(config.first, config.first + config.mutations):
        # A mutation is a function of the seed, the format and its number.
        rng = np.random.default_rng([config.seed, *name.encode(), number])
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(originals[rng.integers(len(originals))], case)
        what = mutate_folder(rng, case)
        result = child.load(case)
        counts["mutations"] += 1
        counts[result.outcome] += 1
        for key, value in zip(MEASURED, result[3:], strict=True):
            counts[key] = max(counts[key], value)
        if result.outcome in FAULTS:
            fault = {"format": name, "number": number, "what": what}
            with (config.out / "faults.jsonl").open("a") as file:
                print(json.dumps(fault | result._asdict()), file=file)
            shutil.copytree(case, config.out / f"{name}-{number}", dirs_exist_ok=True)
    child.close()
    print(f"{name}: {len(originals)} valid files, {config.mutations} mutations done")
    return counts


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
