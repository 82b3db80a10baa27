"""The x² example: activations show how a network computes, gradients what it reads.

Trains seven kinds of squaring networks from eight seeds each, decomposes the
activations and the activation gradients of the hidden layer, and writes
``report.html``, ``report.json`` and one picture per case.

    bash scripts/demo.sh                       # sets up .venv, then runs this
    python scripts/demo.py --out out/demo --seeds 8

Two to four minutes on two CPU cores.  Expected: every line that says what it expects
is marked ok; gradient PCA finds the reader to |cos| > .9999 where the best
activation PC stays under .9.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import _repository  # noqa: F401  (finds examples)
import jax
import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from examples.squaring.cases import CASES, SUMMARY, SUMMARY_LEGEND
from examples.squaring.measure import measure_case, train_case
from examples.squaring.page import write_report
from toyfeat.files.atomic import output_folder
from toyfeat.report.tables import (
    Row,
    print_lines,
    print_table,
    settings,
    summary,
)

SLUGS = tuple(case.slug for case in CASES)


@dataclass(frozen=True)
class Config:
    """Settings of the demo."""

    out: Path = Path("out/demo")
    """Folder for report.html, report.json and the pictures."""
    seeds: int = 8
    """Networks per case."""
    seed: int = 0
    """Root of all randomness."""
    samples: int = 20_000
    """Fresh inputs that are tapped per network."""
    shorten: int = 1
    """Divide the training steps by this, to try things out."""
    only: tuple[Literal[SLUGS], ...] = SLUGS  # type: ignore[valid-type]
    """Cases to run."""

    def __post_init__(self) -> None:
        for name in ("seeds", "samples", "shorten"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")


def main(config: Config) -> int:
    """Train, measure, report; return how many expectations were missed."""
    out = output_folder(config.out)
    start, root = time.perf_counter(), jax.random.key(config.seed)
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[Row] = []
    results = []
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for index, case in enumerate(CASES):
            if case.slug not in config.only:
                continue
            case = case._replace(steps=max(case.steps // config.shorten, 1))
            bar = progress.add_task(case.name, total=case.steps)

            def advance(done: int, losses: jax.Array, bar=bar, case=case) -> None:
                text = f"{case.name}: loss {float(losses.mean()):.2e}"
                progress.update(bar, completed=done, description=text)

            key = jax.random.fold_in(root, index)
            nets = train_case(key, case, seeds=config.seeds, on_chunk=advance)
            measurements, case_rows = measure_case(key, case, nets, num=config.samples)
            rows += case_rows
            results.append((case, nets, measurements))
    print_table(rows, console)
    print_lines(summary(rows, SUMMARY), console)
    console.print(SUMMARY_LEGEND, style="dim")
    header = settings(vars(config), seconds=time.perf_counter() - start)
    page = write_report(out, results, rows, header)
    missed = [row for row in rows if row.holds is False]
    console.print(f"{len(missed)} expectations missed; the report is {page}")
    return len(missed)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)) > 0)
    except ValueError as error:
        sys.exit(f"demo: {error}")
