"""Every method on every planted task, scored against the truth.

    python benchmarks/leaderboard.py [--quick | --shapes] [--seeds N] [--jobs N]
        [--tasks A,B] [--methods A,B]

Prints coverage of each task's side (median over seeds) and the bars, and writes
``out/leaderboard/leaderboard.html`` with all scores, the same as JSON, and a picture.
What was measured is kept in ``rows.jsonl`` there; the same command goes on.  Quick:
one seed of nine small tasks, short trainings, under ten minutes on two cores; all
of it is some hours.  Shapes: one seed of tasks of the same kinds with other knobs, on
which nothing was chosen.  With more than one job tasks are measured side by side, and
the seconds of a method are those beside another one.  Without scikit-learn (the
``bench`` extra) ICA is left out.  A method that raises leaves its row out and ends
nothing; the exit status says so.
"""

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import jax
from harness import row
from methods import METHODS, OURS, Budget, oracle
from rich.console import Console

import toyfeat as tf
from toyfeat.models import planted
from toyfeat.report import leaderboard
from toyfeat.report.planted import describe, task_figure
from toyfeat.report.rows import output_folder, write_whole
from toyfeat.types import Array, Task

TASKS: dict[str, Callable[[Array], Task]] = {
    "ignored structure": planted.ignored_structure,
    "tiled curve": planted.tiled_curve,
    "product space": planted.product_space,
    "x²": planted.squares,
    "circuits 20/60": partial(planted.circuits, features=20),
    "circuits 60/60": partial(planted.circuits, features=60),
    "circuits 90/60": partial(planted.circuits, features=90),
    "quiet but strong": planted.quiet_and_loud,
    "superposition 5-2": planted.superposition,
    "superposition 40-10": partial(planted.superposition, features=40, hidden=10),
    "5-2 with identity": partial(planted.superposition, identity=True),
    "40-10 with identity": partial(
        planted.superposition, features=40, hidden=10, identity=True
    ),
    "cross-layer": planted.cross_layer,
    "modular addition": planted.modular_addition,
    "world with a head": planted.world_with_head,
}
"""Name to ``key -> Task``; a new one is one row."""

QUICK: dict[str, Callable[[Array], Task]] = {
    "ignored structure": planted.ignored_structure,
    "tiled curve": planted.tiled_curve,
    "product space": planted.product_space,
    "x²": planted.squares,
    "circuits 20/60": partial(planted.circuits, steps=1500),
    "quiet but strong": planted.quiet_and_loud,
    "superposition 5-2": partial(planted.superposition, steps=1500),
    "modular addition": planted.modular_addition,
    "world with a head": partial(
        planted.world_with_head, features=128, dim=48, read=24, composed=8
    ),
}
TINY = {"product space": partial(planted.product_space, colours=2, shapes=2, dim=6)}
SHAPES: dict[str, Callable[[Array], Task]] = {
    "ignored structure 12 x 3": partial(
        planted.ignored_structure, features=12, parts=3, manifold=10
    ),
    "curve of 10 harmonics": partial(planted.tiled_curve, harmonics=10),
    "product space 5 x 13": partial(planted.product_space, colours=5, shapes=13),
    "three squares": partial(planted.squares, features=3, neurons=40),
    "circuits 30/40": partial(planted.circuits, features=30, neurons=40),
    "20 quiet and 40 loud": partial(planted.quiet_and_loud, dim=48, quiet=20, loud=40),
    "superposition 20-6": partial(planted.superposition, features=20, hidden=6),
    "superposition 6-2": partial(planted.superposition, features=6, hidden=2),
    "cross-layer 12": partial(planted.cross_layer, features=12),
    "addition mod 71": partial(planted.modular_addition, modulus=71),
    "world of 2048": partial(planted.world_with_head, features=2048, dim=256),
}
"""The same kinds of tasks, of sizes that no method was made with."""

