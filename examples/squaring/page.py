"""The page of the squaring networks: a story, and all figures behind folds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import toyfeat as ft
from examples.squaring.cases import (
    BEST_PC,
    GRAD_COS,
    GRAD_VARIANCE,
    PC_PRESERVED,
    PC_VARIANCE,
    PRESERVED,
    SUMMARY,
    SUMMARY_LEGEND,
    Case,
)
from examples.squaring.figures import draw_case, draw_panels, draw_story
from examples.squaring.measure import Measurements
from examples.squaring.network import Trained
from toyfeat.report import page
from toyfeat.report.plots import data_uri, png
from toyfeat.report.tables import Row, html_lines, html_table, summary, write_json
from toyfeat.types import Params

Result = tuple[Case, Trained, Measurements]

LEAD = "bias-uniform"
"""Slug of the case that the story is about, where it was run."""

_TITLE = "x²: features of the activations, features of the model"

_HEADINGS = (
    "What was asked",
    "What PCA of the activations returns",
    "What PCA of the gradients returns",
)

_QUESTION = (
    "A network with one ReLU layer is trained to compute x². Its output is one dot "
    "product: of the ten activations of the hidden layer with a vector w_out, their "
    "reader. Which methods, given what happens at the hidden layer, return that "
    "direction?"
)

_ACTIVATIONS = (
    "Principal components of the activations say how the function is put together. "
    "Any input is sent near one of two rays, ReLU(E) and ReLU(-E), and the two leading "
    "components span nearly the plane of these rays, without a bias exactly that "
    "plane. What is large at a layer need not be what is read there."
)

_GRADIENTS = (
    "The gradient of the output with respect to the activations is w_out for every "
    "input. Its second moment has one nonzero eigenvalue, and the eigenvector is the "
    "direction that is read."
)

_STORY_CAPTION = (
    "First, activations in the plane of their two leading components, in the seed of "
    "median error: they follow the rays, and the reader points elsewhere. Then, what "
    "is left when activations are projected on the leading direction of each method, "
    "medians over seeds."
)

_CAPTION = (
    "the seed of median error. Arrows are unit vectors, projected into the plane of "
    "the two leading components: a short one sticks out of it."
)

_MANY_CAPTION = "the seed of median error. Pairs are matched one to one."

SENTENCES = {
    "no-bias-uniform": (
        "Without a bias the network learns |x|, its error is 1/80, and the larger of "
        "its two components is linear in x, which the output does not use at all."
    ),
    "no-bias-normal": "The same with normal inputs, where the error is 3 - 8/π.",
    "bias-uniform": (
        "With a bias the fit is good and the score of PC2 is almost x², only because "
        "the inputs are symmetric and x² is the first even function: its direction "
        "is still not the one that is read."
    ),
    "bias-asymmetric": (
        "Without the symmetry PC2 has nothing to do with x² any more, and the "
        "gradient does not care."
    ),
    "bias-normal": "With normal inputs there are more components and the same end.",
    "residual": (
        "Where the layer writes into a residual stream and a direction u reads the "
        "sum, the reader of the hidden layer is W_out u, and gradients find it."
    ),
    "many": (
        "For twenty squares behind a rotation of the outputs, gradient PCA recovers "
        "the span of the readers but not single ones, for which per-example "
        "gradients are needed: they are sparse combinations of readers."
    ),
}
"""What each case shows, by its slug."""

_READING = (
    "U[a, b] and N(0, 1) are what inputs are drawn from: uniform and normal. "
    "A direction is a reader (a covector: the next layer takes the dot product with "
    "it) or a writer (a vector: what the previous layer adds). Cosines are with the "
    "reader unless they say otherwise. Figures are medians over seeds, with the least "
    "and the largest; random is the same figure for random directions, and expected "
    "comes from a closed form or a published value. Figures are rounded; report.json, "
    "beside this page, has all digits of every seed."
)


def write_report(
    folder: Path,
    results: Sequence[Result],
    rows: Sequence[Row],
    header: Mapping[str, Any],
) -> Path:
    """Write ``report.html``, ``report.json`` and a picture per case.

    Args:
      folder: an existing folder.
      results: a case, its networks and their measurements; at least one.
      rows: the figures.
      header: from :func:`toyfeat.report.tables.settings`.

    Returns:
      The path of the page.
    """
    by_slug = {result[0].slug: result for result in results}
    by_case = {
        case.name: [row for row in rows if row.case == case.name]
        for case, *_ in results
    }
    # The story, all cases in a table, then a section per case.
    lead = by_slug.get(LEAD, results[0])
    sections = _story(lead, by_case[lead[0].name])
    table = page.table(html_lines(summary(rows, SUMMARY)))
    body = [table, page.paragraph(SUMMARY_LEGEND)]
    sections.append(page.section("All networks in one table", body))
    for result in results:
        sections.append(_case_section(folder, result, by_case[result[0].name]))
    reading = [page.paragraph(_READING)]
    sections.append(page.section("How to read the figures", reading))
    write_json(folder / "report.json", rows, header=header)
    versions = ", ".join(f"{n} {v}" for n, v in header["versions"].items())
    seeds = len(results[0][1].loss)
    footer = (
        f"{seeds} seeds, {header['seconds']} s on {header['device']}; "
        f"Python {header['python']}, {versions}."
    )
    page.write_page(folder / "report.html", _TITLE, sections, footer)
    return folder / "report.html"


def _story(lead: Result, rows: Sequence[Row]) -> list[str]:
    """Tell what was asked and what two methods return, with the figures of a case."""
    bodies = [[page.paragraph(text)] for text in (_QUESTION, _ACTIVATIONS, _GRADIENTS)]
    case, _, measurements = lead
    if case.task.features == 1:
        acts, grads = _figures(case, rows)
        bodies[1].append(page.paragraph(acts))
        bodies[2].append(page.paragraph(grads))
        # Gradients come first in the measurements.
        shares = zip(measurements.variance, measurements.preserved, strict=True)
        kept = [tuple(float(np.median(x)) for x in pair) for pair in shares]
        drawn = draw_story(case, *_median_network(lead), (kept[1], kept[0]))
        bodies[2].append(
            page.panels(_drawings(drawn), f"{case.name}. {_STORY_CAPTION}")
        )
    return list(map(page.section, _HEADINGS, bodies))


def _figures(case: Case, rows: Sequence[Row]) -> tuple[str, str]:
    """Say what the components of the activations and of the gradients are worth."""
    by_name = {row.name: row for row in rows}

    def percent(name: str) -> str:
        return f"{round(by_name[name].median, 2) + 0.0:.0%}".replace("%", " %")

    best, cos = by_name[BEST_PC], by_name[GRAD_COS]
    acts = (
        f"In the case “{case.name}” the best component has |cos| "
        f"{best.median:.2f} with the reader; as many random directions reach "
        f"{best.random:.2f}. The first component keeps {percent(PC_VARIANCE)} of the "
        f"variance of the activations and {percent(PC_PRESERVED)} of the output."
    )
    grads = (
        f"Its |cos| with the reader is {cos.median:.4f} (random {cos.random:.2f}). It "
        f"keeps {percent(GRAD_VARIANCE)} of the variance of the activations and "
        f"{percent(PRESERVED)} of the output."
    )
    return acts, grads


def _case_section(folder: Path, result: Result, rows: Sequence[Row]) -> str:
    """Draw the network of median error, write its picture, and return the section."""
    case = result[0]
    net, params = _median_network(result)
    (folder / f"{case.slug}.png").write_bytes(png(draw_case(case, net, params)))
    drawings = _drawings(draw_panels(case, net, params))
    caption = _CAPTION if case.task.features == 1 else _MANY_CAPTION
    details = [
        page.panels(drawings, f"{case.name}: {caption}"),
        page.paragraph(
            "Centred gradient PCA of this network: "
            f"{ft.describe(net.centred)}. Not centred: "
            f"{ft.describe(net.grads_pca)}."
        ),
        page.table(html_table(rows)),
    ]
    # A miss is said in front of the fold.
    bounded = [row.holds for row in rows if row.bound is not None]
    title = (
        f"Picture and {len(rows)} figures; {sum(map(bool, bounded))} of {len(bounded)} "
        "expectations are met"
    )
    body = [page.paragraph(SENTENCES[case.slug]), page.fold(title, details)]
    return page.section(case.name, body)


def _median_network(result: Result) -> tuple[Measurements, Params]:
    """Measurements and parameters of the seed of median error."""
    _, nets, measurements = result
    by_error = np.argsort(np.asarray(measurements.error))
    median = int(by_error[len(nets.loss) // 2])
    return jax.tree.map(lambda x: x[median], (measurements, nets.params))


def _drawings(figures: Sequence[Any]) -> list[tuple[str, str]]:
    """Render figures of one axis, each with its title as the alternative text."""
    return [(data_uri(png(drawn)), drawn.axes[0].get_title()) for drawn in figures]
