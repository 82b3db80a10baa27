"""Every method on every planted task, scored against the truth.

    python benchmarks/leaderboard.py [--quick | --shapes | --conditioned | --scale |
        --tiny]
        [--seeds N] [--others N] [--jobs N] [--tasks A,B] [--methods A,B]

Prints coverage of each task's side (median over seeds) and the bars, and writes
``out/leaderboard/leaderboard.html`` with all scores, the same as JSON, and a picture.
Rows are kept in ``rows.jsonl`` there as they are measured; the same command goes on.
Quick: one seed of nine small tasks, short trainings, under ten minutes on two cores;
all of it takes some hours.  Shapes: one seed of tasks of the same kinds with other
knobs, on which nothing was chosen.  Conditioned: the draws of the full size in random
coordinates of condition 100.  With more than one job tasks are measured side by
side, which makes the seconds of a method longer.  Without scikit-learn (the ``bench``
extra) ICA is left out.  A method that raises leaves its row out and ends nothing; the
exit status says so.

Tasks are rows of ``tasks.py``, methods of ``methods.py``.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from harness import parse_command
from methods import METHODS
from rich.console import Console
from runner import Failure, measure_missing
from sizes import SIZES
from stored_rows import resume_rows
from tasks import ALL

from toyfeat.files.atomic import output_folder
from toyfeat.report import leaderboard

# Mechanisms that the consensus may return where nothing is planted.
MAX_FALSE = 1
# Coverage from which a draw is a success, and the share of the draws that have to be.
SUCCESS = 0.95
MIN_SUCCESSES = 0.95
# Draws for methods other than the consensus: medians need fewer than shares.
MAX_OTHERS = 3
# A hard task is one whose features activations alone do not tell: coverage at most.
EASY = 0.8
CONSENSUS = "consensus"
ARGUMENT = (
    "Each task is a model whose features are known: the directions that its own "
    "computation reads. A method sees the model and its inputs, nothing else, and "
    "returns readers and writers; coverage is the mean |cos| of every true feature "
    "with the found one it is paired with, one to one, and 0 without a partner.",
    "Where a plane or a subspace is planted, as of a gated unit, and mechanisms are "
    "scored, only one of the same dimension counts, by the cosine of the largest angle "
    "between both; directions inside of it are listed apart.",
    "The oracle is a dictionary of gradients that starts at the truth and is trained "
    "on: where it loses the truth, so must a method that trains one.",
)


@dataclass(frozen=True)
class Config:
    """Settings of the leaderboard."""

    quick: bool = False
    """One seed, small tasks."""
    shapes: bool = False
    """One seed, other sizes."""
    conditioned: bool = False
    """The same draws in badly conditioned coordinates."""
    scale: bool = False
    """One seed of sites with hundreds and thousands of readers."""
    tiny: bool = False
    """Only to see that it runs."""
    seeds: int | None = None
    """Draws for the consensus: 20, or 1 of quick, shapes, scale and tiny."""
    others: int | None = None
    """Draws for the other methods, the first ones of these; 3 at most by default."""
    jobs: int | None = None
    """Processes, 1 or, quick and without accelerator, 2."""
    root: int = 0
    """Root of all task keys."""
    tasks: str | None = None
    """Names, separated by commas."""
    methods: str | None = None
    """Names, separated by commas."""
    out: Path | None = None
    """Folder, out/leaderboard by default."""
    json: Path | None = None
    """Also write the rows there, one per line."""


class Options(NamedTuple):
    """The command line, checked.

    Attributes:
      size: key of ``sizes.SIZES``.
      draws: method to how many draws of every task it is measured on.
      jobs: processes.
      root: root of all task keys.
      tasks: names.
      out: folder.
      json: file for the rows, or ``None``.
    """

    size: str
    draws: dict[str, int]
    jobs: int
    root: int
    tasks: list[str]
    out: Path
    json: Path | None


def main() -> None:
    """Measure what is missing, then print and write all of it."""
    options = parse_options()
    folder = output_folder(options.out)
    if options.json:
        output_folder(options.json.parent)
    path = folder / "rows.jsonl"
    measured = measure_missing(
        resume_rows(path, size=options.size, root=options.root),
        path,
        size=options.size,
        root=options.root,
        draws=options.draws,
        tasks=options.tasks,
        processes=options.jobs,
    )
    failures = measured.failures
    rows = select_rows(measured.rows, options, measured.methods)
    if rows:
        write_page(folder, rows, options, measured.pages, failures)
    if failures:
        raise SystemExit(
            f"leaderboard: {len(failures)} rows are missing, the same command tries "
            f"them again: {'; '.join(' '.join(failure) for failure in failures)}"
        )


def select_rows(
    rows: Sequence[dict[str, Any]], options: Options, methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of the tasks, methods and seeds of the command, in their order."""
    selected = [
        row
        for row in rows
        if row["case"] in options.tasks
        and row["method"] in methods
        and row["seed"] < options.draws[row["method"]]
    ]
    task_place, method_place = options.tasks.index, list(options.draws).index
    selected.sort(
        key=lambda r: (r["seed"], task_place(r["case"]), method_place(r["method"]))
    )
    return selected


