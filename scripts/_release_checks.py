"""Checks of archives and of installations in bare environments."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# What a build adds to the files of the repository.
_ADDED = re.compile(r"PKG-INFO|setup\.cfg|toyfeat\.egg-info/.+|.+\.dist-info/.+")
_IMPORT = """
import sys, toyfeat
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
assert toyfeat.__file__.startswith(sys.prefix), toyfeat.__file__
"""
_TIMED = """
from time import process_time
import jax
start = process_time()
import toyfeat
print(process_time() - start)
"""
_TESTS = ("linalg/test_dense.py", "test_docs.py", "examples/test_squaring_network.py")
# These would show commands another copy, or leave modules to be compiled each time.
_UNSET = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")


class Outcome(NamedTuple):
    """A check, what is wrong (empty if nothing is), and a figure to show."""

    name: str
    fault: str
    figure: str = ""


def tracked_files(root: Path) -> set[str]:
    """List the files that git tracks, without those whose name begins with a dot."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True)
    names = listed.stdout.decode().split("\0")
    return {name for name in names if name and not name.startswith(".")}


def archived_files(path: Path) -> set[str]:
    """List the files of a wheel, or of an sdist without its top folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(path) as sdist:
        files = [member.name for member in sdist if member.isfile()]
    return {name.partition("/")[2] for name in files}


def archive_fault(files: Iterable[str], wanted: Iterable[str]) -> str:
    """Compare the files of an archive with those that it should have.

    Args:
      files: from :func:`archived_files`.
      wanted: files of the repository.

    Returns:
      What is missing and what is stray; empty if nothing is.
    """
    got = {name for name in files if not _ADDED.fullmatch(name)}
    sides = {"missing": {*wanted} - got, "stray": got - {*wanted}}
    return "; ".join(
        f"{side}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for side, names in sides.items()
        if names
    )


def first_example(readme: str) -> str:
    """Return the first block of Python of a page."""
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return blocks[0]


def seconds_beyond(report: str, first: str, second: str) -> tuple[float, float]:
    """Read how long two imports took from a report of ``-X importtime``.

    Args:
      report: of a program that imports ``first``, and then ``second``.
      first: a module.
      second: a module; what it shares with the first counts for the first.

    Returns:
      Seconds of each.
    """
    form = r"^import time: +\d+ \| +(\d+) \| {name}$"
    one, two = (
        re.findall(form.replace("{name}", re.escape(name)), report, re.MULTILINE)
        for name in (first, second)
    )
    return int(one[-1]) * 1e-6, int(two[-1]) * 1e-6


def import_seconds(python: Path, folder: Path, runs: int) -> tuple[float, ...]:
    """Measure how long imports take, in a process of their own each time.

    Args:
      python: interpreter.
      folder: where it runs.
      runs: number of processes.

    Returns:
      Medians: processor time of toyfeat after jax, which other programs do not change;
      wall time of toyfeat after jax; wall time of jax.
    """
    command = [python, "-X", "importtime", "-c", _TIMED]
    ends = [run(command, folder) for _ in range(runs)]
    times = [
        (float(end.stdout), *seconds_beyond(end.stderr, "jax", "toyfeat")[::-1])
        for end in ends
    ]
    return tuple(map(median, zip(*times, strict=True)))


def run(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess:
    """Run a command in a folder, without what would show it this repository."""
    env = {name: value for name, value in os.environ.items() if name not in _UNSET}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=env, capture_output=True, text=True
    )


def install(archive: Path, folder: Path) -> Path:
    """Make an environment with an archive and what it depends on.

    Args:
      archive: a wheel or an sdist.
      folder: of the environment.

    Returns:
      Its interpreter.

    Raises:
      RuntimeError: with the output of the step that failed.
    """
    python = folder / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", archive],
    ):
        done = run(command, folder.parent)
        if done.returncode:
            raise RuntimeError(f"{archive.name}: {done.stdout}{done.stderr}")
    return python


def try_out(python: Path, folder: Path, kind: str) -> list[Outcome]:
    """Do what a new user does, in an empty folder.

    Args:
      python: from :func:`install`.
      folder: where commands run.
      kind: name of the archive, for the outcomes.

    Returns:
      An outcome per command.
    """
    command = python.with_name("toyfeat")
    example = first_example((ROOT / "README.md").read_text(encoding="utf-8"))
    steps = {
        "pip check": [python, "-m", "pip", "check"],
        "import toyfeat, no device touched": [python, "-c", _IMPORT],
        "toyfeat doctor": [command, "doctor"],
        "toyfeat --help": [command, "--help"],
        "first example of the README": [python, "-W", "error", "-c", example],
    }
    outcomes = []
    for name, step in steps.items():
        done = run(step, folder)
        fault = f"{done.stdout}{done.stderr}" if done.returncode else ""
        outcomes.append(Outcome(f"{kind}: {name}", fault.strip()))
    return outcomes


def run_tests(archive: Path, python: Path, folder: Path) -> Outcome:
    """Run tests of an unpacked sdist that read most of its folders."""
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run([python, "-m", "pip", "install", "--quiet", "pytest", "chex"], folder)
    tests = [f"tests/{name}" for name in _TESTS]
    done = run([python, "-m", "pytest", "-q", *tests], source)
    fault = f"{done.stdout}{done.stderr}" if done.returncode else ""
    last = done.stdout.strip().rpartition("\n")[2]
    return Outcome("sdist: some of its tests", fault, last)
