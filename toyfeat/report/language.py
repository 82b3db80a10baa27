"""Write a page on a language model's dictionaries: scores, pictures, latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toyfeat.dictionary.latents import Latent
from toyfeat.report import page
from toyfeat.report.language_figures import (
    curves_figures,
    decomposition_figures,
    faithfulness_figures,
    fronts_figures,
    group_seeds,
)
from toyfeat.report.latents import latent_html
from toyfeat.report.plots import data_uri, png
from toyfeat.report.tables import html_lines, spread

# Scores with their headings and formats.
_SCORES = {
    "ce": ("cross-entropy", ".3f"),
    "kl": ("KL", ".3f"),
    "recovered": ("recovered", ".3f"),
    "recovered_zero": ("recovered, of zero", ".3f"),
    "explained": ("variance", ".3f"),
    "l0": ("L0", ".1f"),
    "attribution_l0": ("attribution L0", ".1f"),
    "attribution_l0_explained": ("explained L0", ".1f"),
    "unexplained": ("unexplained", ".3f"),
    "unmet": ("unmet", ".3f"),
    "dead": ("dead", ".3f"),
}
_FAITH = ("correlation", "slope", "error")
_ABOUT_SCORES = (
    "Each method is put in the place of the activations of the site, on text that "
    "nothing was trained on; the first position of a window is left as it is. "
    "Recovered is the share of the cross-entropy that the site's mean in its place "
    "costs (of zero: that zeros cost), variance that of the activations' variance. "
    "Attribution L0 is the fewest latents with 95 % of the first-order effect on "
    "the loss, and all of them where these have less (unmet: at what share of the "
    "tokens); explained L0 leaves the error's effect out of the sum. "
    "Gradient and paired dictionaries choose latents by the gradient of the loss "
    "against the true next token, which the others do not see: 'sampled' goes by a "
    "token that the model draws, 'paired alone' by activations. Of several seeds: the "
    "median (least to largest)."
)
_ABOUT_PAIRS = (
    "A latent is left out of one token; the prediction is minus its attribution, the "
    "truth what happens to the loss of the window."
)
_ABOUT_CURVES = "A line is a dictionary; the variance is that of what it describes."


def score_lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Tabulate every score, a line per method; of several seeds their median and range.

    Args:
      rows: of ``evaluation.jsonl``.

    Returns:
      The names of the columns, then the lines, as text.
    """
    # Scores of all seeds of a method, and of those pairs that were checked too.
    scores = [row for row in rows if row.get("what") == "scores"]
    faith = {r["method"]: r for r in rows if r.get("what") == "faithfulness"}
    headings = (heading for heading, _ in _SCORES.values())
    lines: list[tuple[str, ...]] = [("method", "seeds", *headings, *_FAITH)]
    for name, seeds in group_seeds(scores).items():
        checked = [faith[row["method"]] for row in seeds if row["method"] in faith]
        cells = [
            _format_range([row.get(score) for row in seeds], form)
            for score, (_, form) in _SCORES.items()
        ]
        cells += [
            _format_range([row.get(score) for row in checked], ".3f")
            for score in _FAITH
        ]
        lines.append((name, str(len(seeds)), *cells))
    return lines


def _format_range(values: Sequence[Any], form: str) -> str:
    """Format a median with its range, and how many values are missing."""
    numbers = [float(x) for x in values if x is not None]
    if not numbers:
        return ""
    missing = len(values) - len(numbers)
    return spread(numbers, form) + (f", {missing} missing" if missing else "")


def _format_number(value: Any) -> str:
    """Format a number, nothing for ``None``, as of a site without gradients."""
    return "" if value is None else f"{value:.1f}"


def write_language(
    folder: Path,
    evaluation: Sequence[Mapping[str, Any]],
    decomposition: Sequence[Mapping[str, Any]],
    latents: Mapping[str, Sequence[Latent]],
    *,
    header: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write ``report.html``, with all pictures in the file itself.

    Args:
      folder: an existing folder.
      evaluation: rows of ``evaluation.jsonl``.
      decomposition: rows of ``decompose.jsonl``, or none.
      latents: dictionary to latents.
      header: settings, for the foot of the page.
      curves: of :func:`curves_figures`.

    Returns:
      The path of the page.

    Raises:
      ValueError: if there is nothing to show.
      ImportError: without matplotlib.
    """
    if not evaluation and not decomposition:
        raise ValueError("write_language: there are no rows; evaluate first")
    names = [str(header[name]) for name in ("model", "site") if name in header]
    sections = [
        page.paragraph(", ".join(names)),
        *_score_sections(evaluation),
        *_training_sections(curves or {}),
        *_pair_sections(evaluation),
        *_basis_sections(decomposition),
    ]
    for name, views in latents.items():
        body = [latent_html(latent) for latent in views]
        sections.append(page.section(f"Latents of {name}", body))
    footer = ", ".join(f"{name}: {value}" for name, value in header.items())
    title = "A language model by a few latents"
    page.write_page(folder / "report.html", title, sections, footer)
    return folder / "report.html"


def _draw(figures: Mapping[str, Any], caption: str) -> str:
    """Render figures side by side, one below the other on a narrow screen."""
    drawings = [(data_uri(png(x)), title) for title, x in figures.items()]
    return page.panels(drawings, caption)


def _score_sections(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    body = [
        page.paragraph(_ABOUT_SCORES),
        _draw(fronts_figures(rows), "By latents that are active per token."),
        page.table(html_lines([x[: -len(_FAITH)] for x in score_lines(rows)])),
    ]
    return [page.section("What the model keeps", body)]


def _training_sections(curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not curves:
        return []
    drawn = _draw(curves_figures(curves), _ABOUT_CURVES)
    return [page.section("Training", [drawn])]


def _pair_sections(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not any(row.get("what") == "faithfulness" for row in rows):
        return []
    drawn = _draw(faithfulness_figures(rows), "A dot is a pair.")
    lines = [(x[0], *x[-len(_FAITH) :]) for x in score_lines(rows)]
    lines = [x for x in lines if any(x[1:])]
    body = [page.paragraph(_ABOUT_PAIRS), drawn, page.table(html_lines(lines))]
    return [page.section("Attributions against leaving out", body)]


def _basis_sections(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [("site", "basis", "participation ratio")]
    lines += [
        (row["site"], row["basis"], _format_number(row.get("participation")))
        for row in rows
        if "basis" in row
    ]
    drawn = _draw(decomposition_figures(rows), "Directions in order of the basis.")
    body = [drawn]
    body.append(page.table(html_lines(lines)))
    return [page.section("Bases", body)]