SIZES = {
    "full": (TASKS, Budget(), 5),
    "shapes": (SHAPES, Budget(), 1),
    "quick": (QUICK, Budget(6000, 500, 256), 1),
    "tiny": (TINY, Budget(400, 20, 64), 1),
}
"""Size to tasks, budget of a method and seeds."""

SCORES = 2  # raised where a score changes its meaning: such rows are not mixed
WORLD = "world with a head"
HARD = tuple(TASKS)[:8]  # tasks that activations alone must not solve
EASY = 0.8
OF_ACTS = ("activation PCA", "standard", "TopK", "BatchTopK", "Matryoshka")
GENERAL = "consensus"
ARGUMENT = (
    "Each task is a model whose features are known: the directions that its own "
    "computation reads. A method sees the model and its inputs, nothing else, and "
    "returns readers and writers; coverage is the mean |cos| of every true feature "
    "with the found one it is paired with, one to one, and 0 without a partner.",
    "The oracle is a dictionary of gradients that starts at the truth and is trained "
    "on: where it loses the truth, so must a method that trains one.",
)


def measured(
    task: Task, name: str, method: str, seed: int, budget: Budget
) -> dict[str, Any]:
    """One row: a method's scores on a task."""
    key = jax.random.fold_in(jax.random.key(1), seed)
    start = time.perf_counter()
    if method == leaderboard.ORACLE:
        found = oracle(key, task, budget=budget)
    else:
        found = METHODS[method](key, planted.blind(task), budget=budget)
    jax.block_until_ready(found)
    seconds = time.perf_counter() - start
    scores = tf.scores(jax.random.fold_in(key, 1), task, found)
    size = {"features": len(task.truth.frequency), "dim": found.readers.shape[1]}
    more = {"side": task.side, "seed": seed, "fit": task.fit, "seconds": seconds}
    return row(name, size, method, **scores._asdict(), **more)


def verdicts(
    rows: list[dict[str, Any]], failed: Sequence[tuple[str, str, str]] = ()
) -> list[tuple[str, ...]]:
    """Lines on the bars: what is asked of the tasks, and of the general method.

    Tasks on which a method ``failed`` have none: their best would be of fewer.
    """
    table = leaderboard.medians(rows)
    names = list(dict.fromkeys(one["case"] for one in rows))
    names = [name for name in names if name not in {task for task, *_ in failed}]
    methods = {one["method"] for one in rows}
    lines: list[tuple[str, ...]] = [("bar", "task", "figure", "wanted", "")]

    def add(bar: str, task: str, figure: float, wanted: str, good: bool) -> None:
        lines.append((bar, task, f"{figure:.3f}", wanted, "ok" if good else "MISSED"))

    for task in (n for n in names if n in HARD):
        for method in OF_ACTS:
            if (task, method) in table:
                value = table[task, method]
                text = f"<= {EASY}"
                add(f"too hard for {method}", task, value, text, value <= EASY)
    for task in names if GENERAL in methods else ():
        value = table.get((task, GENERAL), 0.0)
        if task == WORLD:
            best = max(table.get((task, m), 0.0) for m in METHODS if m not in OURS)
            least = min(best + 0.1, best + (1 - best) / 2)
            add(f"{GENERAL} beats all", task, value, f">= {least:.3f}", value >= least)
        elif (task, leaderboard.ORACLE) in table:
            least = min(0.95, table[task, leaderboard.ORACLE] - 0.02)
            add(
                f"{GENERAL} at the ceiling",
                task,
                value,
                f">= {least:.3f}",
                value >= least,
            )
    return lines


