"""The checks of scripts/release.py, on archives and reports made by hand."""

import io
import subprocess
import sys
import tarfile
import zipfile

import _release_checks as checks
import pytest
from processes import ROOT


def test_a_missing_and_a_stray_file_of_an_archive_are_named(tmp_path):
    wanted = ["toyfeat/a.py", "toyfeat/py.typed"]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name in ("toyfeat/a.py", "out/x.json", "toyfeat-0.dist-info/RECORD"):
            wheel.writestr(name, "")
    files = checks.archived_files(tmp_path / "x.whl")
    fault = checks.archive_fault(files, wanted)
    assert fault == "missing: toyfeat/py.typed; stray: out/x.json"

    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as sdist:
        for name in (*wanted, "PKG-INFO", "setup.cfg", "toyfeat.egg-info/SOURCES.txt"):
            sdist.addfile(tarfile.TarInfo(f"toyfeat-0/{name}"), io.BytesIO())
    files = checks.archived_files(tmp_path / "x.tar.gz")
    assert checks.archive_fault(files, wanted) == ""
    assert "stray: toyfeat/py.typed" in checks.archive_fault(files, wanted[:1])


def test_tracked_files_are_those_of_git_and_not_what_lies_beside_them(tmp_path):
    for name in (".hidden", "kept ²", "beside"):
        (tmp_path / name).touch()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", ".hidden", "kept ²"], cwd=tmp_path, check=True)
    assert checks.tracked_files(tmp_path) == {"kept ²"}


def test_the_first_example_of_the_readme_is_python():
    page = "a\n```\nls\n```\n```python\nx = 1\n```\n```python\ny = 2\n```\n"
    assert checks.first_example(page) == "x = 1\n"
    example = checks.first_example((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "import toyfeat as ft" in example
    compile(example, "README.md", "exec")


def test_the_time_of_an_import_leaves_out_what_was_there_before():
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:       100 |        100 |   jax.inner",
        "import time:       400 |     900500 | jax",
        "import time:       400 |     300400 |   toyfeat.jax",
        "import time:       100 |     700000 | toyfeat",
    ]
    times = checks.seconds_beyond("\n".join(lines), "jax", "toyfeat")
    assert times == pytest.approx((0.9005, 0.7))


def test_commands_do_not_see_the_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = checks.run(
        [sys.executable, "-c", "import os; os.environ['PYTHONPATH']"], tmp_path
    )
    assert done.returncode == 1
    assert "KeyError: 'PYTHONPATH'" in done.stderr


@pytest.mark.slow
def test_an_archive_that_cannot_be_installed_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"nothing\.whl"):
        checks.install(tmp_path / "nothing.whl", tmp_path / "env")


@pytest.mark.slow
def test_the_source_distribution_has_the_files_of_the_repository(tmp_path):
    pytest.importorskip("build", reason="building wants the release extra")
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    (sdist,) = tmp_path.iterdir()
    files = checks.archived_files(sdist)
    assert checks.archive_fault(files, checks.tracked_files(ROOT)) == ""
