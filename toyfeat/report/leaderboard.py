"""Tables, a picture and a page of the scores of methods on planted tasks."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from toyfeat.files.atomic import write_whole
from toyfeat.report import page
from toyfeat.report.names import label, printable
from toyfeat.report.plots import data_uri, figure, png
from toyfeat.report.tables import html_lines, print_lines, spread

ORACLE = "oracle"
"""The method that starts at the truth; its coverage is a task's ceiling."""

MECHANISM_COLUMNS = ("mechanisms", "inside", "num_mechanisms")
"""Further fields, shown where all rows of a task have them."""

COLUMNS = (
    "readers",
    "writers",
    "precision",
    "found",
    "random",
    "ignored",
    "preserved",
    "seconds",
)
"""Fields of a row that the table of a task shows."""

_CONTROLS = "Mechanisms returned where nothing is planted: all of them false"

# Cells of the picture that are darker than this have white text (viridis).
_DARK = 0.6


def coverage(row: Mapping[str, Any]) -> float:
    """Coverage of the side that is scored in the row's task."""
    return float(row[row["side"]])


def is_control(row: Mapping[str, Any]) -> bool:
    """Return whether nothing is planted in the row's task."""
    return row.get("size", {}).get("features") == 0


def control_lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Tabulate how many mechanisms methods return where there are none.

    Args:
      rows: of tasks in which nothing is planted.

    Returns:
      A heading line and a line per method: the median over seeds, with the range.
    """
    tasks, methods = _names(rows)
    lines: list[tuple[str, ...]] = [("method", *tasks)]
    for method in methods:
        counts = [
            [r["num_mechanisms"] for r in rows if (r["case"], r["method"]) == pair]
            for pair in ((task, method) for task in tasks)
        ]
        lines.append((method, *(spread(c, ".3g") if c else "" for c in counts)))
    return lines


def medians(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Median coverage over seeds, by ``(task, method)``."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["case"], row["method"]), []).append(coverage(row))
    return {pair: median(numbers) for pair, numbers in values.items()}


def summary_lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Tabulate median coverage, methods down and tasks across.

    Args:
      rows: from ``benchmarks/leaderboard.py``.

    Returns:
      A heading line and a line per method; the best of a column, but for the oracle,
      has a star.
    """
    # The best of a task, where the oracle, which knows the truth, does not count.
    table, tasks, methods = medians(rows), *_names(rows)
    best = {
        task: max(table.get((task, m), 0.0) for m in methods if m != ORACLE)
        for task in tasks
        if any(m != ORACLE for m in methods)
    }
    lines: list[tuple[str, ...]] = [("method", *tasks)]
    for method in methods:
        cells = []
        for task in tasks:
            value = table.get((task, method))
            star = "*" if method != ORACLE and value == best.get(task) else ""
            cells.append("" if value is None else f"{value:.3f}{star}")
        lines.append((method, *cells))
    return lines


def task_lines(rows: Sequence[Mapping[str, Any]], task: str) -> list[tuple[str, ...]]:
    """Tabulate every score of a task: medians over seeds, with their range.

    Args:
      rows: from ``benchmarks/leaderboard.py``.
      task: name.

    Returns:
      A heading line and a line per method.
    """
    task_rows = [row for row in rows if row["case"] == task]
    more = [c for c in MECHANISM_COLUMNS if all(c in row for row in task_rows)]
    columns = (*COLUMNS, *more)
    lines: list[tuple[str, ...]] = [("method", *columns)]
    for method in _names(task_rows)[1]:
        seeds = [row for row in task_rows if row["method"] == method]
        cells = [spread([row[name] for row in seeds], ".3g") for name in columns]
        lines.append((method, *cells))
    return lines