def write_page(
    folder: Path,
    rows: list[dict[str, Any]],
    options: Options,
    pages: dict[str, tuple[str, Any]],
    failures: Sequence[Failure],
) -> None:
    """Write and print the tables of the rows, and the rows themselves."""
    page = leaderboard.write_leaderboard(
        folder,
        rows,
        argument=ARGUMENT,
        header={
            "size": options.size,
            "draws": max(options.draws.values()),
            "draws of other methods": min(options.draws.values()),
            "root": options.root,
            "jobs": options.jobs,
            "failed": failures,
        },
        tasks=pages,
        verdicts=verdicts(rows, failures),
        console=Console(width=max(220, Console().width)),
    )
    print(f"the page is {page}")
    if options.json:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        options.json.write_text(lines, encoding="utf-8")


def verdicts(
    rows: list[dict[str, Any]], failures: Sequence[Failure] = ()
) -> list[tuple[str, ...]]:
    """Lines on the bars: those of the tasks, and those of the consensus.

    Tasks with failures have no bars: the best of them would be of fewer methods.

    Returns:
      A heading line, and a line per bar.
    """
    controls = [row for row in rows if leaderboard.is_control(row)]
    rows = [row for row in rows if not leaderboard.is_control(row)]
    coverage = leaderboard.medians(rows)
    failed = {task for task, *_ in failures}
    names = [n for n in dict.fromkeys(row["case"] for row in rows) if n not in failed]
    lines: list[tuple[str, ...]] = [("bar", "task", "figure", "wanted", "")]
    # Hard tasks are too hard for methods that read activations alone.
    for task in (name for name in names if ALL[name].hard):
        for method in (m.name for m in METHODS.values() if m.hard_bar):
            if (task, method) in coverage:
                value = coverage[task, method]
                bar, good = f"<= {EASY}", value <= EASY
                lines.append(_line(f"too hard for {method}", task, value, bar, good))
    lines += false_lines(controls)
    if CONSENSUS not in {row["method"] for row in rows}:
        return lines
    for task in names:
        value = coverage.get((task, CONSENSUS), 0.0)
        if bound := consensus_bound(coverage, task):
            label, least = bound
            bar, good = f">= {least:.3f}", value >= least
            lines.append(_line(f"{CONSENSUS} {label}", task, value, bar, good))
    return lines + success_lines(rows, names)


def success_lines(
    rows: list[dict[str, Any]], tasks: Sequence[str]
) -> list[tuple[str, ...]]:
    """Lines on the draws that the consensus covers, or on what controls return."""
    label, bar = f"{CONSENSUS} covers {SUCCESS}", f">= {MIN_SUCCESSES}"
    lines = []
    for task in tasks:
        draws = [r for r in rows if r["case"] == task and r["method"] == CONSENSUS]
        covered = [leaderboard.coverage(row) >= SUCCESS for row in draws]
        if covered and (limit := ALL[task].limit):
            most, name = (
                max(row["num_mechanisms"] for row in draws),
                f"{CONSENSUS} finds",
            )
            lines.append(_line(name, task, most, f"<= {limit}", most <= limit))
        elif covered:
            share = sum(covered) / len(covered)
            name = f"{task}, {sum(covered)} of {len(covered)} draws"
            lines.append(_line(label, name, share, bar, share >= MIN_SUCCESSES))
    return lines


