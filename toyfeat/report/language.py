"""A page on a language model's dictionaries: scores, pictures, latents."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.language.contexts import Context, Latent
from toyfeat.language.jobs import BASES
from toyfeat.report import page
from toyfeat.report.figures import BLUE, GREEN, GREY, ORANGE, RED, data_uri, figure, png
from toyfeat.report.rows import html_lines

_COLOURS = {
    "acts": BLUE,
    "attribution": RED,
    "gradients": GREEN,
    "paired": ORANGE,
}
_SCORES = (
    "ce",
    "kl",
    "recovered",
    "recovered_zero",
    "explained",
    "l0",
    "attribution_l0",
    "attribution_l0_explained",
    "unexplained",
    "unmet",
    "dead",
)
_FAITH = ("correlation", "slope", "error")
_CURVES = ("fvu", "dead", "unexplained_share")
_SEED = re.compile(r"-s[0-9]+$")


def kind_of(method: str) -> str:
    """The kind of a method's name, ``"acts"`` of ``"acts-k8-s0"``."""
    return method.split("-k")[0]


def score_lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line per method with every score; of several seeds their median and range.

    Args:
      rows: of ``evaluation.jsonl``.

    Returns:
      The names of the columns, then the lines, as text.
    """
    scores = [row for row in rows if row.get("what") == "scores"]
    faith = {r["method"]: r for r in rows if r.get("what") == "faithfulness"}
    lines: list[tuple[str, ...]] = [("method", "seeds", *_SCORES, *_FAITH)]
    for name, mine in _by_seed(scores).items():
        others = [faith[row["method"]] for row in mine if row["method"] in faith]
        cells = [_range([row.get(score) for row in mine]) for score in _SCORES]
        cells += [_range([row.get(score) for row in others]) for score in _FAITH]
        lines.append((name, str(len(mine)), *cells))
    return lines


def _by_seed(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of methods that differ by nothing but the seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(_SEED.sub("", row["method"]), []).append(row)
    return found


def _range(values: Sequence[Any]) -> str:
    """A median and, of several numbers, the least and the largest."""
    numbers = [float(x) for x in values if x is not None]
    if not numbers:
        return ""
    text = f"{np.median(numbers):.3f}"
    if len(numbers) > 1:
        text += f" ({min(numbers):.3f} to {max(numbers):.3f})"
    missing = len(values) - len(numbers)
    return text + (f", {missing} missing" if missing else "")


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
        groups = [*_by_seed(mine).values()]
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


def write_language(
    folder: Path,
    evaluation: Sequence[Mapping[str, Any]],
    decomposition: Sequence[Mapping[str, Any]],
    latents: Mapping[str, Sequence[Latent]],
    *,
    header: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write ``report.html``, with everything in it.

    Args:
      folder: an existing folder.
      evaluation: rows of ``evaluation.jsonl``.
      decomposition: rows of ``decompose.jsonl``, or none.
      latents: dictionary to latents.
      header: settings, for the foot of the page.
      curves: of :func:`curves_figure`.

    Returns:
      The path of the page.

    Raises:
      ValueError: if there is nothing to show.
      ImportError: without matplotlib.
    """
    if not evaluation and not decomposition:
        raise ValueError("write_language: there are no rows; evaluate first")
    sections = []
    if evaluation:
        body = [
            page.paragraph(
                "Each method is put in the place of the activations of the site, on "
                "text that nothing was trained on; the first position of a window is "
                "left as it is. Recovered is the share of the cross-entropy that the "
                "site's mean in its place costs; attribution L0 the fewest latents "
                "with 95 % of the first-order effect on the loss, and all of them "
                "where these have less (unmet: at what share of the tokens); "
                "attribution L0 explained leaves the error's effect out of the sum. "
                "Gradient and paired dictionaries choose latents by the gradient of "
                "the loss against the true next token, which the others do not see: "
                "'sampled' goes by a token that the model draws, 'paired alone' by "
                "activations. Of several seeds: the median (least to largest)."
            ),
            page.picture(data_uri(png(fronts_figure(evaluation))), "By latents."),
            page.table(html_lines(score_lines(evaluation))),
        ]
        sections.append(page.section("What the model keeps", body))
    if curves:
        image = data_uri(png(curves_figure(curves)))
        caption = "A line is a dictionary; the variance is that of what it describes."
        body = [page.picture(image, caption)]
        sections.append(page.section("Training", body))
    if any(row.get("what") == "faithfulness" for row in evaluation):
        text = (
            "A latent is left out of one token; the prediction is minus its "
            "attribution, the truth what happens to the loss of the window."
        )
        image = data_uri(png(faithfulness_figure(evaluation)))
        body = [page.paragraph(text), page.picture(image, "A dot is a pair.")]
        sections.append(page.section("Attributions against leaving out", body))
    if decomposition:
        image = data_uri(png(decomposition_figure(decomposition)))
        lines = [("site", "basis", "participation ratio")]
        lines += [
            (row["site"], row["basis"], f"{row['participation']:.1f}")
            for row in decomposition
            if "basis" in row
        ]
        body = [page.picture(image, "Directions in order of the basis.")]
        body.append(page.table(html_lines(lines)))
        sections.append(page.section("Bases", body))
    for name, found in latents.items():
        body = [latent_html(latent) for latent in found]
        sections.append(page.section(f"Latents of {name}", body))
    footer = ", ".join(f"{name}: {value}" for name, value in header.items())
    title = "A language model by a few latents"
    page.write_page(folder / "report.html", title, sections, footer)
    return folder / "report.html"


def latent_html(latent: Latent) -> str:
    """A latent as a part of a page."""
    near = ", ".join(f"{index} ({cosine:.2f})" for index, cosine in latent.neighbours)
    head = (
        f"activation density {latent.frequency:.2%}, mean absolute attribution "
        f"{latent.effect:.2g} nats; nearest readers: {near}"
    )
    parts = [f"<h3>Latent {latent.index}</h3>", page.paragraph(head)]
    for title, words in (
        ("promoted tokens:", latent.promoted),
        ("suppressed tokens:", latent.suppressed),
    ):
        if words:
            shown = " ".join(f"<code>{html.escape(_visible(w))}</code>" for w in words)
            parts.append(f"<p>{title} {shown}</p>")
    for title, contexts in (
        ("Top activations", latent.activating),
        ("Top attributions", latent.attributed),
    ):
        rows = "".join(f"<li>{context_html(context)}</li>" for context in contexts)
        parts.append(f"<p>{title}</p><ul>{rows}</ul>")
    return "\n".join(parts)


def context_html(context: Context) -> str:
    """Tokens, shaded by the latent's code, the one in question underlined."""
    most = max((abs(v) for v in context.values), default=0.0) or 1.0
    spans = []
    for i, (token, value) in enumerate(
        zip(context.tokens, context.values, strict=True)
    ):
        style = f"background:rgba(213,94,0,{min(1.0, abs(value) / most) * 0.6:.2f})"
        if i == context.at:
            style += ";text-decoration:underline"
        spans.append(f'<span style="{style}">{html.escape(_visible(token))}</span>')
    return f"{''.join(spans)} <small>{context.effect:+.2g} nats</small>"


def _visible(token: str) -> str:
    return token.replace("\n", "⏎")


def _marker(kind: str, kinds: Sequence[str]) -> str:
    return "sv^Dxp*"[list(kinds).index(kind) % 7]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _short(value: Any) -> str:
    return "" if value is None else f"{float(value):.3f}"
