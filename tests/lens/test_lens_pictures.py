"""Pictures and figures of docs/lens.md are those of the rows that are kept."""

import json
import re

import pytest
from processes import ROOT

ROWS = ROOT / "benchmarks" / "results" / "lens-recall-cpu.jsonl"
COLUMNS = "two_hop", "association", "typo", "rhyme", "other_languages"
NAMES = {
    "logit": "logit",
    "Jacobian": "jacobian",
    "Jacobian, shrunken": "jacobian, shrunken",
    "frozen Jacobian": "frozen jacobian",
    "clustered": "clustered",
    "contrast of the clusters": "contrast",
    "least squares": "least squares",
    "tuned": "tuned",
    "second moment": "second moment",
    "`J - I` turned at random": "jacobian, turned",
}
"""Of the lines of the table, and of the rows."""


@pytest.fixture(scope="module")
def recall():
    """Recall at 10 with its interval, by lens and set."""
    lines = map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())
    rows = {(x["method"], x["case"]): x for x in lines if x["k"] == 10}
    return {key: [x["recall"], *x["interval"]] for key, x in rows.items()}


def test_the_table_of_recall_is_that_of_the_rows(recall):
    page = (ROOT / "docs" / "lens.md").read_text(encoding="utf-8")
    table = page.split("| lens | two hops (106)")[1].split("\n\n")[0]
    lines = [line.split("|")[1:-1] for line in table.split("\n")[2:]]
    assert [name.strip() for name, *_ in lines] == list(NAMES)
    for name, *cells in lines:
        for case, cell in zip(COLUMNS, cells, strict=True):
            shown = [float(x) for x in re.findall(r"\.\d+|1\.00", cell)]
            kept = recall[NAMES[name.strip()], case]
            assert shown == pytest.approx(kept[: len(shown)], abs=0.0051), (name, case)


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import lens_pictures

    return lens_pictures


def test_the_picture_has_lenses_of_the_rows(recall, pictures):
    assert set(pictures.SHOWN) <= {method for method, _ in recall}
    looks = [(colour, line) for _, colour, line in pictures.SHOWN.values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.slow
def test_pictures_are_drawn(pictures):
    pytest.importorskip("matplotlib", reason="pip install 'toyfeat[plot]'")
    for draw, name in (
        (pictures.draw_recall, "recall"),
        (pictures.draw_error, "error"),
    ):
        rows = pictures.read_rows(ROWS.with_name(f"lens-{name}-cpu.jsonl"))
        assert draw(rows).startswith(b"\x89PNG")