def false_lines(controls: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lines on what the consensus returns where nothing is planted."""
    counts: dict[str, list[int]] = {}
    for row in controls:
        if row["method"] == CONSENSUS:
            counts.setdefault(row["case"], []).append(row["num_mechanisms"])
    label, bar = f"{CONSENSUS} finds nothing", f"<= {MAX_FALSE}"
    return [
        (label, task, str(max(c)), bar, "ok" if max(c) <= MAX_FALSE else "MISSED")
        for task, c in counts.items()
    ]


def consensus_bound(
    coverage: dict[tuple[str, str], float], task: str
) -> tuple[str, float] | None:
    """The bar of the consensus on a task: its name, and the least coverage.

    Args:
      coverage: ``(task, method)`` to median coverage.
      task: name.

    Returns:
      ``None`` for a control, and without the oracle, which sets the bar.
    """
    if ALL[task].limit is not None:
        return None
    if ALL[task].beats_published:
        published = (m.name for m in METHODS.values() if not m.ours)
        best = max(coverage.get((task, name), 0.0) for name in published)
        return "beats all", min(best + 0.1, best + (1 - best) / 2)
    if (task, leaderboard.ORACLE) in coverage:
        ceiling = coverage[task, leaderboard.ORACLE]
        return "at the ceiling", min(0.95, ceiling - 0.02)
    return None


def _line(
    label: str, task: str, value: float, bar: str, good: bool
) -> tuple[str, str, str, str, str]:
    return label, task, f"{value:.3f}", bar, "ok" if good else "MISSED"


def parse_options() -> Options:
    """Read and check the command line.

    Raises:
      SystemExit: for a flag or a name that is unknown, or a count that is too low.
    """
    config = parse_command(Config, __doc__)
    chosen = [name for name in SIZES if getattr(config, name, False)]
    if len(chosen) > 1:
        _refuse(f"--{chosen[1]}: not with --{chosen[0]}")
    size = chosen[0] if chosen else "full"
    on_cpu = jax.default_backend() == "cpu"
    seeds = SIZES[size].seeds if config.seeds is None else config.seeds
    jobs = config.jobs
    if jobs is None:
        jobs = min(2, os.cpu_count() or 1) if size == "quick" and on_cpu else 1
    others = min(seeds, MAX_OTHERS) if config.others is None else config.others
    for name, count in (("seeds", seeds), ("others", others), ("jobs", jobs)):
        if count < 1:
            _refuse(f"--{name} must be at least 1, got {count}")
    if jobs > 1 and not on_cpu:
        _refuse("--jobs: an accelerator runs one process; JAX_PLATFORMS=cpu")
    if others > seeds:
        _refuse(f"--others must be at most --seeds, {seeds}, got {others}")
    methods = _names("methods", config.methods, [*METHODS, leaderboard.ORACLE])
    folder = "leaderboard" if size == "full" else f"leaderboard-{size}"
    return Options(
        size=size,
        draws={name: seeds if name == CONSENSUS else others for name in methods},
        jobs=jobs,
        root=config.root,
        tasks=_names(
            "tasks", config.tasks, list(SIZES[size].tasks), f" at size {size}"
        ),
        out=config.out or Path("out", folder),
        json=config.json,
    )


def _names(flag: str, text: str | None, known: list[str], size: str = "") -> list[str]:
    """Names that a flag lists, each of them once; all of them without the flag."""
    names = known if text is None else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            _refuse(
                f"--{flag}: there is no {name!r}{size}; there are {', '.join(known)}"
            )
    return names


def _refuse(reason: str) -> NoReturn:
    """Exit with status 2 and the reason."""
    print(f"leaderboard: {reason}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
