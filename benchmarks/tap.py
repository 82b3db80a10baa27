"""Compare taps with the forward pass, and with gradients written by hand.

    python benchmarks/tap.py [--tiny] [--json PATH]

A residual MLP; activations and gradients at every block, or at the last one.
Bars: all sites <= 2.2 x the forward and the last site <= 1.2 x, in compiled
flops; times are printed as ratios.  "split" is what one writes by hand, a vjp of
the rest of the network for each site; errors against it are checked first.  In
one jit the compiler finds what its backward passes share, so it does no more
work than a tap: it is the least that these gradients cost.

Then the decoder (``tap_decoder.py``): all sites <= 2.2 x its forward in time, and
faster than torch with hooks and than nnsight, where the peers' environment is there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import tap_decoder
from harness import (
    BenchmarkConfig,
    finish,
    gemm_flops_per_s,
    medians,
    parse_command,
    program,
    row,
)

import toyfeat as ft
from toyfeat.jobs.memory import keep_memory

CASES = {
    "small": {"blocks": 4, "width": 256, "batch": 1024},
    "wide": {"blocks": 4, "width": 1024, "batch": 1024},
    "deep": {"blocks": 16, "width": 256, "batch": 1024},
}
TINY = {"tiny": {"blocks": 2, "width": 32, "batch": 16}}
READOUT = ft.readouts.scalar(jnp.sum)
BARS = {"tap all sites": 2.2, "tap last site": 1.2}  # compiled flops, x the forward


def block(params: Any, x: jax.Array) -> jax.Array:
    """Apply a residual block."""
    return x + jax.nn.relu(x @ params["in"]) @ params["out"]


def model(params: Any, x: jax.Array, tap: Any) -> jax.Array:
    """Apply blocks with a site behind each."""
    for index, layer in enumerate(params):
        x = tap(f"block{index}", block(layer, x))
    return x


def initial_params(key: jax.Array, blocks: int, width: int) -> list[dict]:
    """Draw weights that keep the size of activations."""
    keys = jax.random.split(key, (blocks, 2))
    return [
        {
            "in": jax.random.normal(k[0], (width, width)) / width**0.5,
            "out": jax.random.normal(k[1], (width, width)) / width**0.5,
        }
        for k in keys
    ]


def split(params: Any, x: jax.Array) -> dict[str, Any]:
    """Gradients by hand: run to each site, then a vjp of the blocks behind it."""
    taps = {}
    for index in range(len(params)):
        x = block(params[index], x)

        def run_on(acts: jax.Array, index: int = index) -> jax.Array:
            for layer in params[index + 1 :]:
                acts = block(layer, acts)
            return acts.sum(-1)

        out, pull = jax.vjp(run_on, x)
        taps[f"block{index}"] = (x, pull(jnp.ones_like(out))[0])
    return taps


def measure(name: str, size: dict[str, int], peak: float) -> tuple[list[dict], list]:
    """Check and time a case; returns rows and missed bars."""
    params = initial_params(jax.random.key(0), size["blocks"], size["width"])
    x = jax.random.normal(jax.random.key(1), (size["batch"], size["width"]))
    probed = ft.from_function(model)
    sites = [f"block{i}" for i in range(size["blocks"])]

    def tapped(sites: list[str]) -> Any:
        return lambda p, x: ft.tap(probed, p, x, sites=sites, readout=READOUT)

    programs = {
        "forward": program(lambda p, x: probed(p, x, {})[0], params, x),
        "tap all sites": program(tapped(sites), params, x),
        "tap last site": program(tapped(sites[-1:]), params, x),
        "split": program(split, params, x),
    }
    error = largest_error(programs["tap all sites"].run(), programs["split"].run())
    if error > 1e-5:
        return [], [f"{name}: error {error:.1e} against a split per site, no time"]
    seconds = medians({method: p.run for method, p in programs.items()})
    forward = programs["forward"]
    rows = [
        row(
            name,
            size,
            method,
            peer="split",
            ours_s=seconds[method],
            peer_s=seconds["split"],
            ratio=seconds["split"] / seconds[method],
            times_forward=seconds[method] / seconds["forward"],
            flops_times_forward=p.flops / forward.flops,
            error=error,
            peer_error=0.0,
            flops=p.flops,
            fraction_of_gemm_peak=p.flops / seconds[method] / peak,
            compile_s=p.compile_s,
        )
        for method, p in programs.items()
    ]
    return rows, missed_bars(rows)


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """Name the taps that take more flops than their bar."""
    return [
        f"{line['case']}: {line['method']} takes {line['flops_times_forward']:.2f} x "
        f"the forward's flops, the bar is {BARS[line['method']]}"
        for line in rows
        if line["flops_times_forward"] > BARS.get(line["method"], float("inf"))
    ]


def largest_error(taps: Any, by_hand: Any) -> float:
    """Largest error of a gradient, over the largest gradient of its site."""
    errors = []
    for site, (_, grads) in by_hand.items():
        difference = jnp.max(jnp.abs(taps[site].grads[:, 0] - grads))
        errors.append(float(difference / jnp.max(jnp.abs(grads))))
    return max(errors)


def main() -> None:
    """Measure all cases."""
    config = parse_command(BenchmarkConfig, __doc__)
    tiny = config.tiny
    keep_memory()  # torch does, too
    peak = gemm_flops_per_s(256 if tiny else 2048)
    results = [measure(n, s, peak) for n, s in (TINY if tiny else CASES).items()]
    results.append(tap_decoder.measure(tiny=tiny))
    rows = [line for lines, _ in results for line in lines]
    for line in rows:
        ratio = line["ratio"]
        speed = "" if ratio is None else f"  {ratio:5.2f} x the speed of {line['peer']}"
        print(
            f"{line['case']:>7} {line['method']:<14} {1e3 * line['ours_s']:8.2f} ms"
            f"  {line['times_forward']:5.2f} x forward"
            f"  {line['flops_times_forward']:5.2f} x its flops"
            f"{speed}"
        )
    finish(rows, [text for _, texts in results for text in texts], config.json)


if __name__ == "__main__":
    main()
