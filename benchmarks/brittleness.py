"""How far methods depend on settings that nobody knows how to set.

    python benchmarks/brittleness.py [--wide | --quick] [--json PATH]

On planted tasks, over a grid that was fixed before the first run: the coefficient
(three decades), the learning rate (a tenth to ten times), random starts, the scale of
the output and so of the gradients (1e-3 to 1e3), and the readout.  Success (a) is a run
that is finite and covers the readers within 10 % of the best that any run reached on
that task; (b) also has the number of codes that was asked for, within 10 %.

- ``published``: the four-term loss as it was written down, on raw activations and
  gradients, one coefficient for the sparsity and the attributions.  For (b) it is given
  its best coefficient at every other setting.  The better of decoder and encoder
  counts.
- ``robust``: our four-term loss with a controller, coefficients as they begin.
- ``consensus``: has no coefficient, no readout and no codes to choose: what it finds at
  a learning rate, scale and start, a fourth as many trainings, stands at every
  coefficient, and it has no (b).

The bar is that ours is at 95 % or more.  Writes maps of coverage and of both shares,
and ``out/brittleness/brittleness.html``; what was swept is kept there, and
the same command goes on (hours; every part of as many runs as the grid has rates times
coefficients is kept at once).  ``--wide`` sweeps the leaderboard's other tasks over a
smaller grid, which was fixed before its first run, too.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from families import FAMILIES, Family, Grid, Run, cells_of
from harness import row
from leaderboard import TASKS
from rich.console import Console

import toyfeat as tf
from toyfeat.report.rows import output_folder, write_whole
from toyfeat.report.sweeps import brittleness_figure, write_sweep
from toyfeat.types import Member, Task

WIDE = Grid(
    tuple(name for name in TASKS if name not in Grid().tasks),
    rates=(3e-4, 3e-3, 3e-2),
    starts=1,
    scales=(1e-3, 1e3),
)
QUICK = Grid(("product space",), (0.03, 30.0), (3e-4, 3e-2), 1, (1e-3, 1e3), 1000, 6000)
GRIDS = {
    "full": Grid(),
    "wide": WIDE,
    "quick": QUICK,
    "tiny": QUICK._replace(scales=(1e3,), steps=10, examples=300),
}
OURS, WANTED = ("robust", "consensus"), 0.95
NEAR = 0.1  # of the best coverage and of the codes that were asked for


def good(run: Run, best: float) -> bool:
    """Success (a)."""
    return run.finite and run.coverage >= (1 - NEAR) * best > 0


def sparse(run: Run, target: float) -> float:
    """Whether it has the codes that were asked for; NaN of one that is not asked."""
    if run.codes is None:
        return np.nan
    return float(abs(run.codes - target) <= NEAR * target)


def shares(
    runs: list[Run], best: float, target: float, *, choose: bool
) -> tuple[float, float | None]:
    """Success shares (a) and (b); with ``choose`` (b) takes the best coefficient.

    Without codes there is no (b).
    """
    a = float(np.mean([good(run, best) for run in runs]))
    if all(run.codes is None for run in runs):
        return a, None
    cells: dict[tuple[Any, ...], list[bool]] = {}
    for i, run in enumerate(runs):
        place = (run.learning_rate, run.scale, run.readout, run.start)
        place = place if choose else (i,)
        both = good(run, best) * sparse(run, target)
        cells.setdefault(place, []).append(both > 0)
    return a, float(np.mean([any(some) for some in cells.values()]))


def swept(
    path: Path, family: Family, task: Task, target: float, grid: Grid
) -> tuple[list[Run], float]:
    """The runs of a family, and seconds; every part is kept in a file at once."""
    runs, seconds = kept(path, family, grid)
    cells = len(cells_of(grid)[0])
    missing = family.sweep(task, target, grid)[len(runs) // cells :]
    if missing:
        jax.clear_caches()
    for part in missing:
        begun = time.perf_counter()
        runs += part()
        seconds += time.perf_counter() - begun
        of = {"grid": grid, "version": family.version}
        text = json.dumps({**of, "seconds": seconds, "runs": runs})
        write_whole(path, text + "\n")
    return runs, seconds


def kept(path: Path, family: Family, grid: Grid) -> tuple[list[Run], float]:
    """What a file has, whole parts of this grid by the family as it is, or nothing."""
    if not path.exists():
        return [], 0.0
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        grid_of, runs, seconds = (found[name] for name in ("grid", "runs", "seconds"))
        version, runs = found.get("version", 1), [Run(*one) for one in runs]
        whole = len(runs) % len(cells_of(grid)[0]) == 0
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"brittleness: {path} is damaged; move it away") from None
    if grid_of != json.loads(json.dumps(grid)) or not whole:
        raise SystemExit(f"brittleness: {path} is of another grid; move it away")
    if version != family.version:
        raise SystemExit(
            f"brittleness: {path} is of another version ({version}, now "
            f"{family.version}); move it away"
        )
    return runs, seconds


def members_of(runs: list[Run], best: float, target: float) -> list[Member]:
    """Runs as the maps want them."""
    return [
        Member(
            i,
            {"learning_rate": run.learning_rate, "coefficient": run.coefficient},
            {
                "share of the best": run.coverage / (best or 1),
                "codes": np.nan if run.codes is None else run.codes,
                "success (a)": float(good(run, best)),
                "success (b)": good(run, best) * sparse(run, target),
            },
            run.finite,
        )
        for i, run in enumerate(runs)
    ]


def maps(
    name: str, mine: dict[str, list[Member]], coded: Sequence[str]
) -> dict[str, tuple[Any, str]]:
    """Coverage and both successes over the grid, (b) of families with codes."""
    draw = partial(brittleness_figure, x="coefficient", y="learning_rate")
    share = {"good": 1.0, "middle": np.mean, "limits": (0.0, 1.0)}
    some = {family: mine[family] for family in coded}
    return {
        slug(name): (
            draw(mine, score="share of the best", good=1 - NEAR),
            f"{name}: coverage of the readers, as a share of the best run's; medians.",
        ),
        f"{slug(name)}-a": (
            draw(mine, score="success (a)", **share),
            f"{name}: share of a cell's runs within 10 % of the best coverage.",
        ),
        f"{slug(name)}-b": (
            draw(some, score="success (b)", **share),
            f"{name}: share of a cell's runs that also have the codes that were asked "
            "for, within 10 %, every coefficient by itself.",
        ),
    }


def slug(name: str) -> str:
    """A plain file name."""
    return name.replace(" ", "-").replace("/", "-")


def main() -> None:
    """Sweep what is missing, then print and write all of it."""
    options = parsed()
    grid, folder = GRIDS[options.size], Path(options.out)
    output_folder(folder)
    if options.json:
        output_folder(Path(options.json).parent)
    lines, families, pictures = [], {}, {}
    for name in grid.tasks:
        mine, rows = compared(name, grid, folder)
        lines += rows
        families |= {f"{name}: {family}": runs for family, runs in mine.items()}
        coded = [line["method"] for line in rows if line["b"] is not None]
        pictures |= maps(name, mine, coded)
    page = write_sweep(
        folder,
        families,
        pictures,
        title="How far methods depend on their settings",
        argument=[" ".join(part.split()) for part in str(__doc__).split("\n\n")[2:4]],
        header={"grid": options.size},
        console=Console(width=120) if options.table else None,
    )
    print(f"the page is {page.replace(folder / 'brittleness.html')}")
    if options.json:
        text = "".join(json.dumps(one) + "\n" for one in lines)
        Path(options.json).write_text(text, encoding="utf-8")


def compared(
    name: str, grid: Grid, folder: Path
) -> tuple[dict[str, list[Member]], list[dict[str, Any]]]:
    """Every family on one task: its runs for the maps, and a row each."""
    index = list(TASKS).index(name)
    task = TASKS[name](jax.random.fold_in(jax.random.key(0), index))
    target = float(tf.active_features(jax.random.key(2), task))
    paths = {family: folder / f"{slug(name)}-{family}.json" for family in FAMILIES}
    for family, path in paths.items():  # refused before the work
        kept(path, FAMILIES[family], grid)
    every = {
        family: swept(path, FAMILIES[family], task, target, grid)
        for family, path in paths.items()
    }
    best = max(run.coverage for runs, _ in every.values() for run in runs)
    mine, lines = {}, []
    for family, (runs, seconds) in every.items():
        a, b = shares(runs, best, target, choose=family == "published")
        shown = "none" if b is None else f"{b:4.0%}"
        bar = ""
        if family in OURS:
            bar = "ok" if min(a, 1.0 if b is None else b) >= WANTED else "MISSED"
            bar = f">= {WANTED:.0%}: {bar}"
        counted = f"{name:18} {family:10} (a) {a:4.0%}  (b) {shown}  {len(runs)} runs"
        print(f"{counted}  {bar}".rstrip())
        figures = {"best": best, "target": target, "a": a, "b": b}
        more = {"ours_s": seconds, "ratio": None, "error": None}
        lines.append(row(name, {"runs": len(runs)}, family, **figures, **more))
        mine[family] = members_of(runs, best, target)
    return mine, lines


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    wide = "the other tasks, a smaller grid"
    size.add_argument("--wide", action="store_true", help=wide)
    size.add_argument("--quick", action="store_true", help="one task, a small grid")
    size.add_argument("--tiny", action="store_true", help="only to see that it runs")
    parser.add_argument("--out", help="folder, out/brittleness by default")
    parser.add_argument("--json", help="also write the shares there, one per line")
    parser.add_argument("--table", action="store_true", help="print every run")
    options = parser.parse_args()
    asked = [name for name in ("wide", "quick", "tiny") if getattr(options, name)]
    options.size = asked[0] if asked else "full"
    if options.out is None:
        full = options.size == "full"
        options.out = "out/brittleness" + ("" if full else f"-{options.size}")
    return options


if __name__ == "__main__":
    main()
