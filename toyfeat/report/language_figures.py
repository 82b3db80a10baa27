"""Draw the scores of a language model's dictionaries and bases."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from toyfeat.jobs.config import BASES
from toyfeat.report.names import label
from toyfeat.report.plots import BLUE, GREEN, GREY, ORANGE, RED, add_legend, figure

_COLOURS = {
    "acts": BLUE,
    "attribution": RED,
    "gradients": GREEN,
    "paired": ORANGE,
}
_CURVES = ("fvu", "dead", "unexplained_share")
_ACROSS = 4  # panels side by side
_MARGIN = 1.05  # of an axis beyond the largest effect
_LEAST_EFFECT = 1e-12  # nats, below rounding, so that no axis is empty
_RANGE = 300  # the axes of effects are logarithmic over this range, about 2.5 decades
_SEED = re.compile(r"-s[0-9]+$")


def kind_of(method: str) -> str:
    """Kind in the name of a method, ``"acts"`` of ``"acts-k8-s0"``."""
    return method.split("-k")[0]


def group_seeds(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """Group the rows of methods that differ by nothing but the seed."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_SEED.sub("", row["method"]), []).append(row)
    return groups


def fronts_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw cross-entropy recovered and attribution L0 by activation L0.

    Medians over seeds, with bars from the least to the largest.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    scores = [row for row in rows if row.get("what") == "scores"]
    picture = figure(15, 4)
    axes = picture.subplots(1, 4)
    kinds = list(dict.fromkeys(kind_of(row["method"]) for row in scores))
    panels = {
        "recovered": "cross-entropy recovered (mean ablation)",
        "attribution_l0": "attribution L0",
        "attribution_l0_explained": "attribution L0, error left out",
        "unexplained": "first-order effect that no latent has",
    }
    for kind in kinds:
        of_kind = [row for row in scores if kind_of(row["method"]) == kind]
        groups = [*group_seeds(of_kind).values()]
        groups.sort(key=_median_l0)  # those without one come last
        x = [_median_l0(rows) for rows in groups]
        x = [latents if np.isfinite(latents) else np.nan for latents in x]
        for axis, name in zip(axes, panels, strict=True):
            medians, bars = _medians_and_bars(groups, name)
            axis.errorbar(x, medians, bars, label=label(kind), **_style(kind, kinds))
    for axis, name in zip(axes, panels.values(), strict=True):
        axis.set_xlabel("latents per token")
        axis.set_ylabel(name)
        axis.set_xscale("log", base=2)
    add_legend(axes[0], fontsize=6)
    return picture


def _median_l0(rows: Sequence[Mapping[str, Any]]) -> float:
    """Median of the active latents over seeds, infinite where none is known."""
    known = [x for x in (_number(row.get("l0")) for row in rows) if np.isfinite(x)]
    return float(np.median(known)) if known else np.inf


def _medians_and_bars(
    groups: Sequence[Sequence[Mapping[str, Any]]], score: str
) -> tuple[np.ndarray, np.ndarray]:
    """Medians of a score over seeds ``[groups]``, and bars to the ends ``[2, groups]``.

    Scores that are missing are left out, NaN stands where all of them are.
    """
    # Without what is missing; bars go from the median to the least and the largest.
    values = [[_number(row.get(score)) for row in rows] for rows in groups]
    values = [[x for x in seeds if x == x] or [np.nan] for seeds in values]
    medians = np.array([np.median(seeds) for seeds in values])
    ends = np.array([(min(seeds), max(seeds)) for seeds in values])
    return medians, np.abs(ends.T - medians)


