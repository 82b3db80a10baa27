"""Tables of figures and of text, for the terminal, for HTML and as JSON.

A :class:`Row` is a figure over several seeds beside the bound that it should keep;
functions named ``lines`` take a heading line and lines of text.
"""

import html
import json
import math
import platform
import re
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
from toyfeat.report.numbers import aligned, rounded, short

_WIDE = 110  # columns of a terminal from which on ranges and random figures fit
_HEADINGS = ("figure", "median", "least", "most", "random", "expected", "")
_NUMBERS = range(1, 5)  # columns of numbers among these
_DETAILS = range(2, 5)  # those that a narrow screen leaves out
_NUMERIC = re.compile(r"[-+≈<]? ?[\d.,]+(e-?\d+)? ?%?\*?|nan|-?inf|")


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
        margin = f" ± {short(self.margin, 2)}" if self.relation == "near" else ""
        source = f" ({self.source})" if self.source else ""
        return f"{self.relation} {short(self.value)}{margin}{source}"


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
    shown = [i for i in range(len(_HEADINGS)) if wide or i not in _DETAILS]
    for i in shown:
        style = "dim" if i in _DETAILS else None
        table.add_column(_HEADINGS[i], style=style, no_wrap=i in _NUMBERS)
    # A heading per case, then a line per figure.
    case = None
    for row, line in zip(rows, lines_of(rows), strict=True):
        if row.case != case:
            case = row.case
            table.add_section()
            table.add_row(f"[bold cyan]{_text(case)}[/]")
        name, *numbers, bound, mark = line
        colour = {"ok": "green", "missed": "bold red", "": ""}[mark]
        mark = f"[{colour}]{mark}[/]" if mark else ""
        texts = (f"  {_text(name)}", *numbers, _text(bound), mark)
        table.add_row(*(texts[i] for i in shown))
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
    """Return a heading line and the lines below it as an HTML table.

    A column of numbers is set to the right.
    """
    columns = zip(*lines[1:], strict=True)
    look = [' class="num"' if all(map(_is_number, texts)) else "" for texts in columns]
    look = look or [""] * len(lines[0])

    def tags(tag: str, line: tuple[str, ...]) -> str:
        cells = zip(line, look, strict=True)
        texts = (f"<{tag}{c}>{html.escape(text)}</{tag}>" for text, c in cells)
        return f"<tr>{''.join(texts)}</tr>"

    body = [tags("td", line) for line in lines[1:]]
    return "\n".join(
        [f"<table><thead>{tags('th', lines[0])}</thead>", *body, "</table>"]
    )


def _is_number(text: str) -> bool:
    """Return whether a cell holds a number, with its sign, range or per cent."""
    return all(_NUMERIC.fullmatch(part) for part in re.split(r" \(| to |\)", text))


def html_table(rows: Sequence[Row]) -> str:
    """Return rows as an HTML table with a group of rows per case, if there are several.

    Cells of class ``detail`` are those that a narrow screen leaves out.
    """
    kinds = [
        " ".join(["num"] * (i in _NUMBERS) + ["detail"] * (i in _DETAILS))
        for i in range(len(_HEADINGS) - 1)
    ]
    look = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(
        f"<th{kind}>{title}</th>"
        for title, kind in zip(_HEADINGS, [*look, ""], strict=True)
    )
    lines = [f"<table><thead><tr>{head}</tr></thead>"]
    # A group of rows opens where the case changes; HTML closes it by itself.
    case = None if len({row.case for row in rows}) > 1 else rows[0].case
    for row, line in zip(rows, lines_of(rows), strict=True):
        if row.case != case:
            case = row.case
            lines.append(
                f'<tbody><tr><th colspan="7" scope="rowgroup">{html.escape(case)}'
                "</th></tr>"
            )
        *texts, mark = map(html.escape, line)
        cells = zip(texts, look, strict=True)
        body = "".join(f"<td{kind}>{text}</td>" for text, kind in cells)
        lines.append(f'<tr>{body}<td class="{mark}">{mark}</td></tr>')
    return "\n".join([*lines, "</table>"])


def lines_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Format rows: name, median, least, most, random, expected, "ok" or "missed".

    Numbers are rounded for people, and those of a column have their points in line.
    """
    columns = list(zip(*map(_cells, rows), strict=True))
    for i in _NUMBERS:
        columns[i] = tuple(aligned(columns[i]))
    return list(zip(*columns, strict=True))


def _cells(row: Row) -> tuple[str, ...]:
    """Format a row; nothing is padded."""
    several = len(row.values) > 1
    return (
        row.name,
        _median_text(row),
        rounded(min(row.values)) if several else "",
        rounded(max(row.values)) if several else "",
        "" if row.random is None else rounded(row.random),
        "" if row.bound is None else str(row.bound),
        {None: "", True: "ok", False: "missed"}[row.holds],
    )


def _median_text(row: Row) -> str:
    """Round a median, unless that would say something else about its bound."""
    text = rounded(row.median)
    shown = 0.0 if text.startswith("≈") else float(text.replace(",", ""))
    if row.bound is not None and row.bound.holds(shown) != row.holds:
        return short(row.median, 6)
    return text


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


def _finite(value: float) -> float | str:
    """Return a number that JSON can hold: NaN and infinities as strings."""
    return float(value) if math.isfinite(value) else str(value)
