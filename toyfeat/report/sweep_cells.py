"""Draw the scores of a sweep over the grid of two hyper-parameters, as cells."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from toyfeat.report.plots import RED
from toyfeat.train.sweeps import Row, value_of


def draw_cells(
    axis: Any,
    members: Sequence[Row],
    names: tuple[str, str],
    score: str,
    middle: Callable[[Sequence[float]], Any],
    look: dict[str, Any],
) -> Any:
    """Draw the panel of a family.

    Args:
      axis: of matplotlib.
      members: of the family.
      names: hyper-parameters on the horizontal and the vertical axis.
      score: figure for the colour.
      middle: of the scores of a cell.
      look: limits and map of the colours.

    Returns:
      The image, for the scale of colours.

    Raises:
      ValueError: if a hyper-parameter is not positive.
    """
    places = np.array([[value_of(m, name) for name in names] for m in members])
    if not np.all(places > 0):
        raise ValueError(
            f"brittleness_figure: axes are logarithmic, wanted {names[0]} and "
            f"{names[1]} > 0, got {places.min():g}"
        )
    ticks = [np.unique(column) for column in places.T]
    # Colours.
    cells, diverged, saturated = _cells(members, places, ticks, score, middle)
    edges = [_edges(values) for values in ticks]
    image = axis.pcolormesh(*edges, np.ma.masked_invalid(cells), **look)
    axis.set(xscale="log", yscale="log", facecolor="#e4e4e4")
    # Crosses and rings, drawn twice so that they are seen on any colour.
    for marks, symbol, size, colours in (
        (diverged, "x", 9, ("white", RED)),
        (saturated, "o", 11, ("black", "white")),
    ):
        rows, columns = np.nonzero(marks)
        for colour, width in zip(colours, (4.0, 1.8), strict=True):
            look = {"ms": size, "mew": width, "mfc": "none", "color": colour}
            axis.plot(ticks[0][columns], ticks[1][rows], symbol, **look)
    for side, values in ((axis.xaxis, ticks[0]), (axis.yaxis, ticks[1])):
        side.set_ticks(values, [f"{value:.2g}" for value in values])
        side.set_ticks([], minor=True)
    return image


def _cells(
    members: Sequence[Row],
    places: np.ndarray,
    ticks: list[np.ndarray],
    score: str,
    middle: Callable[[Sequence[float]], Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the score of every cell, and whether a run diverged or was saturated."""
    cells = np.full((len(ticks[1]), len(ticks[0])), np.nan)
    diverged, saturated = np.zeros((2, *cells.shape), bool)
    for row, column in np.ndindex(cells.shape):
        inside = (places == [ticks[0][column], ticks[1][row]]).all(1)
        cell_members = [
            m for m, is_inside in zip(members, inside, strict=True) if is_inside
        ]
        values = [value_of(m, score) for m in cell_members if m.finite]
        cells[row, column] = middle(values) if values else np.nan
        diverged[row, column] = any(not m.finite for m in cell_members)
        saturated[row, column] = any(m.saturated for m in cell_members)
    return cells, diverged, saturated


def _edges(values: np.ndarray) -> np.ndarray:
    """Compute borders of cells around ascending values, half way in logarithms."""
    logs = np.log(values)
    inner = (logs[1:] + logs[:-1]) / 2
    # The outer borders are as far out; a single cell reaches from half to double.
    step = np.diff(logs)[[0, -1]] / 2 if len(logs) > 1 else np.log([2.0, 2.0])
    return np.exp(np.concatenate([[logs[0] - step[0]], inner, [logs[-1] + step[1]]]))
