"""Sweeps as one table, two pictures and one page.  Pictures need matplotlib.

Everything takes *families*: a name to the members of one population each, so that
several methods can be looked at side by side.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from toyfeat.report import page
from toyfeat.report.figures import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    data_uri,
    figure,
    plain_ticks,
    png,
)
from toyfeat.report.rows import html_lines, print_lines, write_whole
from toyfeat.train.sweeps import pareto_front, value_of
from toyfeat.types import Member

Families = Mapping[str, Sequence[Member]]

_COLOURS = (BLUE, RED, GREEN, ORANGE)
_MARKERS = "os^D"


def table_lines(
    families: Families, figures: Sequence[str] | None = None
) -> list[tuple[str, ...]]:
    """A heading line, then a line for every member of every family.

    Args:
      families: name to members.
      figures: which; all of the first member by default.

    Returns:
      Texts for :func:`toyfeat.report.rows.print_lines` and ``html_lines``.
    """
    every = [m for members in families.values() for m in members]
    settings = list(dict.fromkeys(name for m in every for name in m.settings))
    if figures is None:
        figures = list(dict.fromkeys(name for m in every for name in m.figures))
    lines = [("family", "member", *settings, *figures, "state")]
    for family, members in families.items():
        for m in members:
            known = {**m.settings, **m.figures}
            cells = (_cell(known.get(name)) for name in (*settings, *figures))
            lines.append((family, str(m.index), *cells, _state_of(m)))
    return lines


def front_figure(
    families: Families, x: str, y: str, *, larger: Sequence[str] = ()
) -> Any:
    """Every member as a point, the Pareto front of each family as a line.

    Args:
      families: name to members.
      x: figure on the horizontal axis, logarithmic where it ranges far; what is next
        to 0 is drawn at the border.
      y: figure on the vertical axis, likewise.
      larger: which of the two should be large, see :func:`toyfeat.pareto_front`.

    Returns:
      A matplotlib figure, not registered with pyplot.

    Raises:
      ImportError: without matplotlib, naming the extra.
      ValueError: for a figure that members do not have.
    """
    drawn = figure(6.6, 4.6)
    axis = drawn.subplots()
    scales = [_scale(families, name) for name in (x, y)]
    for i, (name, members) in enumerate(families.items()):
        look = {"color": _COLOURS[i % 4], "marker": _MARKERS[i % 4], "alpha": 0.5}
        points = _points(members, (x, y), scales)
        whole = np.array([m.finite for m in members]) & np.isfinite(points).all(1)
        stuck = whole & np.array([m.saturated for m in members])
        said = f"{name}: {whole.sum()} of {len(members)} runs finite"
        axis.scatter(*points[whole & ~stuck].T, s=26, label=said, **look)
        if stuck.any():
            said = f"{name}: {stuck.sum()} saturated"
            axis.scatter(*points[stuck].T, s=40, fc="none", label=said, **look)
        front = pareto_front(members, x, y, larger=larger)
        line = _points(front, (x, y), scales).T
        steps = "steps-pre" if x in larger else "steps-post"
        style = {"color": look["color"], "lw": 2, "drawstyle": steps}
        axis.plot(*line, label=f"{name}: Pareto front", **style)
    sides = [
        f"{n} ({'larger' if n in larger else 'smaller'} is better)" for n in (x, y)
    ]
    axis.set(xlabel=sides[0], ylabel=sides[1], xscale=scales[0][1], yscale=scales[1][1])
    axis.set_title(f"{y} against {x}")
    for side, (_, scale) in zip((axis.xaxis, axis.yaxis), scales, strict=True):
        if scale == "log":
            plain_ticks(side)
    axis.grid(alpha=0.25, which="both", lw=0.5)
    axis.legend(fontsize=8, framealpha=0.9)
    return drawn


def brittleness_figure(
    families: Families,
    x: str,
    y: str,
    *,
    score: str,
    good: float,
    larger: bool = True,
    middle: Callable[[Sequence[float]], Any] = np.median,
    limits: tuple[float, float] | None = None,
) -> Any:
    """A score over the grid of two hyper-parameters, one panel per family.

    Both axes are logarithmic.  A cell is the middle of its members (other settings,
    random starts); one whose members are not all finite has a cross, one with a
    saturated controller a ring, and one without any finite member is grey.

    Args:
      families: name to members, all with settings ``x`` and ``y``.
      x: hyper-parameter on the horizontal axis, positive.
      y: hyper-parameter on the vertical axis, positive.
      score: figure that is the colour.
      good: from where on the score is a success; the title has the share.
      larger: whether a score should be large.
      middle: of the scores of a cell; the mean of zeros and ones is a share.
      limits: of the colours, by default the least and the largest score.

    Returns:
      A matplotlib figure, not registered with pyplot.

    Raises:
      ImportError: without matplotlib, naming the extra.
      ValueError: for families without members, names that members do not have, and
        settings that are not positive.
    """
    if not families or not all(families.values()):
        raise ValueError("brittleness_figure: wanted families with members")
    drawn = figure(1.2 + 4.6 * len(families), 4.3)
    panels = drawn.subplots(1, len(families), squeeze=False, sharey=True)[0]
    every = [value_of(m, score) for ms in families.values() for m in ms if m.finite]
    every = [value for value in every if np.isfinite(value)] or [0.0, 1.0]
    low, high = limits or (min(every), max(every))
    look = {"vmin": low, "vmax": high, "cmap": "viridis" if larger else "viridis_r"}
    image = None
    for axis, (name, members) in zip(panels, families.items(), strict=True):
        image = _draw_cells(axis, members, (x, y), score, middle, look)
        share = success_share(members, score, good, larger=larger)
        word = "≥" if larger else "≤"
        axis.set_title(
            f"{name}\n{share:.0%} of runs have {score} {word} {good:g}", fontsize=10
        )
        axis.set_xlabel(x)
    panels[0].set_ylabel(y)
    drawn.colorbar(image, ax=list(panels), label=score, shrink=0.9)
    return drawn


def success_share(
    members: Sequence[Member], score: str, good: float, *, larger: bool = True
) -> float:
    """Share of members that are finite and have a good score."""
    if not members:
        raise ValueError("success_share: there are no members")
    values = np.array([value_of(m, score) if m.finite else np.nan for m in members])
    return float(np.mean(values >= good if larger else values <= good))


def write_sweep(
    folder: Path,
    families: Families,
    pictures: Mapping[str, tuple[Any, str]],
    *,
    title: str,
    argument: Sequence[str],
    header: Mapping[str, Any],
    figures: Sequence[str] | None = None,
    console: Console | None = None,
) -> Path:
    """Write ``sweep.json``, a PNG per picture and ``sweep.html``; print the table.

    Args:
      folder: an existing folder.
      families: name to members.
      pictures: slug to a matplotlib figure and its caption.
      title: of the page.
      argument: paragraphs of plain text above the pictures.
      header: settings and versions, beside the members in the JSON.
      figures: columns of the table, see :func:`table_lines`; JSON has them all.
      console: where to print; ``None`` for nowhere.

    Returns:
      The path of the page.
    """
    entries = [
        {"family": family, **_plain(member._asdict())}
        for family, members in families.items()
        for member in members
    ]
    text = json.dumps({**header, "members": entries}, indent=1, allow_nan=False)
    write_whole(folder / "sweep.json", text + "\n")
    lines = table_lines(families, figures)
    body = [page.paragraph(text) for text in argument]
    if bad := [slug for slug in pictures if not re.fullmatch(r"[\w-]+", slug)]:
        raise ValueError(f"write_sweep: a slug must be a plain name, got {bad[0]!r}")
    for slug, (drawn, caption) in pictures.items():
        image = png(drawn)
        (folder / f"{slug}.png").write_bytes(image)
        body.append(page.picture(data_uri(image), caption))
    sections = [
        page.section("What was found", body),
        page.section("All runs", [page.table(html_lines(lines))]),
    ]
    footer = ", ".join(f"{name}: {value}" for name, value in header.items())
    page.write_page(folder / "sweep.html", title, sections, footer)
    if console is not None:
        print_lines(lines, console)
    return folder / "sweep.html"


def _draw_cells(
    axis: Any,
    members: Sequence[Member],
    names: tuple[str, str],
    score: str,
    middle: Callable[[Sequence[float]], Any],
    look: dict[str, Any],
) -> Any:
    places = np.array([[value_of(m, name) for name in names] for m in members])
    if not np.all(places > 0):
        raise ValueError(
            f"brittleness_figure: axes are logarithmic, wanted {names[0]} and "
            f"{names[1]} > 0, got {places.min():g}"
        )
    ticks = [np.unique(column) for column in places.T]
    cells, cross, ring = _cells(members, places, ticks, score, middle)
    edges = [_edges(values) for values in ticks]
    image = axis.pcolormesh(*edges, np.ma.masked_invalid(cells), **look)
    axis.set(xscale="log", yscale="log", facecolor="#e4e4e4")
    for marks, symbol, size, colours in (
        (cross, "x", 9, ("white", RED)),
        (ring, "o", 11, ("black", "white")),
    ):
        rows, columns = np.nonzero(marks)
        for colour, width in zip(colours, (4.0, 1.8), strict=True):  # seen on any cell
            look = {"ms": size, "mew": width, "mfc": "none", "color": colour}
            axis.plot(ticks[0][columns], ticks[1][rows], symbol, **look)
    for side, values in ((axis.xaxis, ticks[0]), (axis.yaxis, ticks[1])):
        side.set_ticks(values, [f"{value:.2g}" for value in values])
        side.set_ticks([], minor=True)
    return image


def _cells(
    members: Sequence[Member],
    places: np.ndarray,
    ticks: list[np.ndarray],
    score: str,
    middle: Callable[[Sequence[float]], Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The score of every cell, whether a run of it diverged or was saturated."""
    cells = np.full((len(ticks[1]), len(ticks[0])), np.nan)
    cross, ring = np.zeros((2, *cells.shape), bool)
    for row, column in np.ndindex(cells.shape):
        here = (places == [ticks[0][column], ticks[1][row]]).all(1)
        mine = [m for m, there in zip(members, here, strict=True) if there]
        values = [value_of(m, score) for m in mine if m.finite]
        cells[row, column] = middle(values) if values else np.nan
        cross[row, column] = any(not m.finite for m in mine)
        ring[row, column] = any(m.saturated for m in mine)
    return cells, cross, ring


