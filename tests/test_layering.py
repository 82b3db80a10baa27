import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "toyfeat"

# The lowest level a module may be imported from is one above its own.
LEVELS = {
    "types": 0,
    "memory": 0,
    "linalg": 1,
    "data": 1,
    "checkpoint": 1,
    "tap": 2,
    "models": 3,
    "moments": 3,
    "decompose": 3,
    "matching": 3,
    "pursuit": 3,
    "dictionary": 3,
    "train": 4,
    "evaluate": 4,
    "detection": 4,
    "ablation": 4,
    "interop": 4,
    "splicing": 4,
    "consensus": 5,
    "language": 5,
    "scoring": 6,
    "report": 7,
}
# Stand outside the order: the public face, and what only tests and benchmarks use.
OUTSIDE = {"__init__", "testing"}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "toyfeat":
                names = [f"toyfeat.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (n.split(".")[1:2] for n in names if n.split(".")[0] == "toyfeat")


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_levels_below_it(path):
    part = part_of(path)
    if part in OUTSIDE:
        return
    assert part in LEVELS, f"{part} has no level: add it to LEVELS"
    for imported in imported_parts(path):
        if not imported:  # the public face itself
            assert LEVELS[part] == 7
            continue
        other = imported[0]
        if other == part:
            continue
        assert LEVELS[other] < LEVELS[part], f"{part} must not import {other}"


def test_importing_the_package_touches_no_device_and_no_extra():
    import subprocess
    import sys

    code = (
        "import sys, toyfeat\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "heavy = {'matplotlib', 'tyro', 'tensorboardX', 'safetensors', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
