"""Names of any characters, and scores that are missing, in all reports."""

import io
import json

import matplotlib.text
import numpy as np
import pytest
from rich.console import Console

from toyfeat.report import language, leaderboard, sweeps, tables
from toyfeat.report.names import label, printable
from toyfeat.train.sweeps import Row

pytest.importorskip("matplotlib")

NAMES = [
    "from $5_to_$6",
    r"$\bad$",
    r"a\$b$c",
    "$",
    "_hidden",
    "<b>&|[bold]",
    "two\nlines\ttab\0",
    "a\ud800b",
]


def families(names):
    return {
        name: [
            Row(i, {name: 1e-3}, {"fvu": 0.5 - i / 9, "l0": i + 2.0}) for i in (0, 1)
        ]
        for name in names
    }


@pytest.fixture(autouse=True)
def quick_png(monkeypatch):
    """Lay pictures out, with all their texts, but do not render them."""

    def lay_out(picture):
        picture.draw_without_rendering()
        return b"png"

    for module in (language, leaderboard, sweeps):
        monkeypatch.setattr(module, "png", lay_out)


def drawn_texts(picture):
    """What a picture shows, as matplotlib prepares it, and whether it is a formula."""
    texts = picture.findobj(matplotlib.text.Text)
    return [text._preprocess_math(text.get_text()) for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is(name):
    text, is_formula = matplotlib.text.Text()._preprocess_math(label(name))
    assert not is_formula
    assert text.strip() == printable(name)
    assert "\n" not in text
    text.encode("utf-8")


def test_sweeps_have_names_of_any_characters(tmp_path):
    setting = NAMES[0]
    front = sweeps.front_figure(families(NAMES), "l0", "fvu")
    legend = [text.get_text() for text in front.axes[0].get_legend().get_texts()]
    assert len(legend) == 2 * len(NAMES)
    chart = sweeps.brittleness_figure(
        {setting: families([setting])[setting]}, setting, setting, score="l0", good=0.5
    )
    shown = drawn_texts(chart)
    assert sum(setting in text for text, is_formula in shown if not is_formula) == 3
    console = Console(file=io.StringIO(), width=300)
    path = sweeps.write_sweep(
        tmp_path,
        families(NAMES),
        {"front": (front, NAMES[5]), "map": (chart, NAMES[7])},
        title=NAMES[7],
        argument=NAMES,
        header={name: name for name in NAMES},
        console=console,
    )
    assert "<b>" not in path.read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert [row["family"] for row in saved["members"]] == [
        n for n in NAMES for _ in "ab"
    ]
    printed = console.file.getvalue()
    printed.encode("utf-8")
    for name in NAMES:
        assert printable(name) in printed


@pytest.mark.slow
def test_the_other_reports_have_names_of_any_characters(tmp_path):
    row = dict.fromkeys(leaderboard.COLUMNS, 0.5) | {"side": "readers"}
    rows = [row | {"case": name, "method": name} for name in NAMES]
    console = Console(file=io.StringIO(), width=300)
    header = {name: name for name in NAMES}
    leaderboard.write_leaderboard(
        tmp_path, rows, argument=NAMES, header=header, console=console
    )
    tables.print_table([tables.Row(name, name, (1.0,)) for name in NAMES], console)
    printed = console.file.getvalue()
    printed.encode("utf-8")
    for name in NAMES:
        assert printable(name) in printed
    # A page on a language model: methods, sites and bases.
    scores = [SCORES | {"method": f"{name}-k2-s0", "l0": 2.0} for name in NAMES]
    faith = scores[0] | {"what": "faithfulness", "effects": [[0.1, 0.2]]}
    bases = [BASIS | {"site": n, "basis": n, "spectrum": [1.0]} for n in NAMES[::4]]
    language.write_language(
        tmp_path, [*scores, faith], bases, {name: [] for name in NAMES}, header=header
    )


SCORES = {"site": "s", "method": "acts-k2-s0", "what": "scores"}
BASIS = {"site": "s", "basis": "gradient pca", "participation": 1.0}
FAITH = {"site": "s", "method": "acts-k2-s0", "what": "faithfulness"}


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("evaluation", "decomposition"),
    [
        ([], [BASIS | {"spectrum": [0.0, 0.0], "participation": None}]),
        ([], [BASIS | {"spectrum": [None]}, BASIS | {"site": "t", "spectrum": []}]),
        (
            [SCORES | {"l0": None}],
            [SCORES | {"method": "pca, 1", "l0": None, "recovered": None}],
        ),
        ([SCORES | {"l0": None}, SCORES | {"method": "acts-k4-s0", "l0": 4.0}], []),
        ([SCORES | {"l0": 0.0}], []),
        (
            [
                FAITH | {"effects": []},
                FAITH | {"effects": [[0.0, 0.0]], "correlation": None},
                FAITH | {"effects": [[None, 1.0], [0.5, 0.25]]},
            ],
            [],
        ),
    ],
)
def test_a_page_shows_what_there_is(tmp_path, evaluation, decomposition):
    curves = {"acts-k2-s0": {"step": np.arange(2.0), "dead": np.full(2, np.nan)}}
    path = language.write_language(
        tmp_path, evaluation, decomposition, {}, header={}, curves=curves
    )
    assert "data:image/png;base64," in path.read_text()
