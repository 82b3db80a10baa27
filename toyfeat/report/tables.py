"""Tables of figures and of text, for the terminal, for HTML and as JSON.

A :class:`Row` is a figure over several seeds beside the bound that it should keep;
functions named ``lines`` take a heading line and lines of text.
"""

import html
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import toyfeat as ft
from toyfeat.files.atomic import write_whole
from toyfeat.report.names import printable

_WIDE = 110  # columns of a terminal from which on ranges and random figures fit
_SMALL, _LARGE = 1e-3, 1e5  # where 4 digits take more room than a power of 10
_NEARLY_ONE = 0.999  # three nines, which 4 digits can still show


class Bound(NamedTuple):
    """The value that a figure should have, or the limit that it should keep.

    Attributes:
      relation: ``"near"``, ``"at least"``, ``"at most"``, ``"below"`` or
        ``"equals"``.
      value: the target.
      margin: how far ``"near"`` reaches.
      source: where the target comes from: a closed form or a measurement.
    """

    relation: str
    value: float
    margin: float = 0.0
    source: str = ""

    def holds(self, figure: float) -> bool:
        """Return whether a figure keeps the bound; False for NaN."""
        return {
            "near": abs(figure - self.value) <= self.margin,
            "at least": figure >= self.value,
            "at most": figure <= self.value,
            "below": figure < self.value,
            "equals": figure == self.value,
        }[self.relation]

    def __str__(self) -> str:
        margin = f" ± {_short(self.margin)}" if self.relation == "near" else ""
        source = f" ({self.source})" if self.source else ""
        return f"{self.relation} {_short(self.value)}{margin}{source}"


class Row(NamedTuple):
    """A figure of a case, over several seeds.

    Attributes:
      case: name of the model and its data.
      name: of the figure.
      values: a value per seed.
      bound: of the median, or ``None`` if it is only shown.
      random: the same figure for random directions, or ``None`` if that has no
        meaning.
    """

    case: str
    name: str
    values: tuple[float, ...]
    bound: Bound | None = None
    random: float | None = None

    @property
    def median(self) -> float:
        """The median over seeds; NaN if any seed is NaN."""
        return float(np.median(self.values))

    @property
    def holds(self) -> bool | None:
        """True if the median keeps its bound; ``None`` without a bound."""
        return None if self.bound is None else self.bound.holds(self.median)


def settings(options: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    """Record how a report was made: options, versions, device and duration.

    Args:
      options: settings by name; their texts are recorded.
      seconds: duration.

    Returns:
      JSON values ``settings``, ``seconds``, ``device``, ``python``, ``versions``.
    """
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "scipy")
    return {
        "settings": {name: str(value) for name, value in options.items()},
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {"toyfeat": ft.__version__}
        | {name: version(name) for name in packages},
    }


