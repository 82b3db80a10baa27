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
_SIZE = (5.2, 3.8)  # inches of a panel
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


def fronts_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw cross-entropy recovered and attribution L0 by activation L0.

    Medians over seeds, with bars from the least to the largest.

    Returns:
      Title to matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    scores = [row for row in rows if row.get("what") == "scores"]
    kinds = list(dict.fromkeys(kind_of(row["method"]) for row in scores))
    panels = {
        "recovered": "cross-entropy recovered (mean ablation)",
        "attribution_l0": "attribution L0",
        "attribution_l0_explained": "attribution L0, error left out",
        "unexplained": "first-order effect that no latent has",
    }
    pictures = {title: figure(*_SIZE) for title in panels.values()}
    axes = [picture.subplots() for picture in pictures.values()]
    for kind in kinds:
        of_kind = [row for row in scores if kind_of(row["method"]) == kind]
        groups = [*group_seeds(of_kind).values()]
        groups.sort(key=_median_l0)  # those without one come last
        x = [_median_l0(rows) for rows in groups]
        x = [latents if np.isfinite(latents) else np.nan for latents in x]
        for axis, name in zip(axes, panels, strict=True):
            medians, bars = _medians_and_bars(groups, name)
            axis.errorbar(x, medians, bars, label=label(kind), **_style(kind, kinds))
    for axis, title in zip(axes, pictures, strict=True):
        axis.set_xlabel("latents per token")
        axis.set_ylabel(title)
        axis.set_xscale("log", base=2)
    add_legend(axes[0], fontsize=7)
    return pictures


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


def curves_figures(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Draw the metrics of training, a line per dictionary.

    Args:
      curves: of :func:`toyfeat.jobs.train.load_curves`.

    Returns:
      Title to matplotlib figure, of those metrics that a dictionary has.

    Raises:
      ImportError: without matplotlib.
    """
    titles = {
        "fvu": "share of the variance not explained",
        "dead": "dead latents",
        "unexplained_share": "first-order effect that no latent has",
    }
    pictures = {}
    for metric, title in titles.items():
        runs = {run: x for run, x in curves.items() if metric in x}
        if not runs:
            continue
        pictures[title] = figure(*_SIZE)
        axis, labelled = pictures[title].subplots(), set()
        for run, metrics in runs.items():
            # A kind has one entry in the legend, however many dictionaries it has.
            kind = kind_of(run)
            name = None if kind in labelled else label(kind)
            labelled.add(kind)
            colour, line = _colour(kind)
            style = {"color": colour, "linestyle": line, "linewidth": 0.8}
            axis.plot(metrics["step"], metrics[metric], label=name, **style)
        axis.set_xlabel("step")
        axis.set_ylabel(title)
        add_legend(axis, fontsize=7)
    return pictures


def faithfulness_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw predicted and true effects of leaving a latent out, for every method.

    Returns:
      Title to matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    pictures = {}
    for row in rows:
        if row.get("what") != "faithfulness":
            continue
        title = f"{row['method']}: r {_number(row.get('correlation')):.2f}"
        pictures[title] = figure(*_SIZE)
        axis = pictures[title].subplots()
        effects = np.asarray(row["effects"], float).reshape(-1, 2)
        effects = effects[np.isfinite(effects).all(axis=1)]
        predicted, true = effects.T
        colour, _ = _colour(kind_of(row["method"]))
        axis.scatter(predicted, true, s=9, alpha=0.5, color=colour, linewidths=0)
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
        axis.set_title(label(title), size=9)
        axis.set_xlabel("predicted change of the loss, nats")
        axis.set_ylabel("true change")
    return pictures


def decomposition_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw cross-entropy recovered by number of directions, and spectra, by site.

    Returns:
      Title to matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    scores = [row for row in rows if row.get("what") == "scores"]
    spectra = [row for row in rows if "spectrum" in row]
    sites = list(dict.fromkeys(row["site"] for row in (*scores, *spectra)))
    pictures = {}
    for site in sites:
        parts = (("kept", _draw_recovered, scores), ("spectra", _draw_spectra, spectra))
        for name, draw, of_all in parts:
            picture = pictures[f"{site}: {name}"] = figure(*_SIZE)
            draw(picture.subplots(), [x for x in of_all if x["site"] == site], site)
    return pictures


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