def heat_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the median coverage of every method on every task.

    Args:
      rows: from ``benchmarks/leaderboard.py``.

    Returns:
      A matplotlib figure, not registered with pyplot.

    Raises:
      ImportError: without matplotlib, naming the extra.
    """
    # A line per method and a column per task, grey where a method was not run.
    table, tasks, methods = medians(rows), *_names(rows)
    values = np.array([[table.get((t, m), np.nan) for t in tasks] for m in methods])
    drawn = figure(2.6 + 0.72 * len(tasks), 1.6 + 0.34 * len(methods))
    axis = drawn.subplots()
    shades = np.ma.masked_invalid(values)
    image = axis.imshow(shades, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_facecolor("#e4e4e4")
    # Every cell has its figure, legible on its shade.
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value < _DARK else "black"
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center", color=colour, size=7
            )
    columns, lines = [*map(label, tasks)], [*map(label, methods)]
    axis.set_xticks(range(len(tasks)), columns, rotation=40, ha="right", size=8)
    axis.set_yticks(range(len(methods)), lines, size=8)
    drawn.colorbar(image, ax=axis, label="coverage of the true features", shrink=0.8)
    return drawn


def write_leaderboard(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    argument: Sequence[str],
    header: Mapping[str, Any],
    tasks: Mapping[str, tuple[str, Any]] | None = None,
    verdicts: Sequence[tuple[str, ...]] = (),
    console: Console | None = None,
) -> Path:
    """Write ``leaderboard.json``, ``leaderboard.png`` and ``leaderboard.html``.

    Args:
      folder: an existing folder.
      rows: of every task, method and seed.
      argument: paragraphs of plain text above the picture.
      header: settings, beside the rows in the JSON.
      tasks: task to a paragraph and a matplotlib figure, or ``None`` for no figure.
      verdicts: a heading line and lines on bars.
      console: where to print the tables; ``None`` for nowhere.

    Returns:
      The path of the page.

    Raises:
      ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("write_leaderboard: there are no rows")
    # The rows, the picture of all tasks, and a page with a section per task.
    text = json.dumps({**header, "rows": list(rows)}, indent=1, allow_nan=False)
    write_whole(folder / "leaderboard.json", text + "\n")
    controls = [row for row in rows if is_control(row)]
    planted = [row for row in rows if not is_control(row)]
    body = [page.paragraph(part) for part in argument]
    if planted:
        image = png(heat_figure(planted))
        (folder / "leaderboard.png").write_bytes(image)
        caption = "Coverage of the side that each task is about, median over seeds."
        body += [page.picture(data_uri(image), caption)]
    sections = [page.section("All methods on all tasks", body)]
    if controls:
        table = page.table(html_lines(control_lines(controls)))
        sections.append(page.section(_CONTROLS, [table]))
    if verdicts:
        sections.append(page.section("Bars", [page.table(html_lines(verdicts))]))
    sections += [_task_section(rows, task, tasks or {}) for task in _names(rows)[0]]
    footer = ", ".join(f"{name}: {value}" for name, value in header.items())
    title = "What every method finds in models with known features"
    page.write_page(folder / "leaderboard.html", title, sections, footer)
    if console is not None:
        _print_tables(rows, verdicts, console)
    return folder / "leaderboard.html"


def _task_section(
    rows: Sequence[Mapping[str, Any]], task: str, pages: Mapping[str, tuple[str, Any]]
) -> str:
    """Section of the page: a paragraph and a picture, if there are, and the scores."""
    parts = []
    if task in pages:
        text, drawn = pages[task]
        parts = [page.paragraph(text)]
        if drawn is not None:
            parts.append(page.picture(data_uri(png(drawn)), task))
    parts.append(page.table(html_lines(task_lines(rows, task))))
    return page.section(task, parts)


def _print_tables(
    rows: Sequence[Mapping[str, Any]],
    verdicts: Sequence[tuple[str, ...]],
    console: Console,
) -> None:
    """Print the tables of all tasks, the summary and the verdicts."""
    for task in _names(rows)[0]:
        console.print(printable(task), markup=False)
        print_lines(task_lines(rows, task), console)
        console.print()
    controls = [row for row in rows if is_control(row)]
    planted = [row for row in rows if not is_control(row)]
    if planted:
        print_lines(summary_lines(planted), console)
    if controls:
        console.print(f"\n{_CONTROLS}", markup=False)
        print_lines(control_lines(controls), console)
    if verdicts:
        console.print()
        print_lines(verdicts, console)


def _names(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Names of tasks and methods in order of appearance, the oracle last."""
    rows = list(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.sort(key=lambda name: name == ORACLE)
    return list(dict.fromkeys(row["case"] for row in rows)), methods