def _edges(values: np.ndarray) -> np.ndarray:
    """Borders of cells around ascending values, half way in logarithms."""
    logs = np.log(values)
    middle = (logs[1:] + logs[:-1]) / 2
    step = np.diff(logs)[[0, -1]] / 2 if len(logs) > 1 else np.log([2.0, 2.0])
    return np.exp(np.concatenate([[logs[0] - step[0]], middle, [logs[-1] + step[1]]]))


def _scale(families: Families, name: str) -> tuple[float, str]:
    """The least value that is drawn, and the scale of an axis.

    Logarithmic for figures that are never negative and range over a factor of 10;
    what is less than 1e-3 of the largest is drawn there.
    """
    every = np.array([value_of(m, name) for ms in families.values() for m in ms])
    every = every[np.isfinite(every)]
    some = every[every > 0]
    if not some.size or every.min() < 0 or some.max() < 10 * some.min():
        return -np.inf, "linear"
    return max(float(some.min()), 1e-3 * float(some.max())), "log"


def _points(
    members: Sequence[Member],
    names: tuple[str, str],
    scales: Sequence[tuple[float, str]],
) -> np.ndarray:
    points = np.array([[value_of(m, name) for name in names] for m in members])
    return np.maximum(points.reshape(-1, 2), [floor for floor, _ in scales])


def _state_of(member: Member) -> str:
    words = [] if member.finite else ["not finite"]
    return ", ".join(words + ["saturated"] * member.saturated) or "ok"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """JSON has no NaN; a string says it instead."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
