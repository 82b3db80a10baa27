"""JSON files that are broken in every way, and fields of wrong types."""

import json
import math

import pytest

from toyfeat.files.json import (
    check_keys,
    field,
    list_field,
    read_json,
    read_json_lines,
)

BROKEN = {
    "empty": (b"", "other text"),
    "cut off": (b'{"k": ', "other text"),
    "words": (b"hello", "other text"),
    "two values": (b"{} {}", "other text"),
    "not UTF-8": (b'{"k": "\xff"}', "not UTF-8 at 7"),
    "UTF-16": ('{"k": 1}'.encode("utf-16"), "not UTF-8"),
    "deep lists": (b"[" * 200_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "long number": (b'{"k": ' + b"9" * 6000 + b"}", "digits"),
    "key twice": (b'{"k": 1, "k": 2}', "the key 'k' twice"),
    "one of many twice": (
        b"{%s}" % b",".join(b'"%d": 1' % (min(i, 99_998)) for i in range(100_000)),
        "the key '99998' twice",
    ),
    "list": (b"[1, 2]", r"\[1, 2\]"),
    "string": (b'"x"', "'x'"),
    "number": (b"3", "got 3"),
    "null": (b"null", "got None"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, name):
    data, fault = BROKEN[name]
    path = tmp_path / "cfg.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=fault) as caught:
        read_json(path, "load", advice="make it again")
    text = str(caught.value)
    assert text.startswith(f"load: {path} must be ")
    assert text.endswith("; make it again")
    assert len(text) < 600


def test_a_file_that_is_missing_or_too_large_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load: there is no file .*none\.json"):
        read_json(tmp_path / "none.json", "load")
    with pytest.raises(FileNotFoundError, match="load: there is no file"):
        read_json(tmp_path, "load")  # a folder
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"k": "x" * 100}))
    with pytest.raises(ValueError, match=r"load: .*large\.json must have at most 50"):
        read_json(path, "load", max_bytes=50)


def test_a_whole_file_is_read_as_python_writes_it(tmp_path):
    path = tmp_path / "cfg.json"
    values = {"κ": [1, 2.5, None, True], "inf": math.inf, "n": {"a": "b"}}
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert read_json(path, "load") == values


WRONG = [
    (int, "3"),
    (int, True),
    (int, 3.0),
    (int, None),
    (int, [3]),
    (int, -1),
    (int, 10**30),
    (float, "x"),
    (float, False),
    (float, math.nan),
    (float, math.inf),
    (float, -0.1),
    (float, 10**400),
    (bool, "false"),
    (bool, 0),
    (bool, None),
    (str, 3),
    (dict, []),
    (list, {}),
]


@pytest.mark.parametrize(("kind", "value"), WRONG)
def test_a_value_of_another_type_or_range_is_refused_by_name(kind, value):
    bounds = {"low": 0, "high": 9} if kind in (int, float) else {}
    with pytest.raises(ValueError, match=r"^load: 'key' in f\.json must be .*, got "):
        field({"key": value}, "key", kind, "f.json", "load", **bounds)
    good = {int: 1, float: 1.5, bool: True, str: "a", dict: {}, list: []}[kind]
    values = {"key": [good, value]}
    with pytest.raises(ValueError, match=r"^load: 'key\[1\]' in f\.json must be "):
        list_field(values, "key", kind, "f.json", "load", **bounds)


def test_values_come_as_their_type():
    values = {"i": 3, "f": 2, "b": False, "s": "x", "o": {"a": 1}, "l": [1, 2]}
    kinds = {"i": int, "f": float, "b": bool, "s": str, "o": dict, "l": list}
    for name, kind in kinds.items():
        value = field(values, name, kind, "f.json", "load")
        assert type(value) is kind
        assert value == values[name]
    assert list_field(values, "l", float, "f.json", "load", low=1) == [1.0, 2.0]


def test_a_default_stands_for_what_is_missing_and_null_only_for_none():
    assert field({}, "k", int, "f.json", "load", default=4) == 4
    assert field({"k": None}, "k", int, "f.json", "load", default=None) is None
    with pytest.raises(ValueError, match=r"'k' in f\.json must be an int, got None"):
        field({"k": None}, "k", int, "f.json", "load", default=4)
    with pytest.raises(ValueError, match=r"got nothing \('d_inn' is there\); add it"):
        field({"d_inn": 3}, "d_in", int, "f.json", "load")


def test_unknown_keys_are_refused_with_what_may_be_meant():
    check_keys({"alpha": 1}, ["alpha", "beta"], "f.json", "load")
    with pytest.raises(ValueError, match=r"'aplha' in f\.json is not .*'alpha' is kn"):
        check_keys({"aplha": 1}, ["alpha", "beta"], "f.json", "load")


def test_lines_are_read_but_for_one_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": NaN}\n{"a": "\xce')
    rows = read_json_lines(path, "load")
    assert rows[0] == {"a": 1}
    assert math.isnan(rows[1]["a"])
    path.write_bytes(b"")
    assert read_json_lines(path, "load") == []


@pytest.mark.parametrize("line", [b'{"a": oops}', b"\xff}", b"[1]", b"", b'{"a": 1'])
def test_a_broken_line_is_refused_by_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"load: line 2 of .*rows\.jsonl must be "):
        read_json_lines(path, "load")


@pytest.mark.parametrize("off", [None, False, 0, "none"])
def test_unknown_keys_that_are_off_pass_unless_they_look_like_a_known_one(off):
    known = ["apply_b_dec_to_input", "d_in"]
    check_keys({"new_switch": off}, known, "f.json", "load", ignore_off=True)
    for key, value in {"new_switch": True, "aply_b_dec_to_input": off}.items():
        with pytest.raises(ValueError, match=f"'{key}' in f"):
            check_keys({key: value}, known, "f.json", "load", ignore_off=True)
