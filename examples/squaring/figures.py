"""Pictures of the squaring networks.  Needs matplotlib (the extra ``plot``)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from examples.squaring.cases import Case
from examples.squaring.measure import Measurements
from toyfeat.report.plots import BLUE, GREEN, ORANGE, RED, figure
from toyfeat.types import Params

_POINTS = 1200  # inputs that are drawn: more hide each other


def draw_case(case: Case, net: Measurements, params: Params) -> Any:
    """Draw a network of a case, all panels in one picture.

    Args:
      case: for the kind of picture.
      net: measurements of the network, without a seed axis.
      params: parameters of the network.

    Returns:
      A matplotlib figure, not shown and not registered with pyplot.

    Raises:
      ImportError: without matplotlib, naming the extra.
    """
    draws = _panels(case, net, params)
    # Two by two, so that labels are legible on a page; three stand in a row.
    lines = 2 if len(draws) == 4 else 1
    picture = figure(8.6, 6.8) if lines == 2 else figure(12.0, 3.7)
    axes = picture.subplots(lines, len(draws) // lines).flat
    for draw, axis in zip(draws, axes, strict=True):
        draw(axis)
    return picture


def draw_panels(case: Case, net: Measurements, params: Params) -> list[Any]:
    """Draw a network of a case, a figure per panel, legible on a narrow screen.

    Args:
      case: as of :func:`draw_case`.
      net: as of :func:`draw_case`.
      params: as of :func:`draw_case`.

    Returns:
      Matplotlib figures.
    """
    return [_alone(draw) for draw in _panels(case, net, params)]


def draw_story(
    case: Case, net: Measurements, params: Params, kept: Sequence[tuple[float, ...]]
) -> list[Any]:
    """Draw what the two methods return, and what is left of the network on each.

    Args:
      case: of one input.
      net: as of :func:`draw_case`.
      params: as of :func:`draw_case`.
      kept: shares of the variance and of the output that are left on the leading
        direction of the activations, and of the gradients.

    Returns:
      Two matplotlib figures.
    """
    plane = _panels(case, net, params)[0]
    return [_alone(plane), _alone(lambda axis: _draw_kept(axis, kept))]


def _alone(draw: Callable[[Any], None]) -> Any:
    picture = figure(4.2, 3.6)
    draw(picture.subplots())
    return picture


def _panels(
    case: Case, net: Measurements, params: Params
) -> list[Callable[[Any], None]]:
    """List what draws each panel on an axis."""
    net, readers = jax.tree.map(np.asarray, (net, net.truth.readers))
    if case.task.features > 1:
        return [
            lambda axis: _draw_matches(axis, net.grads_pca, readers, "gradient PCs"),
            lambda axis: _draw_matches(axis, net.acts_pca, readers, "activation PCs"),
            lambda axis: _draw_spectra(axis, net),
        ]
    return [
        lambda axis: _draw_plane(axis, net, readers[0], params),
        lambda axis: _draw_spectra(axis, net),
        lambda axis: _draw_scores(axis, net, 1),
        lambda axis: _draw_scores(axis, net, 2),
    ]


def _draw_plane(
    axis: Any, net: Measurements, reader: np.ndarray, params: Params
) -> None:
    """Draw activations in the plane of their top two PCs, with ReLU(±E) and reader."""
    # Points: scores of the activations.
    scores = np.asarray(ft.encode(net.acts_pca, jnp.asarray(net.acts)))[:_POINTS, :2]
    x = net.inputs[:_POINTS, 0]
    look = {"cmap": _dark_viridis(), "s": 8, "linewidths": 0, "zorder": 3}
    points = axis.scatter(*scores.T, c=x, **look)
    axis.figure.colorbar(points, ax=axis, label="x", shrink=0.8)
    origin = -net.acts_pca.mean @ net.acts_pca.readers[:, :2]
    e = np.asarray(params["w_in"])
    e = (e if "embed" not in params else np.asarray(params["embed"]) @ e)[0]
    # Arrows from the origin of the activations, as long as the farthest point is away.
    arrows = (
        ("ReLU(E)", np.maximum(e, 0), BLUE),
        ("ReLU(-E)", np.maximum(-e, 0), GREEN),
        ("reader w_out", reader, RED),
    )
    reach = np.max(np.linalg.norm(scores - origin, axis=1))
    for name, vector, colour in arrows:
        unit = vector / max(np.linalg.norm(vector), 1e-30)
        tip = origin + reach * unit @ net.acts_pca.readers[:, :2]
        axis.annotate(
            "",
            xy=tip,
            xytext=origin,
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 3, "alpha": 0.7},
        )
        axis.plot([], [], color=colour, lw=3, alpha=0.7, label=name)
        axis.plot(*tip, alpha=0)  # keeps the arrow inside the axes
    axis.plot(*origin, "k+", ms=9, label="a = 0", zorder=4)
    axis.set(xlabel="PC1", ylabel="PC2", title="activations, coloured by x")
    axis.set_aspect("equal", adjustable="datalim")
    axis.legend(fontsize=8, loc="best", framealpha=0.85)


def _dark_viridis() -> Any:
    """Return viridis without its yellow, which is pale on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.8, 256)))