def main() -> None:
    """Measure what is missing, then print and write all of it."""
    options = parsed()
    folder = output_folder(Path(options.out))
    if options.json:
        output_folder(Path(options.json).parent)
    path = folder / "rows.jsonl"
    rows = kept(path, options, SIZES[options.size][1])
    pages: dict[str, tuple[str, Any]] = {}
    methods, failed = fill(rows, pages, path, options)
    mine = [
        one
        for one in rows
        if one["case"] in options.tasks
        and one["method"] in methods
        and one["seed"] < options.seeds
    ]
    order = options.tasks.index, options.methods.index
    mine.sort(key=lambda r: (r["seed"], order[0](r["case"]), order[1](r["method"])))
    if mine:
        console = Console(width=max(220, Console().width))
        page = leaderboard.write_leaderboard(
            folder,
            mine,
            argument=ARGUMENT,
            header={
                "size": options.size,
                "seeds": options.seeds,
                "root": options.root,
                "jobs": options.jobs,
                "failed": failed,
            },
            tasks=pages,
            verdicts=verdicts(mine, failed),
            console=console,
        )
        print(f"the page is {page}")
        if options.json:
            lines = "".join(json.dumps(one) + "\n" for one in mine)
            Path(options.json).write_text(lines, encoding="utf-8")
    if failed:
        raise SystemExit(
            f"leaderboard: {len(failed)} rows are missing, the same command tries them "
            f"again: {'; '.join(' '.join(one) for one in failed)}"
        )


class Measured(NamedTuple):
    """What came of a task with one seed.

    Attributes:
      name: of the task.
      rows: one per method.
      failed: task, method and seed, and why, of those that raised.
      absent: methods that lack a package, and which.
      page: a paragraph on the task and a picture of it, with seed 0.
    """

    name: str
    rows: list[dict[str, Any]]
    failed: list[tuple[str, str, str]]
    absent: dict[str, str]
    page: tuple[str, Any] | None


def fill(
    rows: list[dict[str, Any]],
    pages: dict[str, tuple[str, Any]],
    path: Path,
    options: argparse.Namespace,
) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Measure what is missing; the methods that are there, and what raised where."""
    done = {(one["case"], one["method"], one["seed"]) for one in rows}
    todo = []
    tasks = options.tasks
    if options.jobs > 1:  # the longest, which are last, first: none runs alone then
        tasks = tasks[::-1]
    for seed in range(options.seeds):
        for name in tasks:
            missing = [m for m in options.methods if (name, m, seed) not in done]
            if missing or seed == 0:
                todo.append((path, options.size, options.root, seed, name, missing))
    failed: list[tuple[str, str, str]] = []
    absent: dict[str, str] = {}
    for one in side_by_side(todo, options.jobs):
        rows += one.rows
        failed += one.failed
        for method, why in one.absent.items():
            if method not in absent:
                print(f"{method} is left out: {why}", flush=True)
        absent |= one.absent
        if one.page is not None:
            pages[one.name] = one.page
    return [m for m in options.methods if m not in absent], failed


def side_by_side(todo: Sequence[tuple], jobs: int) -> Iterator[Measured]:
    """:func:`measure` of each, in that many processes, as they are ready."""
    if min(jobs, len(todo)) <= 1:
        yield from (measure(*one) for one in todo)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait by spinning
    pool = ProcessPoolExecutor(
        min(jobs, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
    )
    try:
        futures = [pool.submit(measure, *one) for one in todo]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise SystemExit(
            f"leaderboard: a process ended, perhaps for its memory ({error}); the same "
            "command goes on, with --jobs 1 one task at a time"
        ) from error
    finally:  # an interrupt, too, does not wait for what is being measured
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def end_with_parent() -> None:
    """End this process when its parent does, so that it writes no more rows."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def measure(
    path: Path, size: str, root: int, seed: int, name: str, methods: Sequence[str]
) -> Measured:
    """Rows of the methods on a task, each written to ``path`` as it is there."""
    jax.clear_caches()  # a process can map only so many programs
    tasks, budget, _ = SIZES[size]
    key = jax.random.key(root)
    key = jax.random.fold_in(key, 1000 * seed + [*TASKS, *SHAPES].index(name))
    try:
        task = tasks[name](key)
        page = (describe(task), task_figure(key, task)) if seed == 0 else None
    except Exception as error:  # of one task: the others go on
        traceback.print_exc()
        why = f"({type(error).__name__}: {error})"
        return Measured(name, [], [(name, f"as a whole, seed {seed}", why)], {}, None)
    result = Measured(name, [], [], {}, page)
    for method in methods:
        try:
            one = measured(task, name, method, seed, budget)
        except ImportError as error:
            result.absent[method] = str(error)
            continue
        except Exception as error:  # of one method: the others go on
            traceback.print_exc()
            why = f"({type(error).__name__}: {error})"
            result.failed.append((name, f"{method}, seed {seed}", why))
            continue
        result.rows.append(one)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")
        shown = f"{leaderboard.coverage(one):.3f}, {one['seconds']:.1f} s"
        print(f"{name}, {method}, seed {seed}: {shown}", flush=True)
    return result


