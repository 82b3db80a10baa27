"""Timing for all benchmarks: compile apart, warm up, block, interleave, median."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
    """Compile ``fn`` for its arguments, timing that apart."""
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
    """Median seconds of each function, taken in turns so that noise is shared.

    Args:
      runs: name to a function that returns when its result is there.
      rounds: how many turns.
      least_s: short functions are repeated until a turn takes about this long.

    Returns:
      Name to seconds per call.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(least_s / max(time.perf_counter() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(taken) for name, taken in times.items()}


def gemm_flops_per_s(size: int = 2048) -> float:
    """Measured float32 rate of a square matrix product on this device."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = program(lambda a: jnp.matmul(a, a, precision="highest"), a)
    return 2 * size**3 / medians({"gemm": product.run})["gemm"]


def row(case: str, size: Mapping[str, int], method: str, **figures: Any) -> dict:
    """One JSON object per case, with the device and the versions."""
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


def finish(rows: Sequence[Mapping[str, Any]], missed: Sequence[str]) -> None:
    """Print rows as JSON lines, write them to ``--json PATH``, fail on a missed bar."""
    lines = [json.dumps(line) for line in rows]
    print("\n".join(lines))
    if "--json" in sys.argv:
        path = Path(sys.argv[sys.argv.index("--json") + 1])
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for text in missed:
        print(f"MISSED: {text}", file=sys.stderr)
    sys.exit(bool(missed))