def _draw_kept(axis: Any, kept: Sequence[tuple[float, ...]]) -> None:
    """Draw the shares of the variance and of the output that two directions keep."""
    names = ("first activation PC", "gradient direction")
    sides = zip(names, kept, (BLUE, RED), (-0.2, 0.2), strict=True)
    for name, shares, colour, shift in sides:
        place = np.arange(len(shares)) + shift
        # Less than nothing is kept where a constant would have a smaller error.
        heights = np.maximum(shares, 0)
        bars = axis.bar(place, heights, 0.38, color=colour, label=name)
        axis.bar_label(bars, [f"{round(share, 2) + 0.0:.0%}" for share in shares])
    axis.set_xticks(range(2), ["variance", "output"])
    axis.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axis.set(ylim=(0, 1.3), ylabel="share that is kept", title="on one direction")
    axis.legend(fontsize=8, loc="upper center", ncols=2, framealpha=0.85)


def _draw_spectra(axis: Any, net: Measurements) -> None:
    """Draw shares of the activation and gradient spectra on a logarithmic scale."""
    floor = 1e-8  # where bars begin: below the rounding of float32 spectra
    num = len(net.acts_pca.spectrum)
    for basis, name, colour, shift in (
        (net.acts_pca, "activations", BLUE, -0.2),
        (net.grads_pca, "gradients", RED, 0.2),
    ):
        rank = int(basis.diagnostics.rank)
        shares = basis.spectrum[:rank] / basis.diagnostics.total
        place = np.arange(1, rank + 1) + shift
        label = f"{name}: rank {rank}"
        axis.bar(place, shares - floor, 0.4, bottom=floor, color=colour, label=label)
    axis.set_yscale("log")
    axis.set_ylim(floor, 30)
    axis.set_xlim(0.3, num + 0.7)
    axis.locator_params(axis="x", integer=True)
    axis.set(xlabel="component", ylabel="share of the total", title="spectra")
    axis.legend(fontsize=8, loc="upper right")


def _draw_scores(axis: Any, net: Measurements, power: int) -> None:
    """Draw standardised scores of two PCs and of the gradient direction.

    Args:
      axis: to draw on.
      net: measurements of the network.
      power: 1 for scores against x, 2 against x².
    """
    acts, x = jnp.asarray(net.acts[:_POINTS]), net.inputs[:_POINTS, 0]
    order = np.argsort(x**power)
    pcs = np.asarray(ft.encode(net.acts_pca, acts))
    read = np.asarray(ft.encode(net.grads_pca, acts))
    for name, score, colour, size in (
        ("activation PC1", pcs[:, 0], BLUE, 4),
        ("activation PC2", pcs[:, 1], ORANGE, 4),
        ("gradient direction", read[:, 0], RED, 7),
    ):
        standard = (score - score.mean()) / max(score.std(), 1e-30)
        # The sign of a direction is arbitrary: take that with which x² grows.
        standard *= np.sign(np.corrcoef(standard, x**2)[0, 1]) or 1.0
        axis.plot(x[order] ** power, standard[order], ".", ms=size / 2, color=colour)
        axis.plot([], [], "o", ms=4, color=colour, label=name)
    if power == 1:
        square = (x**2 - np.mean(x**2)) / np.std(x**2)
        axis.plot(x[order], square[order], "--", color="k", lw=1, label="x²")
    name = "x" if power == 1 else "x²"
    axis.set(xlabel=name, ylabel="score (standardised)", title=f"scores against {name}")
    axis.legend(fontsize=8, loc="best", framealpha=0.85)


def _draw_matches(axis: Any, basis: Any, readers: np.ndarray, name: str) -> None:
    """Draw |cos| of leading directions with the readers, best pairs on the diagonal."""
    directions = basis.readers[:, : len(readers)].T
    match = ft.metrics.match_features(directions, readers)
    best_first = np.argsort(-match.similarity)
    true = readers / np.linalg.norm(readers, axis=1, keepdims=True)
    cosines = np.abs(directions[match.index[best_first]] @ true[best_first].T)
    image = axis.imshow(cosines, vmin=0, vmax=1, cmap="magma_r")
    axis.set(
        xlabel="true reader",
        ylabel=name,
        title=f"|cos| with the readers: coverage {match.coverage:.2f}",
    )
    axis.locator_params(integer=True)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