def _style(kind: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Line style of a kind; kinds that share a colour differ by their markers."""
    plain = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8}
    colour, line = _colour(kind)
    if kind not in _COLOURS:
        plain |= {"marker": _marker(kind, kinds), "alpha": 0.7}
    return plain | {"color": colour, "linestyle": line}


def _colour(kind: str) -> tuple[str, str]:
    """Colour and line of a kind: bases grey and dotted, variants of a kind dashed.

    A name that is no kind's is that of a loss on attributions.
    """
    if kind in _COLOURS:
        return _COLOURS[kind], "-"
    if kind in BASES:
        return GREY, ":"
    return _COLOURS.get(kind.split(" ")[0], _COLOURS["attribution"]), "--"


def _marker(kind: str, kinds: Sequence[str]) -> str:
    return "sv^Dxp*"[list(kinds).index(kind) % 7]


def curves_figure(curves: Mapping[str, Mapping[str, Any]]) -> Any:
    """Draw the metrics of training, a line per dictionary.

    Args:
      curves: of :func:`toyfeat.jobs.train.load_curves`.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    titles = {
        "fvu": "share of the variance not explained",
        "dead": "dead latents",
        "unexplained_share": "first-order effect that no latent has",
    }
    picture = figure(12, 3.6)
    # A kind has one entry in the legend, however many dictionaries it has.
    axes, labelled = picture.subplots(1, 3), set()
    for run, metrics in curves.items():
        kind = kind_of(run)
        colour, line = _colour(kind)
        for axis, metric in zip(axes, _CURVES, strict=True):
            if metric in metrics:
                name = None if (kind, metric) in labelled else label(kind)
                labelled.add((kind, metric))
                style = {"color": colour, "linestyle": line, "linewidth": 0.8}
                axis.plot(metrics["step"], metrics[metric], label=name, **style)
    for axis, metric in zip(axes, _CURVES, strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(titles[metric])
    add_legend(axes[0], fontsize=6)
    return picture


def faithfulness_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw predicted and true effects of leaving a latent out, a panel per dictionary.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    # A grid of panels, filled line by line.
    checked = [row for row in rows if row.get("what") == "faithfulness"]
    across = min(_ACROSS, max(1, len(checked)))
    down = -(-len(checked) // across)
    picture = figure(3.2 * across, 3 * down)
    axes = np.atleast_1d(picture.subplots(down, across)).ravel()
    for axis, row in zip(axes, checked, strict=False):
        effects = np.asarray(row["effects"], float).reshape(-1, 2)
        effects = effects[np.isfinite(effects).all(axis=1)]
        predicted, true = effects.T
        colour, _ = _colour(kind_of(row["method"]))
        axis.scatter(predicted, true, s=4, alpha=0.4, color=colour, linewidths=0)
        # A margin around the largest effect; effects span orders of magnitude, so that
        # the axes are linear near zero only.
        limit = _MARGIN * np.abs(effects).max(initial=_LEAST_EFFECT)
        axis.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.6)
        axis.set_xscale("symlog", linthresh=limit / _RANGE)
        axis.set_yscale("symlog", linthresh=limit / _RANGE)
        ticks = 10.0 ** np.floor(np.log10(limit)) * np.array([-1, 0, 1])
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.minorticks_off()
        title = label(f"{row['method']}: r {_number(row.get('correlation')):.2f}")
        axis.set_title(title, size=9)
        axis.tick_params(labelsize=6)
    for axis in axes[len(checked) :]:
        axis.set_visible(False)
    picture.supxlabel("predicted change of the loss, nats")
    picture.supylabel("true change")
    return picture


def decomposition_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw cross-entropy recovered by number of directions, and spectra, by site.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    scores = [row for row in rows if row.get("what") == "scores"]
    spectra = [row for row in rows if "spectrum" in row]
    sites = list(dict.fromkeys(row["site"] for row in (*scores, *spectra)))
    picture = figure(10.4, 3.8 * max(1, len(sites)))
    axes = picture.subplots(max(1, len(sites)), 2, squeeze=False)
    for (left, right), site in zip(axes, sites, strict=True):
        _draw_recovered(left, [row for row in scores if row["site"] == site], site)
        _draw_spectra(right, [row for row in spectra if row["site"] == site], site)
    return picture


def _draw_recovered(axis: Any, rows: Sequence[Mapping[str, Any]], site: str) -> None:
    """Draw the cross-entropy recovered by the first directions of every basis."""
    # A method is a basis and a number of directions, "pca, 16".
    for basis in dict.fromkeys(row["method"].rpartition(",")[0] for row in rows):
        line = [r for r in rows if r["method"].rpartition(",")[0] == basis]
        line.sort(key=lambda row: _median_l0([row]))
        values = [_number(row.get("recovered")) for row in line]
        directions = [_number(row.get("l0")) for row in line]
        axis.plot(directions, values, marker="o", label=label(basis))
    axis.set_xscale("log", base=4)
    axis.set_ylim(-0.5, 1.05)
    axis.set_title(label(site), size=9)
    axis.set_xlabel("directions kept")
    axis.set_ylabel("cross-entropy recovered")
    add_legend(axis, fontsize=7)


def _draw_spectra(axis: Any, rows: Sequence[Mapping[str, Any]], site: str) -> None:
    """Draw the positive values of every basis' spectrum, as shares of the largest."""
    for row in rows:
        values = np.asarray(row["spectrum"], float)
        values = values[values > 0]
        if len(values):  # of a site without gradients there is nothing to draw
            values = values / values.max()
            axis.plot(1 + np.arange(len(values)), values, label=label(row["basis"]))
    axis.set_xscale("log")
    if axis.lines:
        axis.set_yscale("log")
    axis.set_title(label(f"{site}: spectra"), size=9)
    axis.set_xlabel("direction")
    axis.set_ylabel("share of the largest")


def _number(value: Any) -> float:
    """Convert a score, ``None`` to NaN."""
    return float("nan") if value is None else float(value)
