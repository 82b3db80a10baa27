"""Pictures of the squaring networks.  Needs matplotlib (the extra ``plot``)."""

import base64
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as tf
from toyfeat.report.cases import Case
from toyfeat.report.squaring import Measured
from toyfeat.types import Params

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"
_POINTS = 1200


def figure_of(case: Case, net: Measured, params: Params) -> Any:
    """Draw one network of a case.

    Args:
      case: what it is.
      net: its measurements, without a seed axis.
      params: its parameters.

    Returns:
      A matplotlib figure, not shown and not registered with pyplot.

    Raises:
      ImportError: without matplotlib, naming the extra.
    """
    net, readers = jax.tree.map(np.asarray, (net, net.truth.readers))
    drawn = figure(14.5, 3.7)
    if case.task.features > 1:
        axes = drawn.subplots(1, 3, width_ratios=(1, 1, 1.2))
        _draw_matches(axes[0], net.grads_pca, readers, "gradient PCs")
        _draw_matches(axes[1], net.acts_pca, readers, "activation PCs")
        _draw_spectra(axes[2], net)
    else:
        axes = drawn.subplots(1, 4)
        _draw_plane(axes[0], net, readers[0], params)
        _draw_spectra(axes[1], net)
        _draw_scores(axes[2], net, 1)
        _draw_scores(axes[3], net, 2)
    return drawn


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, not registered with pyplot; sizes in inches.

    Raises:
      ImportError: without matplotlib, naming the extra.
    """
    return _figure_class()(figsize=(width, height), layout="constrained")


def plain_ticks(side: Any) -> None:
    """Label a logarithmic axis 1, 2, 5, 10 and so on."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    side.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    side.set_major_formatter(StrMethodFormatter("{x:g}"))
    side.set_minor_formatter(NullFormatter())


def png(figure: Any) -> bytes:
    """Render a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """Return PNG bytes as something an ``img`` tag can hold."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "toyfeat.report.figures: matplotlib is missing; install toyfeat[plot]"
        ) from error
    return Figure


def _draw_plane(axis: Any, net: Measured, reader: np.ndarray, params: Params) -> None:
    """Activations in the plane of the top two PCs, with the vectors that matter."""
    scores = np.asarray(tf.encode(net.acts_pca, jnp.asarray(net.acts)))[:_POINTS, :2]
    x = net.inputs[:_POINTS, 0]
    axis.scatter(*scores.T, c=x, s=8, cmap="viridis", linewidths=0, zorder=3)
    origin = -net.acts_pca.mean @ net.acts_pca.readers[:, :2]
    e = np.asarray(params["w_in"])
    e = (e if "embed" not in params else np.asarray(params["embed"]) @ e)[0]
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
    axis.legend(fontsize=7, loc="best", framealpha=0.85)


def _draw_spectra(axis: Any, net: Measured) -> None:
    """Shares of the activation and gradient spectra, on a logarithmic scale."""
    floor, num = 1e-8, len(net.acts_pca.spectrum)
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
    axis.legend(fontsize=7, loc="upper right")


def _draw_scores(axis: Any, net: Measured, power: int) -> None:
    """Standardised scores of two PCs and of the gradient direction."""
    acts, x = jnp.asarray(net.acts[:_POINTS]), net.inputs[:_POINTS, 0]
    order = np.argsort(x**power)
    pcs = np.asarray(tf.encode(net.acts_pca, acts))
    read = np.asarray(tf.encode(net.grads_pca, acts))
    for name, score, colour, size in (
        ("activation PC1", pcs[:, 0], BLUE, 4),
        ("activation PC2", pcs[:, 1], ORANGE, 4),
        ("gradient direction", read[:, 0], RED, 7),
    ):
        standard = (score - score.mean()) / max(score.std(), 1e-30)
        standard *= np.sign(np.corrcoef(standard, x**2)[0, 1]) or 1.0
        axis.plot(x[order] ** power, standard[order], ".", ms=size / 2, color=colour)
        axis.plot([], [], "o", ms=4, color=colour, label=name)
    if power == 1:
        square = (x**2 - np.mean(x**2)) / np.std(x**2)
        axis.plot(x[order], square[order], "--", color="k", lw=1, label="x²")
    name = "x" if power == 1 else "x²"
    axis.set(xlabel=name, ylabel="score (standardised)", title=f"scores against {name}")
    axis.legend(fontsize=7, loc="best", framealpha=0.85)


def _draw_matches(axis: Any, basis: Any, readers: np.ndarray, name: str) -> None:
    """|cos| of leading directions with the readers, best pairs on the diagonal."""
    found = basis.readers[:, : len(readers)].T
    match = tf.match_features(found, readers)
    order = match.index[np.argsort(-match.similarity)]
    true = readers / np.linalg.norm(readers, axis=1, keepdims=True)
    cosines = np.abs(found[order] @ true[np.argsort(-match.similarity)].T)
    image = axis.imshow(cosines, vmin=0, vmax=1, cmap="magma_r")
    axis.set(
        xlabel="true reader",
        ylabel=name,
        title=f"|cos| with the readers: coverage {match.coverage:.2f}",
    )
    axis.locator_params(integer=True)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