def kept(path: Path, options: argparse.Namespace, budget: Budget) -> list[dict]:
    """Rows that were measured before, under the same settings."""
    settings = path.with_name("settings.json")
    now = {"size": options.size, "root": options.root, "budget": budget._asdict()}
    now |= {"scores": SCORES}
    said, text = (
        one.read_text(encoding="utf-8", errors="replace") if one.exists() else ""
        for one in (settings, path)
    )
    if (said.strip() or text.strip()) and loaded(said) != now:
        raise SystemExit(
            f"leaderboard: {path.parent} holds rows of other settings, or a "
            "settings.json that is missing or damaged; give another --out, or move "
            "that folder away"
        )
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and loaded(lines[-1]) is None and not text.endswith("\n"):
        del lines[-1]  # a kill cut it off
    rows = []
    for line in lines:
        one = loaded(line)
        if one is None or not {"case", "method", "seed", "side"} <= set(one):
            raise SystemExit(
                f"leaderboard: {path} has a line that is no row, {line[:40]!r}; take "
                "it out, or give another --out"
            )
        rows.append(one)
    write_whole(settings, json.dumps(now) + "\n")
    write_whole(path, "".join(line + "\n" for line in lines))
    return rows


def loaded(text: str) -> dict[str, Any] | None:
    """The object that a line of JSON is, if it is one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parsed() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed, small tasks")
    size.add_argument("--shapes", action="store_true", help="one seed, other sizes")
    size.add_argument("--tiny", action="store_true", help="only to see that it runs")
    parser.add_argument("--seeds", type=int, help="5, or 1 of a smaller size")
    parser.add_argument(
        "--jobs", type=int, help="processes, 1 or, quick and without accelerator, 2"
    )
    parser.add_argument("--root", type=int, default=0, help="root of all task keys")
    parser.add_argument("--tasks", help="names, separated by commas")
    parser.add_argument("--methods", help="names, separated by commas")
    parser.add_argument("--out", help="folder, out/leaderboard by default")
    parser.add_argument("--json", help="also write the rows there, one per line")
    options = parser.parse_args()
    given = [name for name in SIZES if getattr(options, name, False)]
    options.size = given[0] if given else "full"
    tasks, _, seeds = SIZES[options.size]
    options.seeds = seeds if options.seeds is None else options.seeds
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if options.jobs is None:
        alone = options.size != "quick" or jax.default_backend() != "cpu"
        options.jobs = 1 if alone else min(2, os.cpu_count() or 1)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.jobs > 1 and jax.default_backend() != "cpu":
        parser.error("--jobs: an accelerator runs one process; JAX_PLATFORMS=cpu")
    every = {"tasks": list(tasks), "methods": [*METHODS, leaderboard.ORACLE]}
    for what, known in every.items():
        text = getattr(options, what)
        names = known if text is None else list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            some = ", ".join(known)
            parser.error(f"--{what}: there is no {unknown[0]!r}; there are {some}")
        setattr(options, what, names)
    if options.out is None:
        name = (
            "leaderboard" if options.size == "full" else f"leaderboard-{options.size}"
        )
        options.out = f"out/{name}"
    return options


if __name__ == "__main__":
    main()
