"""Sweep settings that nobody knows how to set, and see how far methods depend on them.

    python benchmarks/brittleness.py [--wide | --quick] [--json PATH]

On planted tasks, over a grid that was fixed before the first run: the coefficient
(three decades), the learning rate (a tenth to ten times), random starts, the scale of
the output and so of the gradients (1e-3 to 1e3), and the readout.  Success (a) is a run
that is finite and covers the readers within 10 % of the best that any run reached on
that task; (b) also has the number of codes that was asked for, within 10 %.

- ``published``: the four-term loss as it was written down, on raw activations and
  gradients, one coefficient for the sparsity and the attributions.  For (b) it is given
  its best coefficient at every other setting.  The better one of decoder and encoder
  counts.
- ``robust``: our four-term loss with a controller, coefficients as they begin.
- ``consensus``: has no learning rate, coefficient, readout or codes to choose: its
  result at a scale and start counts at every learning rate and coefficient, and it has
  no (b).

The bar is that ours is at 95 % or more.  Writes maps of coverage and of both shares,
and ``out/brittleness/brittleness.html``.  Every part, of as many runs as the grid has
rates times coefficients, is written to a file there when it is done, and the same
command goes on (hours).  ``--wide`` sweeps the leaderboard's other tasks over a smaller
grid, which was fixed before its first run, too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from families import FAMILIES, Grid, Run
from harness import parse_command, row
from rich.console import Console
from stored_runs import load_runs, sweep_family
from tasks import TASKS, PlantedTask, make_task

import toyfeat as ft
from toyfeat.files.atomic import output_folder
from toyfeat.report.sweeps import brittleness_figure, write_sweep
from toyfeat.train.sweeps import Row

WIDE = Grid(
    tasks=tuple(name for name in TASKS if name not in Grid().tasks),
    rates=(3e-4, 3e-3, 3e-2),
    starts=1,
    scales=(1e-3, 1e3),
)
QUICK = Grid(
    tasks=("product space",),
    coefficients=(0.03, 30.0),
    rates=(3e-4, 3e-2),
    starts=1,
    scales=(1e-3, 1e3),
    steps=1000,
    examples=6000,
)
GRIDS = {
    "full": Grid(),
    "wide": WIDE,
    "quick": QUICK,
    "tiny": QUICK._replace(scales=(1e3,), steps=10, examples=300),
}
WANTED = 0.95  # least share of successes of ours
NEAR = 0.1  # distance from the best coverage, and from the target codes, of a success


@dataclass(frozen=True)
class Config:
    """Settings of the sweep."""

    wide: bool = False
    """The other tasks, a smaller grid."""
    quick: bool = False
    """One task, a small grid."""
    tiny: bool = False
    """Only to see that it runs."""
    out: Path | None = None
    """Folder, out/brittleness by default."""
    json: Path | None = None
    """Also write the shares there, one per line."""
    table: bool = False
    """Print every run."""


def is_good(run: Run, best: float) -> bool:
    """Success (a): finite, and near the best coverage of the task."""
    return run.finite and run.coverage >= (1 - NEAR) * best > 0


def hits_target(run: Run, target: float) -> float:
    """1 if a run has the target codes, else 0; NaN of a run without codes."""
    if run.codes is None:
        return np.nan
    return float(abs(run.codes - target) <= NEAR * target)


def success_shares(
    runs: list[Run], best: float, target: float, *, best_coefficient: bool
) -> tuple[float, float | None]:
    """Shares of success (a) and of success (b).

    Args:
      runs: of a family on a task.
      best: coverage that any run of any family reached there.
      target: codes per example.
      best_coefficient: whether (b) takes the best coefficient at every other setting.

    Returns:
      Two shares; the second is ``None`` of runs without codes.
    """
    share = float(np.mean([is_good(run, best) for run in runs]))
    if all(run.codes is None for run in runs):
        return share, None
    # (b) of a cell: any of its coefficients does, where the best one is given.
    cells: dict[tuple[Any, ...], list[bool]] = {}
    for i, run in enumerate(runs):
        setting = (run.learning_rate, run.scale, run.readout, run.start)
        cell = setting if best_coefficient else (i,)
        success = is_good(run, best) * hits_target(run, target)
        cells.setdefault(cell, []).append(success > 0)
    return share, float(np.mean([any(cell) for cell in cells.values()]))


def make_members(runs: list[Run], best: float, target: float) -> list[Row]:
    """Turn runs into the rows that maps are drawn from."""
    return [
        Row(
            i,
            {"learning_rate": run.learning_rate, "coefficient": run.coefficient},
            {
                "share of the best": run.coverage / (best or 1),
                "codes": np.nan if run.codes is None else run.codes,
                "success (a)": float(is_good(run, best)),
                "success (b)": is_good(run, best) * hits_target(run, target),
            },
            run.finite,
        )
        for i, run in enumerate(runs)
    ]


def draw_maps(
    name: str, members: dict[str, list[Row]], coded: Sequence[str]
) -> dict[str, tuple[Any, str]]:
    """Draw coverage and both successes over the grid.

    Args:
      name: of the task.
      members: family to its runs.
      coded: families that have a success (b).

    Returns:
      File name to a figure and its caption.
    """
    draw = partial(brittleness_figure, x="coefficient", y="learning_rate")
    share = {"good": 1.0, "middle": np.mean, "limits": (0.0, 1.0)}
    return {
        file_name(name): (
            draw(members, score="share of the best", good=1 - NEAR),
            f"{name}: coverage of the readers, as a share of the best run's; medians.",
        ),
        f"{file_name(name)}-a": (
            draw(members, score="success (a)", **share),
            f"{name}: share of a cell's runs within 10 % of the best coverage.",
        ),
        f"{file_name(name)}-b": (
            draw({f: members[f] for f in coded}, score="success (b)", **share),
            f"{name}: share of a cell's runs that also have the codes that were asked "
            "for, within 10 %, every coefficient by itself.",
        ),
    }


def file_name(name: str) -> str:
    """Replace what a file name cannot have."""
    return name.replace(" ", "-").replace("/", "-")


def main() -> None:
    """Sweep what is missing, then print and write all of it."""
    config = parse_command(Config, __doc__)
    size, folder = choose_size(config)
    output_folder(folder)
    if config.json:
        output_folder(config.json.parent)
    lines, families, pictures = [], {}, {}
    for name in GRIDS[size].tasks:
        members, rows = compare_families(TASKS[name], GRIDS[size], folder)
        lines += rows
        families |= {f"{name}: {family}": runs for family, runs in members.items()}
        coded = [line["method"] for line in rows if line["b"] is not None]
        pictures |= draw_maps(name, members, coded)
    page = write_sweep(
        folder,
        families,
        pictures,
        title="How far methods depend on their settings",
        argument=[" ".join(part.split()) for part in str(__doc__).split("\n\n")[2:4]],
        header={"grid": size},
        console=Console(width=120) if config.table else None,
    )
    print(f"the page is {page.replace(folder / 'brittleness.html')}")
    if config.json:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        config.json.write_text(text, encoding="utf-8")


def choose_size(config: Config) -> tuple[str, Path]:
    """The grid that the flags name, and the folder.

    Raises:
      SystemExit: if there are two.
    """
    chosen = [name for name in GRIDS if getattr(config, name, False)]
    if len(chosen) > 1:
        raise SystemExit(f"brittleness: --{chosen[1]}: not with --{chosen[0]}")
    size = chosen[0] if chosen else "full"
    folder = "brittleness" if size == "full" else f"brittleness-{size}"
    return size, config.out or Path("out", folder)


def compare_families(
    planted_task: PlantedTask, grid: Grid, folder: Path
) -> tuple[dict[str, list[Row]], list[dict[str, Any]]]:
    """Sweep every family on a task.

    Args:
      planted_task: row of the table.
      grid: of settings.
      folder: of the files of runs.

    Returns:
      Family to its runs, for maps, and a row per family.
    """
    name, version = planted_task.name, planted_task.version
    task = make_task(planted_task)
    target = float(ft.metrics.mean_active_features(jax.random.key(2), task))
    paths = {f: folder / f"{file_name(name)}-{f}.json" for f in FAMILIES}
    for family, path in paths.items():  # refuse a file before the work
        load_runs(path, FAMILIES[family], grid, task_version=version)
    swept = {
        family: sweep_family(
            path, FAMILIES[family], task, target, grid, task_version=version
        )
        for family, path in paths.items()
    }
    # Success is judged by the best coverage that any family reached on the task.
    best = max(run.coverage for runs, _ in swept.values() for run in runs)
    members = {f: make_members(runs, best, target) for f, (runs, _) in swept.items()}
    lines = []
    for family, (runs, seconds) in swept.items():
        a, b = success_shares(
            runs, best, target, best_coefficient=FAMILIES[family].best_coefficient
        )
        line = row(
            name,
            {"runs": len(runs)},
            family,
            best=best,
            target=target,
            a=a,
            b=b,
            ours_s=seconds,
            ratio=None,
            error=None,
        )
        print(summary(line))
        lines.append(line)
    return members, lines


def summary(line: Mapping[str, Any]) -> str:
    """A line of text for a row, with the bar of ours."""
    name, family, runs = line["case"], line["method"], line["size"]["runs"]
    a, b = line["a"], line["b"]
    b_text = "none" if b is None else f"{b:4.0%}"
    verdict = ""
    if FAMILIES[family].ours:
        good = min(a, 1.0 if b is None else b) >= WANTED
        verdict = f">= {WANTED:.0%}: {'ok' if good else 'MISSED'}"
    text = f"{name:18} {family:10} (a) {a:4.0%}  (b) {b_text}  {runs} runs  {verdict}"
    return text.rstrip()


if __name__ == "__main__":
    main()
