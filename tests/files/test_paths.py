"""Names that stay inside of a folder, and locks."""

import pytest

from toyfeat.files.paths import inside, lock_folder


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/x",
        ".",
        "..",
        "C:/x",
        "C:x",
        "..\\x",
        "a\x00b",
        "",
        None,
        3,
        ["x"],
    ],
)
def test_names_that_lead_outside_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"^load: names of files .* got .*; correct"):
        inside(tmp_path, name, "load")


@pytest.mark.parametrize("name", [None, 3, True, ["x"], b"x"])
def test_what_is_no_name_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"^load: names of files .* got .*; correct"):
        inside(tmp_path, name, "load")


def test_links_may_lead_to_other_files_of_the_folder_only(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "out.bin").write_bytes(b"x")
    (folder / "whole.bin").write_bytes(b"x")
    (folder / "out.bin").symlink_to(tmp_path / "out.bin")
    (folder / "in.bin").symlink_to("whole.bin")
    (tmp_path / "alias").symlink_to(folder)
    assert inside(folder, "sub/new.bin", "load") == folder / "sub/new.bin"
    for place in (folder, tmp_path / "alias"):
        assert inside(place, "in.bin", "load").exists()
        assert inside(place, "out.bin", "load", links=True).exists()
        with pytest.raises(ValueError, match=r"got 'out.bin', a link to .*; put the"):
            inside(place, "out.bin", "load")


def test_a_lock_is_held_until_it_is_released(tmp_path):
    class Holder:
        pass

    first, second = Holder(), Holder()
    release = lock_folder(tmp_path, first, "fit")
    with pytest.raises(BlockingIOError, match=r"^fit: only one .* another has open; w"):
        lock_folder(tmp_path, second, "fit")
    release()
    release()
    lock_folder(tmp_path, second, "fit")
    del second
    lock_folder(tmp_path, first, "fit")()
