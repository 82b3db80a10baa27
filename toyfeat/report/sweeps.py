"""Render sweeps: a table, a Pareto front, a map of scores, a page.

Pictures need matplotlib.  All functions take *families*, which map a name to the
members of a population, so that methods can be compared side by side.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from toyfeat.files.atomic import write_whole
from toyfeat.report import page
from toyfeat.report.names import label
from toyfeat.report.plots import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    data_uri,
    figure,
    plain_ticks,
    png,
)
from toyfeat.report.sweep_cells import draw_cells
from toyfeat.report.tables import html_lines, print_lines
from toyfeat.train.sweeps import Row, pareto_front, value_of

Families = Mapping[str, Sequence[Row]]
"""Name of a population to its members."""

_COLOURS = (BLUE, RED, GREEN, ORANGE)
_MARKERS = "os^D"
_LOG_RANGE = 10  # largest / smallest value from which on an axis is logarithmic
_FLOOR = 1e-3  # of the largest value: smaller ones are drawn at the border


def table_lines(
    families: Families, figures: Sequence[str] | None = None
) -> list[tuple[str, ...]]:
    """Tabulate members: a heading line, then a line for each member of each family.

    Args:
      families: name to members.
      figures: columns; by default all figures that a member has.

    Returns:
      Texts for :func:`toyfeat.report.tables.print_lines` and ``html_lines``.
    """
    all_members = [m for members in families.values() for m in members]
    settings = list(dict.fromkeys(name for m in all_members for name in m.settings))
    if figures is None:
        figures = list(dict.fromkeys(name for m in all_members for name in m.figures))
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
    """Draw every member as a point and the Pareto front of each family as a line.

    Args:
      families: name to members.
      x: figure on the horizontal axis, logarithmic where it ranges far; values next
        to 0 are drawn at the border.
      y: figure on the vertical axis, likewise.
      larger: those of the two that should be large, see
        :func:`toyfeat.sweeps.pareto_front`.

    Returns:
      A matplotlib figure, not registered with pyplot.

    Raises:
      ImportError: without matplotlib, naming the extra.
      ValueError: for a figure that members do not have.
    """
    picture = figure(6.6, 4.6)
    axis = picture.subplots()
    scales = [_scale(families, name) for name in (x, y)]
    # Points (hollow if the controller was at a limit), then the front as steps.
    for i, (name, members) in enumerate(families.items()):
        look = {"color": _COLOURS[i % 4], "marker": _MARKERS[i % 4], "alpha": 0.5}
        points = _points(members, (x, y), scales)
        finite = np.array([m.finite for m in members]) & np.isfinite(points).all(1)
        saturated = finite & np.array([m.saturated for m in members])
        text = label(f"{name}: {finite.sum()} of {len(members)} runs finite")
        axis.scatter(*points[finite & ~saturated].T, s=26, label=text, **look)
        if saturated.any():
            text = label(f"{name}: {saturated.sum()} saturated")
            axis.scatter(*points[saturated].T, s=40, fc="none", label=text, **look)
        front = pareto_front(members, x, y, larger=larger)
        line = _points(front, (x, y), scales).T
        steps = "steps-pre" if x in larger else "steps-post"
        style = {"color": look["color"], "lw": 2, "drawstyle": steps}
        axis.plot(*line, label=label(f"{name}: Pareto front"), **style)
    # Axes.
    labels = [
        label(f"{n} ({'larger' if n in larger else 'smaller'} is better)")
        for n in (x, y)
    ]
    (_, xscale), (_, yscale) = scales
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale=xscale, yscale=yscale)
    axis.set_title(label(f"{y} against {x}"))
    for side, (_, scale) in zip((axis.xaxis, axis.yaxis), scales, strict=True):
        if scale == "log":
            plain_ticks(side)
    axis.grid(alpha=0.25, which="both", lw=0.5)
    axis.legend(fontsize=8, framealpha=0.9)
    return picture


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
    """Draw a score over the grid of two hyper-parameters, one panel per family.

    Both axes are logarithmic.  The colour of a cell is the middle of the scores of
    its members (other settings, random starts).  A cross marks cells with a member
    that is not finite, a ring those with a saturated controller; cells without a
    finite member are grey.

    Args:
      families: name to members, all with settings ``x`` and ``y``.
      x: hyper-parameter on the horizontal axis, positive.
      y: hyper-parameter on the vertical axis, positive.
      score: figure for the colour.
      good: score from which on a run is a success; the title has their share.
      larger: whether a score should be large.
      middle: median, mean or the like; the mean of zeros and ones is a share.
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
    picture = figure(1.2 + 4.6 * len(families), 4.3)
    panels = picture.subplots(1, len(families), squeeze=False, sharey=True)[0]
    # One scale of colours for all panels.
    scores = [value_of(m, score) for ms in families.values() for m in ms if m.finite]
    scores = [value for value in scores if np.isfinite(value)] or [0.0, 1.0]
    low, high = limits or (min(scores), max(scores))
    look = {"vmin": low, "vmax": high, "cmap": "viridis" if larger else "viridis_r"}
    image = None
    for axis, (name, members) in zip(panels, families.items(), strict=True):
        image = draw_cells(axis, members, (x, y), score, middle, look)
        share = success_share(members, score, good, larger=larger)
        word = "≥" if larger else "≤"
        axis.set_title(
            f"{label(name)}\n{share:.0%} of runs have {label(score)} {word} {good:g}",
            fontsize=10,
        )
        axis.set_xlabel(label(x))
    # Panels share the vertical axis and the colours.
    panels[0].set_ylabel(label(y))
    picture.colorbar(image, ax=list(panels), label=label(score), shrink=0.9)
    return picture


