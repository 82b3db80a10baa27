"""Write a page on a language model's dictionaries: scores, pictures, latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toyfeat.dictionary.latents import Latent
from toyfeat.report import page
from toyfeat.report.language_figures import (
    curves_figure,
    decomposition_figure,
    faithfulness_figure,
    fronts_figure,
    group_seeds,
)
from toyfeat.report.latents import latent_html
from toyfeat.report.plots import data_uri, png
from toyfeat.report.tables import html_lines, spread

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
_ABOUT_SCORES = (
    "Each method is put in the place of the activations of the site, on text that "
    "nothing was trained on; the first position of a window is left as it is. "
    "Recovered is the share of the cross-entropy that the site's mean in its place "
    "costs; attribution L0 the fewest latents with 95 % of the first-order effect on "
    "the loss, and all of them where these have less (unmet: at what share of the "
    "tokens); attribution L0 explained leaves the error's effect out of the sum. "
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
    lines: list[tuple[str, ...]] = [("method", "seeds", *_SCORES, *_FAITH)]
    for name, seeds in group_seeds(scores).items():
        checked = [faith[row["method"]] for row in seeds if row["method"] in faith]
        cells = [_format_range([row.get(score) for row in seeds]) for score in _SCORES]
        cells += [
            _format_range([row.get(score) for row in checked]) for score in _FAITH
        ]
        lines.append((name, str(len(seeds)), *cells))
    return lines


def _format_range(values: Sequence[Any]) -> str:
    """Format a median with its range, and how many values are missing."""
    numbers = [float(x) for x in values if x is not None]
    if not numbers:
        return ""
    missing = len(values) - len(numbers)
    return spread(numbers, ".3f") + (f", {missing} missing" if missing else "")


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
      curves: of :func:`curves_figure`.

    Returns:
      The path of the page.

    Raises:
      ValueError: if there is nothing to show.
      ImportError: without matplotlib.
    """
    if not evaluation and not decomposition:
        raise ValueError("write_language: there are no rows; evaluate first")
    sections = [
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


def _score_sections(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    body = [
        page.paragraph(_ABOUT_SCORES),
        page.picture(data_uri(png(fronts_figure(rows))), "By latents."),
        page.table(html_lines(score_lines(rows))),
    ]
    return [page.section("What the model keeps", body)]


def _training_sections(curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not curves:
        return []
    image = data_uri(png(curves_figure(curves)))
    return [page.section("Training", [page.picture(image, _ABOUT_CURVES)])]


def _pair_sections(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not any(row.get("what") == "faithfulness" for row in rows):
        return []
    image = data_uri(png(faithfulness_figure(rows)))
    body = [page.paragraph(_ABOUT_PAIRS), page.picture(image, "A dot is a pair.")]
    return [page.section("Attributions against leaving out", body)]


def _basis_sections(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    image = data_uri(png(decomposition_figure(rows)))
    lines = [("site", "basis", "participation ratio")]
    lines += [
        (row["site"], row["basis"], _format_number(row.get("participation")))
        for row in rows
        if "basis" in row
    ]
    body = [page.picture(image, "Directions in order of the basis.")]
    body.append(page.table(html_lines(lines)))
    return [page.section("Bases", body)]
