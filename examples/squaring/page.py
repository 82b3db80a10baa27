"""The report of the squaring networks: a page, JSON and a picture per case."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import toyfeat as ft
from examples.squaring.cases import SUMMARY, SUMMARY_LEGEND, Case
from examples.squaring.figures import draw_case
from examples.squaring.measure import Measurements
from examples.squaring.network import Trained
from toyfeat.report import page
from toyfeat.report.plots import data_uri, png
from toyfeat.report.tables import Row, html_lines, html_table, summary, write_json

_TITLE = "x²: features of the activations, features of the model"

_ARGUMENT = (
    "A network of one ReLU layer is trained to square its input. The principal "
    "components of its activations say how the function is put together: without a "
    "bias they span ReLU(E) and ReLU(-E), the two rays that any input is sent to, "
    "and with one they are close to that. Neither is the direction that the network "
    "reads. The gradient of the output with respect to the activations is that "
    "direction: one nonzero eigenvalue, and projecting on it keeps the whole output.",
    "A direction is a reader (a covector: the next layer takes the dot product with "
    "it) or a writer (a vector: what the previous layer adds). All cosines here are "
    "with the reader, w_out, unless they say otherwise. The figures are medians over "
    "seeds; each figure that has a closed form or a published value shows it, and "
    "cosines stand beside what random directions reach.",
)

_CAPTION = (
    "the seed of median error. Arrows are unit vectors, projected into the plane of "
    "the two leading components: a short one sticks out of it."
)

_MANY_CAPTION = "the seed of median error. Pairs are matched one to one."

_REMARKS = {
    "no-bias-uniform": (
        "Without a bias the network can only compute c₊ max(x, 0) + c₋ max(-x, 0), so "
        "it learns |x| and its error is 1/80. The activations have exactly rank 2. "
        "The larger component is linear in x, which the output does not use at all."
    ),
    "no-bias-normal": "The same with normal inputs: the error is 3 - 8/π.",
    "bias-uniform": (
        "With a bias the fit is good. The score of PC2 is almost x², but only because "
        "the inputs are symmetric: x² is the first even function. Its direction is "
        "still not the one that is read."
    ),
    "bias-asymmetric": (
        "Break the symmetry and the parity trap is gone: PC2 has nothing to do with "
        "x² any more. The gradient does not care."
    ),
    "bias-normal": "Normal inputs: more components, the same conclusion.",
    "residual": (
        "The layer writes into a residual stream and a direction u reads the sum; at "
        "the hidden layer the reader is W_out u."
    ),
    "many": (
        "Twenty squares on sixty neurons, behind a random rotation of the outputs. "
        "Gradient PCA of the loss recovers the span of the readers, but not the "
        "readers: second moments determine a subspace and its principal axes, and "
        "those are the readers only where these are orthogonal. Single readers need "
        "per-example gradients, which are sparse combinations of them."
    ),
}


def write_report(
    folder: Path,
    results: Sequence[tuple[Case, Trained, Measurements]],
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
    # The argument and the summary, then a section per case.
    table = page.table(html_lines(summary(rows, SUMMARY)))
    argument = [*map(page.paragraph, (*_ARGUMENT, SUMMARY_LEGEND)), table]
    sections = [page.section("The argument", argument)]
    for case, nets, measurements in results:
        case_rows = [row for row in rows if row.case == case.name]
        sections.append(_case_section(folder, case, nets, measurements, case_rows))
    write_json(folder / "report.json", rows, header=header)
    versions = ", ".join(f"{n} {v}" for n, v in header["versions"].items())
    seeds = len(results[0][1].loss)
    footer = (
        f"{seeds} seeds, {header['seconds']} s on {header['device']}; "
        f"Python {header['python']}, {versions}."
    )
    page.write_page(folder / "report.html", _TITLE, sections, footer)
    return folder / "report.html"


def _case_section(
    folder: Path,
    case: Case,
    nets: Trained,
    measurements: Measurements,
    rows: Sequence[Row],
) -> str:
    """Draw the network of median error, write its picture, and return the section."""
    by_error = np.argsort(np.asarray(measurements.error))
    median = int(by_error[len(nets.loss) // 2])
    net, params = jax.tree.map(lambda x: x[median], (measurements, nets.params))
    image = png(draw_case(case, net, params))
    (folder / f"{case.slug}.png").write_bytes(image)
    caption = _CAPTION if case.task.features == 1 else _MANY_CAPTION
    body = [
        page.paragraph(_REMARKS[case.slug]),
        page.picture(data_uri(image), f"{case.name}: {caption}"),
        page.paragraph(
            "Centred gradient PCA of this network: "
            f"{ft.describe(net.centred)}. Not centred: "
            f"{ft.describe(net.grads_pca)}."
        ),
        page.table(html_table(rows)),
    ]
    return page.section(case.name, body)
