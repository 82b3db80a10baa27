"""Draw planted tasks.  Needs matplotlib (extra ``plot``)."""

from typing import Any, NamedTuple

import numpy as np

import toyfeat as ft
from toyfeat.models.planted.task import Task
from toyfeat.report.plots import BLUE, GREY, RED, figure
from toyfeat.types import Array

POINTS = 1200  # examples in every picture, as many as can be told apart by eye
_ARROWS = (  # colours told apart from each other and from grey
    "#4363d8", "#f58231", "#3cb44b", "#e6194b", "#911eb4", "#9a6324", "#42d4f4",
    "#f032e6", "#808000", "#000075", "#469990", "#fa9eb4",
)  # fmt: skip


def task_figure(key: Array, task: Task) -> Any:
    """Draw activations, gradients, and readers beside writers of a task.

    Points are coloured by the strongest feature, by its size if it is the only one,
    or by the angle in the plane that gradients lie in most where rows share planes.

    Args:
      key: random key of the examples.
      task: what to draw; its site has shape ``[B, D]``.

    Returns:
      A matplotlib figure of three panels, not registered with pyplot.

    Raises:
      ImportError: without matplotlib, naming the extra.
      ValueError: if the truth lacks readers or writers, or the site has positions.
    """
    drawn = figure(15.5, 4.6)
    drawn.get_layout_engine().set(w_pad=0.1)
    readers, writers = readers_and_writers(task)
    acts, grads, features = _examples(key, task)
    pairs = [rows for rows in shared_rows(task) if len(rows) == 2]
    if pairs:
        view = _by_angle(grads, features, readers, pairs)
    else:
        view = _by_feature(grads, features, readers)
    # Activations and gradients in planes of their own, with one key for both.
    left, middle, right = drawn.subplots(1, 3, width_ratios=(1, 1, 1.15))
    _draw_activations(left, acts - acts.mean(axis=0), view)
    _draw_gradients(middle, grads, readers, view)
    _draw_key(drawn, [left, middle], view)
    # All readers beside all writers; a single one entry by entry.
    if len(readers) > 1:
        cosines = np.abs(_unit(readers) @ _unit(writers).T)
        image = right.imshow(cosines, vmin=0, vmax=1, cmap="magma_r")
        right.set(xlabel="writer", ylabel="reader")
        right.set_title("|cos| of readers with writers")
        right.locator_params(integer=True)
        drawn.colorbar(image, ax=right)
    else:
        _draw_entries(right, _unit(readers[0]), _unit(writers[0]))
    return drawn


def readers_and_writers(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Readers ``[F, D]`` and writers ``[F, D]`` of a task.

    Raises:
      ValueError: if its truth lacks one of them.
    """
    readers, writers = task.truth.readers, task.truth.writers
    if readers is None or writers is None:
        raise ValueError(
            "readers_and_writers: wanted the readers and writers of "
            f"{task.name!r}, got no {'readers' if readers is None else 'writers'}"
        )
    return np.asarray(readers), np.asarray(writers)


def shared_rows(task: Task) -> list[list[int]]:
    """List the rows that share a value of the truth's group, in order."""
    rows: dict[int, list[int]] = {}
    if task.truth.group is not None:
        for row, value in enumerate(np.asarray(task.truth.group).tolist()):
            rows.setdefault(value, []).append(row)
    return list(rows.values())


class _View(NamedTuple):
    """The plane of the gradients, and the meaning of colours.

    Attributes:
      plane: ``[2, D]``, orthonormal, in which gradients are drawn.
      sides: names of its two axes.
      arrows: the readers that are drawn, with their colours.
      values: ``[N]``, of the points, in units of the map; the least is drawn last.
      map: matplotlib's colour map and norm.
      ticks: places on the key and their names; none for matplotlib's own.
      label: of the key.
    """

    plane: np.ndarray
    sides: list[str]
    arrows: dict[int, str]
    values: np.ndarray
    map: dict[str, Any]
    ticks: dict[int, str]
    label: str


def _by_angle(
    grads: np.ndarray, features: np.ndarray, readers: np.ndarray, pairs: list[list[int]]
) -> _View:
    """View the plane of two readers in which gradients are largest, by angle."""
    from matplotlib.colors import Normalize

    squares = [np.sum((grads @ readers[pair].T) ** 2) for pair in pairs]
    first, second = pair = pairs[int(np.argmax(squares))]
    plane = np.linalg.qr(readers[pair].T)[0].T
    plane *= np.sign(np.sum(plane * readers[pair], axis=1, keepdims=True))
    return _View(
        plane,
        [f"along reader {first}", f"across it, towards reader {second}"],
        dict.fromkeys(pair, "black"),
        np.degrees(np.arctan2(features[:, second], features[:, first])),
        {"cmap": "hsv", "norm": Normalize(-180, 180)},
        {place: f"{place}°" for place in range(-180, 181, 90)},
        f"angle in the plane of rows {first} and {second}",
    )


def _by_feature(grads: np.ndarray, features: np.ndarray, readers: np.ndarray) -> _View:
    """View the leading plane of the gradients, by strongest feature."""
    from matplotlib.colors import ListedColormap, Normalize

    plane, shares = _leading(grads)
    sides = [f"gradient direction {i} ({share} of the squares)" for i, share in shares]
    largest, num = features.max(axis=1), len(readers)
    if num == 1:
        look = {"cmap": "viridis", "norm": Normalize(*np.quantile(largest, [0, 1]))}
        return _View(plane, sides, {0: RED}, largest, look, {}, "size of the feature")
    # Colour the readers that lie in the plane most; all others share a grey.
    lengths = np.linalg.norm(_unit(readers) @ plane.T, axis=1)
    rows = np.sort(np.argsort(-lengths, kind="stable")[: len(_ARROWS)])
    place = np.full(num, len(rows))
    place[rows] = np.arange(len(rows))
    # The first of equals: features within a thousandth of the largest.
    strongest = np.argmax(features >= 0.999 * largest[:, None], axis=1)
    values = np.where(largest > 0, place[strongest], len(rows) + (num > len(rows)))
    # The key lists only colours that are used; "none" is last.
    names = [*map(str, rows), *["another"] * (num > len(rows)), "none"]
    shades = [*_ARROWS[: len(rows)], *["#cfcfcf"] * (num > len(rows)), "#8c8c8c"]
    used = len(names) - (largest.min() > 0)
    look = {
        "cmap": ListedColormap(shades[:used]),
        "norm": Normalize(-0.5, used - 0.5),
    }
    return _View(
        plane,
        sides,
        dict(zip(rows.tolist(), shades, strict=False)),
        values,
        look,
        dict(enumerate(names[:used])),
        "strongest feature, the first of equals",
    )


def _draw_activations(axis: Any, centred: np.ndarray, view: _View) -> None:
    plane, shares = _leading(centred)
    sides = [f"component {i} ({share} of the variance)" for i, share in shares]
    axis.set_title("activations")
    _scatter(axis, centred @ plane.T, view, sides)


def _draw_gradients(
    axis: Any, grads: np.ndarray, readers: np.ndarray, view: _View
) -> None:
    from matplotlib.colors import to_rgb

    # Scale all arrows alike, the longest as long as nearly all gradients.
    points, tips = grads @ view.plane.T, _unit(readers[[*view.arrows]]) @ view.plane.T
    reach, lengths = np.linalg.norm(points, axis=1), np.linalg.norm(tips, axis=1)
    longest = max(float(lengths.max()), 1e-30)
    tips *= (1.15 * float(np.quantile(reach, 0.995)) or 1) / longest
    for i, shade in enumerate(view.arrows.values()):  # pale, broad, under the points
        pale = [0.4 * part + 0.6 for part in to_rgb(shade)]
        look = {"arrowstyle": "-|>", "color": pale, "lw": 5, "joinstyle": "miter"}
        look |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 24}
        above = 1.9 - 0.5 * lengths[i] / longest  # short ones over long ones
        axis.annotate("", tuple(tips[i]), (0, 0), arrowprops=look, zorder=above)
    shown = "" if len(tips) == len(readers) else f"{len(tips)} of {len(readers)} "
    word = "the reader as an arrow" if len(readers) == 1 else "readers as arrows"
    axis.set_title(f"gradients, and {shown}{word}")
    _scatter(axis, points, view, view.sides, tips)


