"""Pictures of the rows of ``lens_error.py`` and ``lens_recall.py``, for the docs.

python benchmarks/lens_pictures.py --folder docs/images
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import parse_command

from toyfeat.report import plots

RESULTS = Path(__file__).parent / "results"
SHOWN = {
    "jacobian": ("Jacobian lens", plots.BLUE, "-"),
    "frozen jacobian": ("frozen Jacobian", plots.GREEN, "--"),
    "clustered": ("two clusters", plots.SKY, "-."),
    "least squares": ("least squares", plots.ORANGE, "-"),
    "tuned": ("tuned lens", plots.RED, "--"),
    "second moment": ("second moment", plots.PINK, "-."),
    "logit": ("logit lens", "black", ":"),
    "jacobian, turned": ("turned at random", plots.GREY, ":"),
}
"""Lenses of the picture of recall, with their names, colours and lines there."""


@dataclass(frozen=True)
class PicturesConfig:
    """Options of this command."""

    folder: Path = Path("docs/images")
    """Of the pictures."""
    error: Path = RESULTS / "lens-error-cpu.jsonl"
    """Rows of ``lens_error.py``."""
    recall: Path = RESULTS / "lens-recall-cpu.jsonl"
    """Rows of ``lens_recall.py``."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a benchmark."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def draw_error(rows: list[dict[str, Any]]) -> bytes:
    """Draw the relative error of fits by layer, and the cosine of two halves."""
    (scatter,) = (
        x for x in rows if x["case"] == "lens scatter" and x["method"] == "rows"
    )
    figure = plots.figure(7.0, 2.8)
    left, right = figure.subplots(1, 2)
    colours = (plots.RED, plots.BLUE, plots.GREEN)
    for num, colour in zip((20, 100, 400), colours, strict=True):
        errors = scatter[f"error_{num}"]
        left.plot(errors, color=colour, label=f"{num} prompts")
    left.set(xlabel="layer", ylabel="error, share of |J|", ylim=(0, None))
    left.legend(frameon=False)
    halves = scatter["size"]["sample"] // 2
    right.plot(scatter["cosine_of_halves"], color="black")
    right.set(xlabel="layer", ylabel=f"cosine of two fits of {halves} prompts")
    right.set_ylim(None, 1)
    return plots.png(figure)


def draw_recall(rows: list[dict[str, Any]]) -> bytes:
    """Draw recall at 10 by layer, one panel per test set."""
    rows = [x for x in rows if x.get("k") == 10]
    kinds = list(dict.fromkeys(x["case"] for x in rows))
    figure = plots.figure(9.0, 5.4)
    for axes, kind in zip(figure.subplots(2, 3).flat, kinds, strict=True):
        methods = {line["method"]: line for line in rows if line["case"] == kind}
        for method, (label, colour, style) in SHOWN.items():
            if line := methods.get(method):
                layers = [line["size"]["every"] * i for i in range(len(line["layers"]))]
                axes.plot(layers, line["layers"], style, color=colour, label=label)
        # One scale: panels in which nothing is found should look so.
        axes.set(title=kind.replace("_", " "), ylim=(-0.02, 1.02))
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    for axes in figure.axes[3:]:
        axes.set_xlabel("layer")
    for axes in (figure.axes[0], figure.axes[3]):
        axes.set_ylabel("recall at 10, share")
    return plots.png(figure)


def main() -> None:
    """Draw what has rows."""
    config = parse_command(PicturesConfig, __doc__)
    for name, path, draw in (
        ("lens-error.png", config.error, draw_error),
        ("lens-recall.png", config.recall, draw_recall),
    ):
        if path.exists():
            (config.folder / name).write_bytes(draw(read_rows(path)))


if __name__ == "__main__":
    main()
