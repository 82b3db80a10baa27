"""Atomic text files and folders for results."""

import pytest

from toyfeat.files.atomic import output_folder, write_whole


def test_a_text_file_is_replaced_and_no_draft_is_left(tmp_path):
    path = tmp_path / "table.json"
    for text in ("old\n", "κ\n"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


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
