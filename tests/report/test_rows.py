import json
import math

import pytest
from rich.console import Console

from toyfeat.report import page
from toyfeat.report.rows import (
    Bound,
    Row,
    cells,
    html_table,
    output_folder,
    print_table,
    summary,
    write_json,
)

ROWS = [
    Row("a", "up", (0.5, 1.0, 0.9), Bound("at least", 0.8), random=0.1),
    Row("a", "nan", (math.nan, 1.0), Bound("at least", 0.8)),
    Row("b <&>", "shown", (3.0,)),
]


@pytest.mark.parametrize(
    ("bound", "good", "bad"),
    [
        (Bound("near", 1.0, 0.1), 1.05, 1.11),
        (Bound("at least", 1.0), 1.0, 0.99),
        (Bound("at most", 1.0), 1.0, 1.01),
        (Bound("below", 1.0), 0.99, 1.0),
        (Bound("equals", 1), 1.0, 2.0),
    ],
)
def test_a_bound_tells_good_from_bad_and_never_accepts_nan(bound, good, bad):
    assert bound.holds(good)
    assert not bound.holds(bad)
    assert not bound.holds(math.nan)


def test_the_median_decides_and_nan_is_a_miss():
    assert [row.holds for row in ROWS] == [True, False, None]
    assert cells(ROWS[0])[-1] == "ok"
    assert cells(ROWS[1])[-1] == "missed"
    assert cells(ROWS[2])[-1] == ""


def test_json_is_valid_and_holds_every_value(tmp_path):
    path = tmp_path / "rows.json"
    write_json(path, ROWS, header={"seconds": 1.5})

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    back = json.loads(path.read_text(), parse_constant=no_constant)
    assert back["seconds"] == 1.5
    assert back["rows"][0]["values"] == [0.5, 1.0, 0.9]
    assert back["rows"][0]["median"] == 0.9
    assert back["rows"][0]["expected"]["relation"] == "at least"
    assert back["rows"][1]["median"] == "nan"
    assert list(tmp_path.iterdir()) == [path]


def test_tables_show_every_row_and_escape_text():
    console = Console(record=True, width=160)
    print_table(ROWS, console)
    text, markup = console.export_text(), html_table(ROWS)
    for row in ROWS:
        assert row.name in text
        assert row.name in markup
    assert "b &lt;&amp;&gt;" in markup
    assert "b <&>" not in markup


def test_a_summary_has_a_line_for_each_case_with_all_columns():
    lines = summary(ROWS, [("Up", "up")])
    assert lines == [("case", "Up"), ("a", "0.9000")]


def test_a_page_refers_to_no_other_file(tmp_path):
    body = [page.paragraph("1 < 2"), page.picture("data:image/png;base64,AA", 'a "b"')]
    page.write_page(tmp_path / "x.html", "T", [page.section("S", body)], "end")
    text = (tmp_path / "x.html").read_text()
    assert "1 &lt; 2" in text
    assert "http" not in text
    assert 'alt="a &quot;b&quot;"' in text


def test_an_output_folder_keeps_what_is_in_it(tmp_path):
    for name in ("probe", "probe.partial"):
        (tmp_path / name).write_text("mine")
    assert output_folder(tmp_path) == tmp_path
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "probe": "mine",
        "probe.partial": "mine",
    }
    with pytest.raises(ValueError, match=r"output_folder: cannot write to .*probe"):
        output_folder(tmp_path / "probe")
