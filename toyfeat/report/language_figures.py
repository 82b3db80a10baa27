"""Pictures of what became of a language model's dictionaries and bases."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from toyfeat.language.jobs import BASES
from toyfeat.report.figures import BLUE, GREEN, GREY, ORANGE, RED, figure

_COLOURS = {
    "acts": BLUE,
    "attribution": RED,
    "gradients": GREEN,
    "paired": ORANGE,
}
_CURVES = ("fvu", "dead", "unexplained_share")
_SEED = re.compile(r"-s[0-9]+$")


def kind_of(method: str) -> str:
    """The kind of a method's name, ``"acts"`` of ``"acts-k8-s0"``."""
    return method.split("-k")[0]


def by_seed(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of methods that differ by nothing but the seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(_SEED.sub("", row["method"]), []).append(row)
    return found


def fronts_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Cross-entropy recovered and attribution L0, by activation L0.

    Medians over seeds, with bars from the least to the largest.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    scores = [row for row in rows if row.get("what") == "scores"]
    drawn = figure(15, 4)
    axes = drawn.subplots(1, 4)
    kinds = list(dict.fromkeys(kind_of(row["method"]) for row in scores))
    panels = {
        "recovered": "cross-entropy recovered (mean ablation)",
        "attribution_l0": "attribution L0",
        "attribution_l0_explained": "attribution L0, error left out",
        "unexplained": "first-order effect that no latent has",
    }
    for kind in kinds:
        mine = [row for row in scores if kind_of(row["method"]) == kind]
        groups = [*by_seed(mine).values()]
        groups.sort(key=lambda rows: np.median([row["l0"] for row in rows]))
        x = [float(np.median([row["l0"] for row in rows])) for rows in groups]
        for axis, name in zip(axes, panels, strict=True):
            values = [[_number(row.get(name)) for row in rows] for rows in groups]
            there = [[x for x in some if x == x] or [np.nan] for some in values]
            middle = np.array([np.median(some) for some in there])
            ends = np.array([(min(some), max(some)) for some in there])
            bars = np.abs(ends.T - middle)
            axis.errorbar(x, middle, bars, label=kind, **_style(kind, kinds))
    for axis, name in zip(axes, panels.values(), strict=True):
        axis.set_xlabel("latents per token")
        axis.set_ylabel(name)
        axis.set_xscale("log", base=2)
    axes[0].legend(fontsize=6)
    return drawn


def _style(kind: str, kinds: Sequence[str]) -> dict[str, Any]:
    plain = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8}
    colour, line = _colour(kind)
    if kind not in _COLOURS:
        plain |= {"marker": _marker(kind, kinds), "alpha": 0.7}
    return plain | {"color": colour, "linestyle": line}


def _colour(kind: str) -> tuple[str, str]:
    """Colour and line: bases grey, dashed what is not chosen or trained as usual.

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
    """What was measured in training, a line per dictionary.

    Args:
      curves: of :func:`toyfeat.language.training.curves`.

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
    drawn = figure(12, 3.6)
    axes, shown = drawn.subplots(1, 3), set()
    for name, of in curves.items():
        kind = kind_of(name)
        colour, line = _colour(kind)
        for axis, metric in zip(axes, _CURVES, strict=True):
            if metric in of:
                label = None if (kind, metric) in shown else kind
                shown.add((kind, metric))
                style = {"color": colour, "linestyle": line, "linewidth": 0.8}
                axis.plot(of["step"], of[metric], label=label, **style)
    for axis, metric in zip(axes, _CURVES, strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(titles[metric])
    axes[0].legend(fontsize=6)
    return drawn


def faithfulness_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Predicted and true effects of leaving a latent out, a panel per dictionary.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    mine = [row for row in rows if row.get("what") == "faithfulness"]
    across = min(4, max(1, len(mine)))
    down = -(-len(mine) // across)
    drawn = figure(3.2 * across, 3 * down)
    axes = np.atleast_1d(drawn.subplots(down, across)).ravel()
    for axis, row in zip(axes, mine, strict=False):
        predicted, true = np.asarray(row["effects"]).T
        colour, _ = _colour(kind_of(row["method"]))
        axis.scatter(predicted, true, s=4, alpha=0.4, color=colour, linewidths=0)
        most = 1.05 * max(np.abs(predicted).max(), np.abs(true).max(), 1e-12)
        axis.plot([-most, most], [-most, most], color="black", linewidth=0.6)
        axis.set_xscale("symlog", linthresh=most / 300)
        axis.set_yscale("symlog", linthresh=most / 300)
        ticks = 10.0 ** np.floor(np.log10(most)) * np.array([-1, 0, 1])
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.minorticks_off()
        title = f"{row['method']}: r {_number(row['correlation']):.2f}"
        axis.set_title(title, size=9)
        axis.tick_params(labelsize=6)
    for axis in axes[len(mine) :]:
        axis.set_visible(False)
    drawn.supxlabel("predicted change of the loss, nats")
    drawn.supylabel("true change")
    return drawn


def decomposition_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Cross-entropy recovered by directions kept, and spectra; a row per site.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    scores = [row for row in rows if row.get("what") == "scores"]
    spectra = [row for row in rows if "spectrum" in row]
    sites = list(dict.fromkeys(row["site"] for row in (*scores, *spectra)))
    drawn = figure(10.4, 3.8 * max(1, len(sites)))
    axes = drawn.subplots(max(1, len(sites)), 2, squeeze=False)
    for (kept, spectrum), site in zip(axes, sites, strict=True):
        here = [row for row in scores if row["site"] == site]
        for basis in dict.fromkeys(row["method"].rpartition(",")[0] for row in here):
            line = [r for r in here if r["method"].rpartition(",")[0] == basis]
            line.sort(key=lambda row: row["l0"])
            values = [_number(row["recovered"]) for row in line]
            kept.plot([row["l0"] for row in line], values, marker="o", label=basis)
        kept.set_xscale("log", base=4)
        kept.set_ylim(-0.5, 1.05)
        kept.set_title(site, size=9)
        kept.set_xlabel("directions kept")
        kept.set_ylabel("cross-entropy recovered")
        if kept.lines:
            kept.legend(fontsize=7)
        for row in (r for r in spectra if r["site"] == site):
            values = np.asarray(row["spectrum"], float)
            values = values[values > 0] / values.max()
            spectrum.plot(1 + np.arange(len(values)), values, label=row["basis"])
        spectrum.set_xscale("log")
        spectrum.set_yscale("log")
        spectrum.set_title(f"{site}: spectra", size=9)
        spectrum.set_xlabel("direction")
        spectrum.set_ylabel("share of the largest")
    return drawn


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
