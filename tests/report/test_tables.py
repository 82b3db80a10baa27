import json
import math

import pytest
from rich.console import Console

from toyfeat.report.tables import (
    Bound,
    Row,
    cells,
    html_table,
    print_table,
    settings,
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


def test_settings_say_how_a_report_was_made():
    made = settings({"seeds": 8, "out": "a/b"}, seconds=1.26)
    assert made["settings"] == {"seeds": "8", "out": "a/b"}
    assert made["seconds"] == 1.3
    assert {"toyfeat", "jax", "numpy"} <= set(made["versions"])
    assert json.loads(json.dumps(made)) == made
