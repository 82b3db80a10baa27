"""Commands, peers, timing, intervals and rows that all benchmarks share.

Times are medians of calls that are compiled apart, warmed up, waited for, and taken in
turns.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

BOOTSTRAPS = 2000
"""Samples of a bootstrap."""

Config = TypeVar("Config")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of every benchmark."""

    tiny: bool = False
    """Small sizes, only to see that it runs."""
    json: Path | None = None
    """Also write the rows there, one per line."""


def parse_command(config: type[Config], description: str | None) -> Config:
    """Read the command line into a dataclass.

    Args:
      config: a dataclass whose fields are the flags.
      description: for ``--help``.

    Returns:
      An instance.

    Raises:
      SystemExit: for unknown or wrong flags, or without tyro.
    """
    try:
        import tyro
    except ImportError:
        raise SystemExit(
            f"{Path(sys.argv[0]).name}: the command line needs tyro: pip install tyro"
        ) from None
    return tyro.cli(config, description=description)


def run_peer(python: str, script: Path, folder: Path, *options: str) -> Any:
    """Run a script of other libraries, which writes files and prints a JSON line.

    Args:
      python: one that has these libraries.
      script: a file of ``peers/``.
      folder: for its files.
      options: further words of its command line.

    Returns:
      What it printed last.

    Raises:
      SystemExit: with the end of its errors, if it failed.
    """
    done = subprocess.run(
        [python, str(script), str(folder), *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


class Program(NamedTuple):
    """A compiled function with its arguments.

    Attributes:
      run: executes it and waits for the result.
      compile_s: seconds to trace, lower and compile.
      flops: what the compiler counts (a scan's body counts once).
    """

    run: Callable[[], Any]
    compile_s: float
    flops: float


def program(fn: Callable[..., Any], *args: Any) -> Program:
    """Compile a function for its arguments, and time that apart."""
    # Compiled ahead of time, so that no run includes it.
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}

    def run() -> Any:
        return jax.block_until_ready(compiled(*args))

    return Program(run, seconds, float(cost.get("flops", float("nan"))))


def medians(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int = 7, least_s: float = 0.05
) -> dict[str, float]:
    """Time functions in turns, so that noise is shared; returns median seconds.

    Args:
      runs: name to a function that returns when its result is there.
      rounds: how many turns.
      least_s: seconds of a turn, about; short functions are repeated that long.

    Returns:
      Name to seconds per call.
    """
    # Repeat short functions, whose time is near the clock's resolution; the first call
    # of each is warm-up and not timed.
    repeats = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(least_s / max(time.perf_counter() - start, 1e-9)))
    # In turns: a slow spell of the machine is one of all.
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(taken) for name, taken in times.items()}


def gemm_flops_per_s(size: int = 2048) -> float:
    """Measure the float32 rate of a square matrix product on this device."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = program(lambda a: jnp.matmul(a, a, precision="highest"), a)
    # A product of size^3 multiplications and additions.
    return 2 * size**3 / medians({"gemm": product.run})["gemm"]


def bootstrap_interval(
    values: np.ndarray, rng: np.random.Generator | None = None
) -> list[float]:
    """Compute the 95 % bootstrap interval of a mean.

    Args:
      values: ``[N]``.
      rng: draws the samples; one of its own from seed 0 by default.

    Returns:
      Its two bounds.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    draws = rng.integers(0, len(values), (BOOTSTRAPS, len(values)))
    return [float(x) for x in np.quantile(values[draws].mean(axis=1), [0.025, 0.975])]


def row(case: str, size: Mapping[str, int], method: str, **figures: Any) -> dict:
    """Make the row of a case: its figures, the device and the versions."""
    names = ("jax", "jaxlib", "numpy")
    return {
        "case": case,
        "size": dict(size),
        "method": method,
        **figures,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def finish(
    rows: Sequence[Mapping[str, Any]],
    missed: Sequence[str],
    path: Path | None = None,
) -> NoReturn:
    """Print rows as JSON lines, and exit; the status is 1 if a bar was missed.

    Args:
      rows: from :func:`row`.
      missed: a line for every bar that was missed.
      path: file for the rows, or ``None``.

    Raises:
      SystemExit: always.
    """
    lines = [json.dumps(line) for line in rows]
    print("\n".join(lines))
    if path is not None:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for text in missed:
        print(f"MISSED: {text}", file=sys.stderr)
    sys.exit(bool(missed))
