"""Imports go one way: between the rooms of the package, and inside each of them."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from processes import run_python

PACKAGE = Path(__file__).parents[1] / "toyfeat"

# A room imports from rooms with a lower number only; the last one also from the face.
LEVELS = {
    "types": 0,
    "checks": 0,
    "meshes": 0,
    "processes": 0,
    "files": 0,
    "loops": 1,
    "linalg": 1,
    "checkpoint": 1,
    "data": 2,
    "worlds": 2,
    "tap": 2,
    "moments": 3,
    "decompose": 4,
    "dictionary": 5,
    "models": 5,
    "train": 6,
    "interop": 6,
    "lens": 6,
    "metrics": 7,
    "discover": 8,
    "lm": 9,
    "partition": 9,
    "jobs": 10,
    "report": 11,
    "cli": 12,
}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = sorted({name.split(".")[1] for name in PATHS if "." in name})


def imported_modules(path):
    """Names of the package's modules that a file imports, submodules where they are."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] != "toyfeat":
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in PATHS else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "toyfeat")


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", [name for name in PATHS if name != "toyfeat"])
def test_a_module_imports_only_from_rooms_below_its_own(name):
    room = name.split(".")[1]
    assert room in LEVELS, f"{room} has no level: add it to LEVELS"
    for imported in imported_modules(PATHS[name]):
        if imported == "toyfeat":
            assert room == "report", f"{name} must import from modules, not the face"
            continue
        other = imported.split(".")[1]
        if other != room:
            assert LEVELS[other] < LEVELS[room], f"{name} must not import {imported}"


@pytest.mark.slow_cases
@pytest.mark.parametrize("room", ROOMS)
def test_inside_a_room_imports_have_no_circle(room):
    """A package's ``__init__`` stands on top: no module of it may import from it."""
    prefix = f"toyfeat.{room}"
    inside = [n for n in PATHS if n == prefix or n.startswith(f"{prefix}.")]
    graph = {n: {m for m in imported_modules(PATHS[n]) if m in inside} for n in inside}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"{room}: {' -> '.join(error.args[1])}")


def test_the_package_imports_nothing_of_what_stands_around_it():
    around = {"examples", "benchmarks", "scripts", "tests"}
    for name, path in PATHS.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif not isinstance(node, ast.ImportFrom):
                continue
            assert not around & {m.split(".")[0] for m in modules}, name


def test_importing_the_package_touches_no_device_and_no_extra():
    code = (
        "import sys, toyfeat\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "heavy = {'matplotlib', 'tyro', 'tensorboardX', 'safetensors', 'sklearn',\n"
        "    'equinox', 'haiku', 'scipy.optimize', 'scipy.sparse'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
