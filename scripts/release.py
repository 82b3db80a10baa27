"""Build what a release would publish, install it bare, and check both.

    bash scripts/release.sh                 # sets up .venv, then runs this
    python scripts/release.py --out dist    # keeps the archives

Builds sdist and wheel; compares their files with those that git tracks; installs each
into an environment of its own with nothing but what it depends on; there imports
toyfeat without touching a device, runs the command and the first example of the README,
and measures the import; runs tests of the unpacked sdist.  Wants ``build``, git, and a
registry of packages.  About ten minutes on two cores; ends with 1 if a check fails.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from _release_checks import (
    ROOT,
    Outcome,
    archive_fault,
    archived_files,
    import_seconds,
    install,
    run_tests,
    tracked_files,
    try_out,
)

MAX_SECONDS = 1.0  # of a processor that importing toyfeat may take after jax
RUNS = 5


def main() -> int:
    """Run all checks and print an outcome per line; return how many failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder in which archives are kept")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="toyfeat-release-") as folder:
        for outcome in check_release(Path(folder), args.out or Path(folder, "dist")):
            mark = "failed" if outcome.fault else "ok    "
            print(f"{mark}  {outcome.name}  {outcome.figure}".rstrip(), flush=True)
            failed += bool(outcome.fault)
            if outcome.fault:
                print(outcome.fault)
    print(f"{failed} checks failed")
    return failed


def check_release(folder: Path, out: Path) -> Iterator[Outcome]:
    """Build and check; everything but the archives is written to ``folder``."""
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    tracked = tracked_files(ROOT)
    package = {name for name in tracked if name.startswith("toyfeat/")}
    for kind, form, wanted in (
        ("wheel", "*.whl", package),
        ("sdist", "*.tar.gz", tracked),
    ):
        archive = max(out.glob(form), key=lambda path: path.stat().st_mtime)
        files = archived_files(archive)
        figure = f"{archive.stat().st_size / 1e6:.2f} MB, {len(files)} files"
        yield Outcome(f"{kind}: files", archive_fault(files, wanted), figure)
        python = install(archive.resolve(), folder / kind)
        empty = folder / f"{kind}-empty"
        empty.mkdir()
        yield from try_out(python, empty, kind)
        yield _import_outcome(kind, python, empty)
    unpacked = folder / "unpacked"
    unpacked.mkdir()
    yield run_tests(archive.resolve(), python, unpacked)


def _import_outcome(kind: str, python: Path, folder: Path) -> Outcome:
    processor, wall, jax = import_seconds(python, folder, RUNS)
    slow = processor > MAX_SECONDS
    fault = f"wanted at most {MAX_SECONDS} s of a processor beyond jax" if slow else ""
    figure = (
        f"{processor:.2f} s of a processor beyond jax ({wall:.2f} s on the clock, "
        f"jax {jax:.2f} s), medians of {RUNS}"
    )
    return Outcome(f"{kind}: time of the import", fault, figure)


if __name__ == "__main__":
    sys.exit(main() > 0)
