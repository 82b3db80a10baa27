"""Compare collecting taps to disk with tapping alone.

    python benchmarks/collect.py [--tiny] [--json PATH]

Llamas of random weights, a small one and one of SmolLM2's shape, one and five sites;
the same windows are tapped without a disk and with one, in turns, and activations are
collected alone.  Bar: collecting takes at most 1.1 x as long as tapping.  What is kept
is compared with what was tapped first.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from tap_decoder import SIZE

import toyfeat as ft
from toyfeat.data.store import shard_taps
from toyfeat.jobs.memory import keep_memory
from toyfeat.lm.collect import collect, make_readout
from toyfeat.models.decoder import SITES, Decoder, llama
from toyfeat.types import Params, Probed

SIZES = {
    "small": {"layers": 6, "dim": 512, "heads": 8, "hidden": 1024, "vocab": 4096},
    "SmolLM2": SIZE,
}
TINY = {"tiny": {"layers": 2, "dim": 16, "heads": 2, "hidden": 32, "vocab": 64}}
BATCH, LENGTH, BATCHES, ROUNDS, BAR = 8, 128, 8, 3, 1.1


def measure(name: str, size: dict[str, int], sites: list[str]) -> dict[str, Any]:
    """Time both on a model; returns a row."""
    probed, params, tokens = make_model(size)
    readouts = {kind: make_readout(kind) for kind in ("loss", "none")}
    tapped = jax.jit(
        lambda p, x: ft.tap(
            probed, p, x, sites=sites, readout=ft.readouts.next_token_loss(x)
        )
    )

    def alone() -> Any:
        for start in range(0, len(tokens), BATCH):
            taps = jax.block_until_ready(
                tapped(params, jnp.asarray(tokens[start : start + BATCH]))
            )
        return taps

    def stored(folder: Path, kind: str = "loss") -> Any:
        options: dict[str, Any] = {"batch": BATCH, "rows_per_shard": 1024}
        return collect(
            probed, params, tokens, sites, folder, readout=readouts[kind], **options
        )

    runs = {
        "alone": lambda folder: alone(),
        "stored": stored,
        "acts": partial(stored, kind="none"),
    }
    with tempfile.TemporaryDirectory() as folder:
        # The first call of each compiles; what it returns is compared.
        error = largest_error(stored(Path(folder) / "first"), alone())
        error_acts = largest_error(stored(Path(folder) / "acts", "none"), alone())
        seconds = time_in_turns(runs, Path(folder))
    return row(
        name,
        {**size, "sites": len(sites), "tokens": tokens.size},
        "collect",
        ours_s=seconds["stored"],
        peer_s=seconds["alone"],
        ratio=seconds["stored"] / seconds["alone"],
        error=error,
        acts_s=seconds["acts"],
        acts_gain=seconds["stored"] / seconds["acts"],
        acts_error=error_acts,
    )


def make_model(size: dict[str, int]) -> tuple[Probed, Params, np.ndarray]:
    """Make a llama of random weights, and windows of random tokens."""
    options: dict[str, Any] = {"tied": False, **size}
    config = llama(**options)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab, (BATCH * BATCHES, LENGTH)).astype(np.int32)
    example = jnp.asarray(tokens[:BATCH])
    params = jax.jit(Decoder(config).init)(jax.random.key(0), example)
    return ft.from_linen(Decoder(config)), params, tokens


def largest_error(stores: Any, taps: Any) -> float:
    """Largest difference of the last 64 activations, stored and tapped."""
    errors = []
    for site, store in stores.items():
        acts = shard_taps(store, len(store.shards) - 1).acts[-64:]
        errors.append(np.abs(acts - np.asarray(taps[site].acts[-64:])).max())
    return float(max(errors))


def time_in_turns(
    runs: dict[str, Callable[[Path], Any]], folder: Path
) -> dict[str, float]:
    """Median seconds of each, which take turns so that noise is shared."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(folder / f"{name}{i}")
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Measure and compare with the bar."""
    config = parse_command(BenchmarkConfig, __doc__)
    keep_memory()  # as scripts/collect.py
    rows = []
    for case, size in (TINY if config.tiny else SIZES).items():
        middle = f"blocks_{size['layers'] // 2}"
        for names in (("resid_post",), SITES):
            line = measure(case, size, [f"{middle}/{name}" for name in names])
            rows.append(line)
            print(
                f"{case:8} {line['size']['sites']} sites: {line['peer_s']:.2f} s "
                f"tapped, {line['ours_s']:.2f} s stored, {line['ratio']:.2f} x, "
                f"activations alone {line['acts_gain']:.2f} x as fast",
                flush=True,
            )
    missed = [
        f"collect: {line['ratio']:.2f} x tapping alone at {line['size']['sites']} "
        f"sites of {line['case']}"
        for line in rows
        if line["ratio"] > BAR and not config.tiny
    ]
    finish(rows, missed, config.json)


if __name__ == "__main__":
    main()
