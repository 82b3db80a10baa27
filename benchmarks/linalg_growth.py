"""Growth of the time of a randomized SVD with the size of the matrix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import (
    medians,
    program,
    row,
)

import toyfeat as ft


def growth(tiny: bool, peak: float, plot: Path | None) -> tuple[list[dict], list[str]]:
    """Time against n, d and k; the time has to be linear in n."""
    # Timed in turns, so that sizes are compared under one load.
    sizes = growth_sizes(tiny)
    runs = {name: krylov_program(size) for name, (_, size) in sizes.items()}
    taken = medians(runs, rounds=3 if tiny else 5)
    lines = [
        row(
            f"growth in {axis}",
            size,
            "toyfeat krylov",
            ours_s=taken[name],
            ratio=None,
            error=0.0,
            fraction_of_gemm_peak=None,
        )
        for name, (axis, size) in sizes.items()
    ]
    # The slope of log time against log n.
    points = [(s["n"], taken[name]) for name, (axis, s) in sizes.items() if axis == "n"]
    sizes_n, times_n = np.log(np.asarray(points)).T
    slope = float(np.polyfit(sizes_n, times_n, 1)[0])
    print(f" growth: time goes with n to the power {slope:.3f} (bar 1 within .05)")
    if plot is not None:
        _plot(plot, lines)
    missed = [f"growth: slope {slope:.3f} against n, the bar is 1 within .05"]
    return lines, missed * (abs(slope - 1) > 0.05 and not tiny)


def growth_sizes(tiny: bool) -> dict[str, tuple[str, dict[str, int]]]:
    """Sizes along one axis at a time: name to axis and size."""
    base = {"n": 40_000, "d": 1024, "k": 32}
    axes = {"n": (1, 2, 4, 8), "d": (1, 2, 4), "k": (0.5, 1, 2)}
    if tiny:
        base, axes = {"n": 400, "d": 200, "k": 4}, {"n": (1, 2)}
    sizes = {}
    for axis, factors in axes.items():
        for factor in factors:
            size = {**base, axis: int(base[axis] * factor)}
            if axis != "n" and not tiny:
                size["n"] = 20_000
            sizes[f"{axis}{factor}"] = axis, size
    return sizes


def krylov_program(size: dict[str, int]) -> Callable[[], Any]:
    """Compile a decomposition of a random matrix with a decaying spectrum."""
    a = jax.random.normal(jax.random.key(0), (size["n"], size["d"]))
    a = a / (1.0 + jnp.arange(size["d"]))[None, :]

    def decompose(key: jax.Array, a: jax.Array) -> Any:
        return ft.linalg.randomized_svd(key, a, size["k"], method="krylov")

    return program(decompose, jax.random.key(1), a).run


def _plot(path: Path, lines: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, panel in zip("ndk", figure.subplots(1, 3), strict=True):
        chosen = [line for line in lines if line["case"] == f"growth in {axis}"]
        x = [line["size"][axis] for line in chosen]
        y = [1e3 * line["ours_s"] for line in chosen]
        panel.loglog(x, y, "o-", label="measured")
        line = [y[-1] * v / x[-1] for v in x]
        panel.loglog(x, line, ":", color="gray", label="proportional")
        fixed = {k: v for k, v in chosen[0]["size"].items() if k != axis}
        panel.set(
            xlabel=axis,
            ylabel="ms",
            title=", ".join(f"{k} = {v}" for k, v in fixed.items()),
        )
        panel.set_xticks(x, [str(v) for v in x])
        panel.minorticks_off()
        panel.legend()
    figure.savefig(path, dpi=120)