def _scatter(
    axis: Any, points: np.ndarray, view: _View, sides: list[str], tips: Any = ((0, 0),)
) -> None:
    """Draw points in a square that holds them, the tips and the origin."""
    order = np.argsort(-view.values, kind="stable")
    look = {"c": view.values[order], "s": 10, "linewidths": 0, "zorder": 2}
    axis.scatter(*points[order].T, **look, **view.map)
    axis.axhline(0, color="#e4e4e4", lw=0.8, zorder=0)
    axis.axvline(0, color="#e4e4e4", lw=0.8, zorder=0)
    corners = np.concatenate([points, tips, [[0, 0]]])
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    half = 1.1 * np.max(np.abs(corners - middle)) or 1
    axis.set(xlim=middle[0] + [-half, half], ylim=middle[1] + [-half, half])
    axis.set(xlabel=sides[0], ylabel=sides[1], box_aspect=1)
    axis.locator_params(nbins=6)


def _draw_key(drawn: Any, panels: list[Any], view: _View) -> None:
    from matplotlib.cm import ScalarMappable

    bar = drawn.colorbar(ScalarMappable(**view.map), ax=panels, pad=0.01)
    bar.set_label(view.label)
    if view.ticks:
        bar.set_ticks([*view.ticks], labels=[*view.ticks.values()])
        bar.ax.tick_params(length=0, labelsize=8)
        bar.ax.yaxis.set_inverted(len(view.arrows) > 2)


def _draw_entries(axis: Any, reader: np.ndarray, writer: np.ndarray) -> None:
    place = np.arange(len(reader))
    axis.bar(place - 0.2, reader, 0.4, color=RED, label="reader")
    axis.bar(place + 0.2, writer, 0.4, color=BLUE, label="writer")
    axis.axhline(0, color=GREY, lw=0.8)
    axis.locator_params(axis="x", integer=True)
    axis.set(xlabel="dimension", ylabel="entry, at length 1")
    axis.set_title(f"reader and writer, |cos| {abs(reader @ writer):.2f}")
    axis.legend(framealpha=0.9)


def _examples(key: Array, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample activations ``[N, D]``, gradients ``[N, D]`` and features ``[N, F]``."""
    inputs = task.sample(key, POINTS)
    half = ft.readouts.half_squared_norm()
    taps = ft.tap(task.probed, task.params, inputs, sites=task.site, readout=half)
    acts, grads, *_ = map(np.asarray, taps[task.site])
    if len(acts) != POINTS:
        raise ValueError(
            f"task_figure: wanted a site [B, D], got {len(acts)} activations of "
            f"{POINTS} examples at {task.site!r}"
        )
    return acts, grads[:, 0], np.asarray(task.features(task.params, inputs))


def _leading(rows: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Compute the leading directions ``[2, D]``, and number and share of each."""
    values, axes = np.linalg.svd(rows, full_matrices=False)[1:]
    shares = np.append(values, 0)[:2] ** 2 / max(np.sum(values**2), 1e-30)
    plane = np.concatenate([axes, np.zeros_like(axes[:1])])[:2]
    return plane, [(i, f"{share:.0%}") for i, share in enumerate(shares, 1)]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