def write_json(path: Path, rows: Iterable[Row], *, header: Mapping[str, Any]) -> None:
    """Write rows, with a header of settings and versions, as one JSON object.

    Args:
      path: the file; it appears whole or not at all.
      rows: to write.
      header: further entries beside ``"rows"``, see :func:`settings`.
    """
    entries = [
        {
            "case": row.case,
            "figure": row.name,
            "median": _finite(row.median),
            "values": [_finite(value) for value in row.values],
            "expected": None if row.bound is None else row.bound._asdict(),
            "holds": row.holds,
            "random": None if row.random is None else _finite(row.random),
        }
        for row in rows
    ]
    write_whole(path, json.dumps({**header, "rows": entries}, indent=1) + "\n")


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print rows as a table with a section per case.

    Args:
      rows: in the order of their cases.
      console: where to print; ranges and random figures are left out of a narrow one.
    """
    # Columns, as far as the terminal is wide.
    wide = console.width >= _WIDE
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("figure")
    table.add_column("median", justify="right")
    if wide:
        table.add_column("range over seeds", justify="right", style="dim")
        table.add_column("random", justify="right", style="dim")
    table.add_column("expected")
    table.add_column("")
    # A heading per case, then a line per figure.
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            table.add_section()
            table.add_row(f"[bold cyan]{_text(case)}[/]")
        name, median, *details, bound, mark = cells(row)
        colour = {"ok": "green", "missed": "bold red", "": ""}[mark]
        mark = f"[{colour}]{mark}[/]" if mark else ""
        shown = details if wide else []
        table.add_row(f"  {_text(name)}", median, *shown, _text(bound), mark)
    console.print(table)


def summary(
    rows: Sequence[Row], columns: Sequence[tuple[str, str]]
) -> list[tuple[str, ...]]:
    """Tabulate medians: a line per case, a column per figure.

    Args:
      rows: all figures.
      columns: heading of a column and name of its figure.

    Returns:
      The heading line, then a line for each case that has all these figures.
    """
    # Figures by case and name; a case without one of the columns has no line.
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.name] = row
    lines = [("case", *(heading for heading, _ in columns))]
    for case, figures in by_case.items():
        if all(name in figures for _, name in columns):
            medians = (figures[name].median for _, name in columns)
            lines.append((case, *(f"{median:.4f}" for median in medians)))
    return lines


def print_lines(lines: Sequence[tuple[str, ...]], console: Console) -> None:
    """Print a heading line and the lines below it as a table."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for index, heading in enumerate(lines[0]):
        justify = "right" if index else "left"
        table.add_column(_text(heading), justify=justify, no_wrap=index == 0)
    for line in lines[1:]:
        table.add_row(*map(_text, line))
    console.print(table)


def _text(name: str) -> str:
    """Escape control characters of a terminal and the markup of rich."""
    return escape(printable(name))


def html_lines(lines: Sequence[tuple[str, ...]]) -> str:
    """Return a heading line and the lines below it as an HTML table."""
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in lines[0])
    body = [
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>"
        for line in lines[1:]
    ]
    return "\n".join([f"<table><thead><tr>{heads}</tr></thead>", *body, "</table>"])


def html_table(rows: Sequence[Row]) -> str:
    """Return rows as an HTML table with a group of rows per case."""
    head = "".join(
        f"<th>{title}</th>"
        for title in ("figure", "median", "range", "random", "expected", "")
    )
    lines = [f"<table><thead><tr>{head}</tr></thead>"]
    # A group of rows opens where the case changes; HTML closes it by itself.
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            lines.append(
                f'<tbody><tr><th colspan="6" scope="rowgroup">{html.escape(case)}'
                "</th></tr>"
            )
        *texts, mark = (html.escape(cell) for cell in cells(row))
        body = "".join(f"<td>{text}</td>" for text in texts)
        lines.append(f'<tr>{body}<td class="{mark}">{mark}</td></tr>')
    return "\n".join([*lines, "</table>"])


def cells(row: Row) -> tuple[str, str, str, str, str, str]:
    """Format a row: name, median, range, random, expected, "ok" or "missed"."""
    low, high = min(row.values), max(row.values)
    return (
        row.name,
        _short(row.median),
        f"{_short(low)} … {_short(high)}" if len(row.values) > 1 else "",
        "" if row.random is None else _short(row.random),
        "" if row.bound is None else str(row.bound),
        {None: "", True: "ok", False: "missed"}[row.holds],
    )


def spread(values: Sequence[float], form: str) -> str:
    """Format a median, with the range of the values where it can be seen.

    Args:
      values: at least one.
      form: format of a number.

    Returns:
      The median; with least and largest value if these are written differently.

    Example:
      >>> spread([0.3, 0.1, 0.4], ".2f"), spread([2, 2], ".3g")
      ('0.30 (0.10 to 0.40)', '2')
    """
    middle, low, high = (
        format(x, form) for x in (median(values), min(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def _short(value: float) -> str:
    """Format with 4 digits, 6 decimals next to 1, and powers of 10 far from it."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.3g}"
    if not _SMALL <= abs(value) < _LARGE:
        return f"{value:.2e}"
    # Four digits would round cosines and shares of nearly 1 to 1.
    if _NEARLY_ONE < abs(value) < 1:
        return f"{value:.6f}"
    return f"{value:.4g}"


def _finite(value: float) -> float | str:
    """Return a number that JSON can hold: NaN and infinities as strings."""
    return float(value) if math.isfinite(value) else str(value)
