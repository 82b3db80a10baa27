import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from toyfeat.report.sweeps import (
    brittleness_figure,
    front_figure,
    success_share,
    table_lines,
    write_sweep,
)
from toyfeat.train.sweeps import Row

RATES, SPARSITIES = (1e-3, 1e-2), (0.1, 1.0, 10.0)


def family(shift=0.0):
    """Two starts of a grid; one run diverged, one controller was at its limit."""
    rows = []
    for start in range(2):
        for i, rate in enumerate(RATES):
            for j, sparsity in enumerate(SPARSITIES):
                settings = {"rate": rate, "sparsity": sparsity, "start": float(start)}
                score = 0.1 + 0.3 * i + 0.2 * j + 0.02 * start + shift
                figures = {"score": score, "fvu": 10.0**-j, "l0": 2.0 + i + 10 * j}
                lost = (start, i, j) == (1, 1, 2)
                figures = {n: np.nan if lost else x for n, x in figures.items()}
                stuck = (start, i, j) == (0, 0, 0)
                rows.append(Row(len(rows), settings, figures, not lost, stuck))
    return rows


def test_a_table_has_a_line_per_member_and_says_what_went_wrong():
    lines = table_lines({"a": family(), "b": family(0.1)})
    assert lines[0] == (
        "family", "member", "rate", "sparsity", "start", "score", "fvu", "l0", "state"
    )  # fmt: skip
    assert len(lines) == 25
    assert lines[1] == ("a", "0", "0.001", "0.1", "0", "0.1", "1", "2", "saturated")
    assert lines[12][5:] == ("nan", "nan", "nan", "not finite")
    assert lines[13][:2] == ("b", "0")
    few = table_lines({"a": family()}, ["l0", "unknown"])
    assert few[0][5:] == ("l0", "unknown", "state")
    assert few[1][5:] == ("2", "", "saturated")


def test_a_brittleness_map_draws_medians_marks_and_shares():
    pytest.importorskip("matplotlib")
    drawn = brittleness_figure(
        {"a": family(), "b": family(0.1)}, "sparsity", "rate", score="score", good=0.5
    )
    left, right, *_ = drawn.axes
    assert left.get_title() == "a\n42% of runs have score ≥ 0.5"
    assert right.get_title() == "b\n58% of runs have score ≥ 0.5"
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    cells = left.collections[0].get_array()
    want = 0.11 + 0.3 * np.arange(2)[:, None] + 0.2 * np.arange(3)
    want[1, 2] = 0.8  # one of the two diverged
    np.testing.assert_allclose(np.asarray(cells), want)
    marks = [line.get_xydata().tolist() for line in left.lines[::2]]
    assert marks == [[[10.0, 1e-2]], [[0.1, 1e-3]]]  # a cross and a ring
    assert [t.get_text() for t in left.get_xticklabels()] == ["0.1", "1", "10"]
    assert drawn.axes[-1].get_ylabel() == "score"
    options = {"middle": np.max, "limits": (0.0, 2.0)}
    most = brittleness_figure(
        {"a": family(), "b": family(0.1)},
        *("sparsity", "rate"),
        score="score",
        good=0.5,
        **options,
    )
    cells = most.axes[0].collections[0]
    assert cells.get_clim() == (0.0, 2.0)
    assert (np.asarray(cells.get_array()) >= want - 1e-9).all()
    assert (np.asarray(cells.get_array()) > want + 1e-3).any()
    alone = brittleness_figure(
        {"a": family()[:1]}, "sparsity", "rate", score="fvu", good=0.5, larger=False
    )
    assert "0% of runs have fvu ≤ 0.5" in alone.axes[0].get_title()
    with pytest.raises(ValueError, match=r"axes are logarithmic, .* > 0, got 0"):
        brittleness_figure({"a": family()}, "sparsity", "start", score="fvu", good=1)
    for none in ({}, {"a": family(), "b": []}):
        with pytest.raises(ValueError, match="brittleness_figure: wanted families"):
            brittleness_figure(none, "sparsity", "rate", score="fvu", good=1)


def test_a_front_figure_draws_every_run_and_each_front():
    pytest.importorskip("matplotlib")
    drawn = front_figure({"a": family(), "b": family(0.1)}, "l0", "fvu")
    (axis,) = drawn.axes
    assert [axis.get_xscale(), axis.get_yscale()] == ["log", "log"]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[0] == "a: 11 of 12 runs finite"
    front = axis.lines[0].get_xydata()
    np.testing.assert_allclose(
        np.unique(front, axis=0), [[2, 1], [12, 0.1], [22, 0.01]]
    )
    assert "smaller is better" in axis.get_xlabel()
    larger = front_figure({"a": family()}, "l0", "score", larger=["score"])
    assert larger.axes[0].get_ylabel() == "score (larger is better)"


def test_shares_count_runs_that_diverged_as_failures():
    assert success_share(family(), "score", 0.0) == 11 / 12
    assert success_share(family(), "fvu", 0.05, larger=False) == 3 / 12
    with pytest.raises(ValueError, match="there are no members"):
        success_share([], "fvu", 1.0)


def test_everything_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    families = {"a": family()}
    console = Console(width=120, record=True, file=io.StringIO())
    picture = front_figure(families, "l0", "fvu")
    page = write_sweep(
        tmp_path, families, {"front": (picture, "the front")}, title="A sweep",
        argument=["Why."], header={"seconds": 3}, figures=["fvu"], console=console,
    )  # fmt: skip
    text = page.read_text()
    assert text.count("<tr>") == 13
    assert "data:image/png" in text
    assert "http" not in text
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    whole = json.loads((tmp_path / "sweep.json").read_text())
    assert whole["seconds"] == 3
    assert whole["members"][11]["figures"]["fvu"] == "nan"
    assert not whole["members"][11]["finite"]
    assert whole["members"][0]["settings"] == {
        "rate": 0.001,
        "sparsity": 0.1,
        "start": 0,
    }
    assert "not finite" in console.export_text()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"install toyfeat\[plot\]"):
        front_figure({"a": family()}, "l0", "fvu")
