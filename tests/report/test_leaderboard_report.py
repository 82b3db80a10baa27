import io
import json

import pytest
from rich.console import Console

from toyfeat.report import leaderboard

SCORES = {"precision": 0.5, "found": 4, "random": 0.3, "ignored": 0.0, "seconds": 2.0}


def row(case, method, seed, readers, writers=0.25, **more):
    scores = {"readers": readers, "writers": writers, "preserved": 0.75, **SCORES}
    return {"case": case, "method": method, "seed": seed, "side": "readers"} | {
        **scores,
        **more,
    }


ROWS = [
    row("squares", "oracle", 0, 1.0),
    row("squares", "PCA", 0, 0.1, preserved=-0.5),
    row("squares", "PCA", 1, 0.4, preserved=0.5),
    row("squares", "PCA", 2, 0.3, preserved=0.25),
    row("squares", "SAE", 0, 0.9),
    row("circles", "SAE", 0, 0.9, writers=0.2, side="writers"),
]


def test_the_summary_has_medians_of_each_side_and_stars_of_methods():
    assert leaderboard.summary_lines(ROWS) == [
        ("method", "squares", "circles"),
        ("PCA", "0.300", ""),
        ("SAE", "0.900*", "0.200*"),
        ("oracle", "1.000", ""),
    ]


def test_a_task_has_every_score_with_its_range():
    head, *lines = leaderboard.task_lines(ROWS, "squares")
    assert [line[0] for line in lines] == ["PCA", "SAE", "oracle"]
    cells = dict(zip(head, lines[0], strict=True))
    assert cells["readers"] == "0.3 (0.1 to 0.4)"
    assert cells["preserved"] == "0.25 (-0.5 to 0.5)"
    assert cells["writers"] == "0.25"  # the same thrice
    assert cells["found"] == "4"


def test_the_page_the_picture_and_the_terminal_have_all_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    out = io.StringIO()
    verdicts = [("bar", "task"), ("beats <all>", "squares")]
    page = leaderboard.write_leaderboard(
        tmp_path,
        ROWS,
        argument=["Why & how."],
        header={"size": "none"},
        tasks={"squares": ("About squares.", leaderboard.heat_figure(ROWS))},
        verdicts=verdicts,
        console=Console(file=out, width=200),
    )
    html, said = page.read_text(), out.getvalue()
    for text in ("Why &amp; how.", "beats &lt;all&gt;", "About squares.", "size: none"):
        assert text in html
    assert html.count("data:image/png") == 2
    for text in ("0.3 (0.1 to 0.4)", "0.900*", "beats <all>", "circles"):
        assert text in said
    kept = json.loads((tmp_path / "leaderboard.json").read_text())
    assert kept == {"size": "none", "rows": ROWS}
    assert (tmp_path / "leaderboard.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="write_leaderboard: there are no rows"):
        leaderboard.write_leaderboard(tmp_path, [], argument=[], header={})


def test_cells_of_the_picture_are_medians():
    pytest.importorskip("matplotlib")
    axis = leaderboard.heat_figure(ROWS).axes[0]
    (image,) = axis.images
    values = image.get_array()
    assert values.shape == (3, 2)
    assert values.mask.sum() == 2  # of pairs that were not measured
    assert values[0, 0] == pytest.approx(0.3)
    assert sorted(text.get_text() for text in axis.texts) == sorted(
        ["0.30", "0.90", "0.20", "1.00"]
    )
