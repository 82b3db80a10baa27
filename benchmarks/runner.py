"""Measure methods on planted tasks: processes side by side, rows in a file.

Every row is appended to a file when it is there, and the same command goes on.
"""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import jax
from harness import row
from method_tools import Budget
from methods import METHODS, oracle
from sizes import SIZES
from tasks import make_task, task_key

import toyfeat as ft
from toyfeat.models import planted
from toyfeat.models.planted import Task
from toyfeat.report import leaderboard
from toyfeat.report.planted import describe, task_figure

# Fields of the scores, by their names in rows.
COLUMNS = {
    "num_found": "found",
    "random_coverage": "random",
    "ignored_share": "ignored",
}

Failure = tuple[str, str, str]
"""Task, method with seed, and reason."""


class Job(NamedTuple):
    """Methods to measure on a draw of a task.

    Attributes:
      path: file that rows are appended to.
      size: of the leaderboard, see ``sizes.SIZES``.
      root: root of all task keys.
      seed: number of the draw.
      task: name.
      methods: names.
    """

    path: Path
    size: str
    root: int
    seed: int
    task: str
    methods: Sequence[str]


class JobResult(NamedTuple):
    """Rows of a draw of a task.

    Attributes:
      task: name.
      rows: one per method.
      failures: methods that raised, or the task.
      absent: method to the reason, of those that lack a package.
      page: a paragraph on the task and a picture of it, with seed 0.
    """

    task: str
    rows: list[dict[str, Any]]
    failures: list[Failure]
    absent: dict[str, str]
    page: tuple[str, Any] | None


class Measured(NamedTuple):
    """Everything that a run of the leaderboard has.

    Attributes:
      rows: measured now and before.
      pages: task to a paragraph and a picture.
      methods: names of those that could run.
      failures: methods and tasks that raised.
    """

    rows: list[dict[str, Any]]
    pages: dict[str, tuple[str, Any]]
    methods: list[str]
    failures: list[Failure]


def measure_missing(
    rows: Sequence[dict[str, Any]],
    path: Path,
    *,
    size: str,
    root: int,
    draws: Mapping[str, int],
    tasks: Sequence[str],
    processes: int,
) -> Measured:
    """Measure the methods on the tasks, but for the rows that are there.

    Args:
      rows: measured before.
      path: file that new rows are appended to.
      size: of the leaderboard.
      root: root of all task keys.
      draws: method to how many draws of every task it is measured on.
      tasks: names.
      processes: how many tasks are measured side by side.

    Returns:
      All rows, with pages and failures.
    """
    done = {(line["case"], line["method"], line["seed"]) for line in rows}
    # The longest tasks are last; side by side they begin first, and none runs alone.
    order = tasks[::-1] if processes > 1 else tasks
    jobs = []
    for seed in range(max(draws.values())):
        wanted = [method for method, num in draws.items() if seed < num]
        for name in order:
            missing = [m for m in wanted if (name, m, seed) not in done]
            if missing or seed == 0:  # the first draw has the picture of the task
                jobs.append(Job(path, size, root, seed, name, missing))
    all_rows, pages, failures = list(rows), {}, []
    absent: dict[str, str] = {}
    for result in run_parallel(measure_job, jobs, processes):
        all_rows += result.rows
        failures += result.failures
        for method, reason in result.absent.items():
            if method not in absent:
                print(f"{method} is left out: {reason}", flush=True)
        absent |= result.absent
        if result.page is not None:
            pages[result.task] = result.page
    return Measured(
        rows=all_rows,
        pages=pages,
        methods=[method for method in draws if method not in absent],
        failures=failures,
    )


def run_parallel(
    function: Callable[[Any], Any], jobs: Sequence[Any], processes: int
) -> Iterator[Any]:
    """Call a function of a module in processes; yield results as they are ready.

    Args:
      function: called with each job, in this process if one is enough.
      jobs: arguments.
      processes: at most so many.

    Raises:
      SystemExit: if a process ends, as for lack of memory.
    """
    if min(processes, len(jobs)) <= 1:
        yield from map(function, jobs)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait by spinning
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=exit_with_parent,
    )
    try:
        futures = [pool.submit(function, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise SystemExit(
            f"leaderboard: a process ended, perhaps for its memory ({error}); the same "
            "command goes on, with --jobs 1 one task at a time"
        ) from error
    finally:  # after an interrupt, too, wait for no job that still runs
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def exit_with_parent() -> None:
    """End this process when its parent ends, so that it writes no more rows."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("exit_with_parent: this process has no parent")

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def measure_job(job: Job) -> JobResult:
    """Measure the methods of a job, and append each row to its file."""
    jax.clear_caches()  # a process can map only so many programs
    size = SIZES[job.size]
    result = JobResult(job.task, rows=[], failures=[], absent={}, page=None)
    try:
        planted_task = size.tasks[job.task]
        task = make_task(planted_task, root=job.root, seed=job.seed)
        if job.seed == 0:
            key = task_key(planted_task, root=job.root, seed=job.seed)
            drawn = task_figure(key, task) if len(task.truth.frequency) else None
            result = result._replace(page=(describe(task), drawn))
    except Exception as error:  # of one task: the others go on
        label = f"as a whole, seed {job.seed}"
        return result._replace(failures=[_failure(job.task, label, error)])
    for method in job.methods:
        try:
            line = measure_method(task, job.task, method, job.seed, size.budget)
        except ImportError as error:
            result.absent[method] = str(error)
            continue
        except Exception as error:  # of one method: the others go on
            label = f"{method}, seed {job.seed}"
            result.failures.append(_failure(job.task, label, error))
            continue
        line["task_version"] = planted_task.version
        result.rows.append(line)
        with job.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = f"{leaderboard.coverage(line):.3f}, {line['seconds']:.1f} s"
        print(f"{job.task}, {method}, seed {job.seed}: {figures}", flush=True)
    return result


def _failure(task: str, label: str, error: Exception) -> Failure:
    """Print where the error that is being handled was raised, and name it."""
    traceback.print_exc()
    return task, label, f"({type(error).__name__}: {error})"


def measure_method(
    task: Task, name: str, method: str, seed: int, budget: Budget
) -> dict[str, Any]:
    """Run a method on a task and score it; returns a row."""
    key = jax.random.fold_in(jax.random.key(1), seed)
    start = time.perf_counter()
    if method == leaderboard.ORACLE:
        features = oracle(key, task, budget=budget)
    else:
        run = METHODS[method].run
        features = run(key, planted.subject_of(task), budget=budget)
    jax.block_until_ready(features)
    seconds = time.perf_counter() - start
    scores = ft.metrics.score_task(jax.random.fold_in(key, 1), task, features)
    columns = {COLUMNS.get(name, name): x for name, x in scores._asdict().items()}
    return row(
        name,
        {"features": len(task.truth.frequency), "dim": features.readers.shape[1]},
        method,
        **columns,
        side=task.side,
        seed=seed,
        fit=task.fit,
        seconds=seconds,
    )
