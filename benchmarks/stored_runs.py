"""Runs of the sweep of settings on disk, part by part."""

import json
import time
from pathlib import Path

import jax
from families import Family, Grid, Run, grid_cells

from toyfeat.files.atomic import write_whole
from toyfeat.models.planted import Task


def sweep_family(
    path: Path,
    family: Family,
    task: Task,
    target: float,
    grid: Grid,
    *,
    task_version: int = 1,
) -> tuple[list[Run], float]:
    """Sweep the parts that a file lacks; each is written to it at once.

    Args:
      path: file of runs.
      family: what to sweep.
      task: what on.
      target: codes per example.
      grid: of settings.
      task_version: of the task.

    Returns:
      All runs, and seconds.
    """
    runs, seconds = load_runs(path, family, grid, task_version=task_version)
    cells = len(grid_cells(grid)[0])
    missing = family.sweep(task, target, grid)[len(runs) // cells :]
    if missing:
        jax.clear_caches()  # a process can map only so many programs
    settings = {"grid": grid, "version": family.version, "task_version": task_version}
    for part in missing:
        start = time.perf_counter()
        runs += part()
        seconds += time.perf_counter() - start
        text = json.dumps({**settings, "seconds": seconds, "runs": runs})
        write_whole(path, text + "\n")
    return runs, seconds


def load_runs(
    path: Path, family: Family, grid: Grid, *, task_version: int = 1
) -> tuple[list[Run], float]:
    """Read whole parts of a sweep.

    Args:
      path: file of runs; there need not be one.
      family: of the runs.
      grid: of the runs.
      task_version: of the task.

    Returns:
      Runs and seconds, none without a file.

    Raises:
      SystemExit: if the file is damaged, or of another grid or version.
    """
    if not path.exists():
        return [], 0.0
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        runs = [Run(*values) for values in stored["runs"]]
        grid_values, seconds = stored["grid"], stored["seconds"]
        # A file without a version was written before there were any.
        versions = stored.get("version", 1), stored.get("task_version", 1)
        complete = len(runs) % len(grid_cells(grid)[0]) == 0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"brittleness: {path} is damaged; move it away") from None
    if grid_values != json.loads(json.dumps(grid)) or not complete:
        raise SystemExit(f"brittleness: {path} is of another grid; move it away")
    for label, version, current in zip(
        ("version", "version of the task"),
        versions,
        (family.version, task_version),
        strict=True,
    ):
        if version != current:
            raise SystemExit(
                f"brittleness: {path} is of another {label} ({version}, now "
                f"{current}); move it away"
            )
    return runs, seconds
