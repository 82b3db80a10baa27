import json
import math

import pytest
from rich.console import Console

from toyfeat.report.tables import (
    Bound,
    Row,
    html_lines,
    html_table,
    lines_of,
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
    assert [line[-1] for line in lines_of(ROWS)] == ["ok", "missed", ""]


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


def test_rounding_never_contradicts_the_mark_beside_it():
    near_one = Row("a", "cos", (0.99994,), Bound("at least", 0.99995))
    small = Row("a", "rest", (1e-7,), Bound("at most", 1e-8))
    tiny = Row("a", "rest", (1e-9,), Bound("at most", 1e-8))
    below = Row("a", "error", (0.000999,), Bound("below", 1e-3))
    lines = lines_of([near_one, small, tiny, below])
    texts = [line[1].strip() for line in lines]
    assert texts == ["0.9999", "1e-7", "≈ 0", "0.000999"]
    assert [line[-1] for line in lines] == ["missed", "missed", "ok", "ok"]


def test_numbers_are_set_to_the_right_and_details_can_be_left_out():
    lines = [("task", "n", "spread", "text"), ("a", "1.5*", "0.3 (0.1 to 0.4)", "1 b")]
    markup = html_lines(lines)
    for text in ("n", "spread"):
        assert f'<th class="num">{text}</th>' in markup
    assert '<td class="num">1.5*</td><td class="num">0.3 (0.1 to 0.4)</td>' in markup
    assert "<td>a</td>" in markup
    assert "<td>1 b</td>" in markup
    table = html_table(ROWS)
    assert table.count('class="num detail"') == 3 * (1 + len(ROWS))
    assert table.count("<tbody>") == 2
    assert "<tbody>" not in html_table(ROWS[:2])  # one case needs no heading


def test_a_summary_has_a_line_for_each_case_with_all_columns():
    lines = summary(ROWS, [("Up", "up")])
    assert lines == [("case", "Up"), ("a", "0.9000")]


def test_settings_say_how_a_report_was_made():
    made = settings({"seeds": 8, "out": "a/b"}, seconds=1.26)
    assert made["settings"] == {"seeds": "8", "out": "a/b"}
    assert made["seconds"] == 1.3
    assert {"toyfeat", "jax", "numpy"} <= set(made["versions"])
    assert json.loads(json.dumps(made)) == made
