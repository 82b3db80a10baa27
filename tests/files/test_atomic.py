"""Atomic text files and folders for results."""

import errno
import os

import pytest

from toyfeat.files.atomic import (
    open_draft,
    output_folder,
    replace_files,
    write_whole,
)


def test_a_text_file_is_replaced_and_no_draft_is_left(tmp_path):
    path = tmp_path / "table.json"
    for text in ("old\n", "κ\n"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_a_draft_is_never_written_through_a_link(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    path, victim = tmp_path / "table.json", other / "victim"
    victim.write_text("mine")
    # Links wherever a draft was or is, and at the file itself.
    for name in ("table.json", "table.json.partial", ".table.json.draft"):
        (tmp_path / name).symlink_to(victim)
    write_whole(path, "new")
    with open_draft(path) as file:
        file.write(b"newer")
    assert (victim.read_text(), path.read_text()) == ("mine", "newer")
    assert not path.is_symlink()


def test_a_draft_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.json"
    write_whole(path, "old")
    with pytest.raises(TypeError), open_draft(path) as file:
        file.write("no bytes")
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    assert path.read_text() == "old"


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


def fail(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_text_file_survives_a_full_disk(tmp_path, monkeypatch, call):
    path = tmp_path / "table.json"
    write_whole(path, "old\n")
    monkeypatch.setattr(call, fail)
    match = r"write_whole: could not write .*table\.json: No space left .*; make room"
    with pytest.raises(OSError, match=match) as caught:
        write_whole(path, "new\n")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old\n"
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_a_text_that_utf8_does_not_have_is_written_escaped(tmp_path):
    write_whole(tmp_path / "table.txt", "a\ud800b")
    assert (tmp_path / "table.txt").read_text() == "a\\ud800b"


def test_several_files_are_replaced_together_or_not_at_all(tmp_path):
    def writers(text, last=None):
        write = lambda part: part.write_text(text)  # noqa: E731
        return {"a": write, "b": write, "c": last or write}

    replace_files("save", tmp_path, writers("old"), ("d",))
    with pytest.raises(OSError, match=r"^\[.*save: could not write .*c: No space"):
        replace_files("save", tmp_path, writers("new", fail))
    with pytest.raises(KeyError):  # another fault than the disk's stays what it is
        replace_files("save", tmp_path, writers("new", lambda _: {}["x"]))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        name: "old" for name in "abc"
    }
    replace_files("save", tmp_path, {"a": writers("new")["a"]}, ("b", "c"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new"}


def test_a_replacement_that_fails_midway_is_undone(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    replace, calls = os.replace, []

    def replace_once(source, target):
        calls.append(target)
        if len(calls) > 1:
            fail()
        replace(source, target)

    monkeypatch.setattr("os.replace", replace_once)
    write = lambda part: part.write_text("new")  # noqa: E731
    with pytest.raises(OSError, match="could not write"):
        replace_files("save", tmp_path, {"b": write, "a": write})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
