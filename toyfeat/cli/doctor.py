"""State of the installation: versions, devices, memory, extras that are missing."""

import importlib
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from toyfeat.jobs import cache_folder

_CORE = ("toyfeat", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
# Extras of people who work on the library itself, and what the devices say already.
_LEFT_OUT = ("test", "docs", "bench", "release", "cuda")
_GIB = 2**30


def describe_installation() -> Iterator[str]:
    """Describe what this installation can do, line by line.

    Yields:
      Lines: versions, devices with their memory, memory and cores of the machine, the
      folder of what was fetched, and for each extra what is missing and how to get it.
    """
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {_version(name) or 'missing'}" for name in _CORE)
    yield from _devices()
    yield from _memory()
    yield f"fetched files: {cache_folder()}"
    yield from _extras()


def _version(name: str) -> str | None:
    """Version of an installed package, or ``None``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    """List the devices that JAX has, or why it has none."""
    jax = importlib.import_module("jax")
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        # A broken driver must not hide the other lines.
        why = str(error) or "JAX has none of JAX_PLATFORMS"
        yield f"devices: none, {why.splitlines()[0]}"
        return
    for device in devices:
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = "" if limit is None else f", {limit / _GIB:.1f} GiB"
        yield f"device {device.id}: {device.platform}, {device.device_kind}{memory}"
    if all(device.platform == "cpu" for device in devices):
        yield '  no accelerator; with a GPU of NVIDIA: pip install "toyfeat[cuda]"'


def _memory() -> Iterator[str]:
    """Say how much memory and how many cores the machine has."""
    source, cores = Path("/proc/meminfo"), os.cpu_count()
    sizes = {}
    if source.exists():
        sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", source.read_text()))
    if {"MemTotal", "MemAvailable"} <= set(sizes):
        total, free = (int(sizes[n]) * 1024 for n in ("MemTotal", "MemAvailable"))
        yield f"memory: {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, {cores} cores"
    else:
        yield f"cores: {cores}"


def _extras() -> Iterator[str]:
    """List the extras: there, or what is missing."""
    try:
        requirements = metadata.requires("toyfeat") or []
    except metadata.PackageNotFoundError:
        yield "extras: unknown, toyfeat is not installed as a package; pip install -e ."
        return
    needed: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name and extra[1] not in _LEFT_OUT:
            needed.setdefault(extra[1], []).append(name[0])
    for extra, names in needed.items():
        missing = [name for name in names if _version(name) is None]
        state = "there"
        if missing:
            state = f'{", ".join(missing)} missing; pip install "toyfeat[{extra}]"'
        yield f"extra {extra}: {state}"