def success_share(
    members: Sequence[Row], score: str, good: float, *, larger: bool = True
) -> float:
    """Compute the share of members that are finite and have a good score.

    Args:
      members: at least one.
      score: a figure.
      good: score from which on a member is a success.
      larger: whether a score should be large.

    Returns:
      The share, in [0, 1].

    Raises:
      ValueError: if there are no members.
    """
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
    """Write ``sweep.json``, ``sweep.html`` and a PNG per picture; print the table.

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

    Raises:
      ValueError: if a slug is not a plain file name.
    """
    if bad := [slug for slug in pictures if not re.fullmatch(r"[\w-]+", slug)]:
        raise ValueError(f"write_sweep: a slug must be a plain name, got {bad[0]!r}")
    # The JSON, with all figures.
    entries = [
        {"family": family, **_plain(member._asdict())}
        for family, members in families.items()
        for member in members
    ]
    text = json.dumps({**header, "members": entries}, indent=1, allow_nan=False)
    write_whole(folder / "sweep.json", text + "\n")
    # The page: argument, pictures and the table.
    lines = table_lines(families, figures)
    body = [page.paragraph(text) for text in argument]
    for slug, (picture, caption) in pictures.items():
        image = png(picture)
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


def _scale(families: Families, name: str) -> tuple[float, str]:
    """Choose the least value that is drawn, and the scale of an axis.

    Logarithmic for figures that are never negative and range far (``_LOG_RANGE``);
    there a value is drawn no lower than ``_FLOOR`` of the largest.
    """
    # Finite values decide; the floor keeps a value next to 0 from stretching the axis.
    values = np.array([value_of(m, name) for ms in families.values() for m in ms])
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if not positive.size or values.min() < 0:
        return -np.inf, "linear"
    if positive.max() < _LOG_RANGE * positive.min():
        return -np.inf, "linear"
    return max(float(positive.min()), _FLOOR * float(positive.max())), "log"


def _points(
    members: Sequence[Row],
    names: tuple[str, str],
    scales: Sequence[tuple[float, str]],
) -> np.ndarray:
    """Return two figures of all members ``[P, 2]``, not below the floors."""
    points = np.array([[value_of(m, name) for name in names] for m in members])
    return np.maximum(points.reshape(-1, 2), [floor for floor, _ in scales])


def _state_of(member: Row) -> str:
    words = [] if member.finite else ["not finite"]
    return ", ".join(words + ["saturated"] * member.saturated) or "ok"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities as strings."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
