"""Collecting to disk against tapping alone.

    python benchmarks/collect.py [--tiny] [--json PATH]

Llamas of random weights, a small one and one of SmolLM2's shape, one and five sites;
the same windows are tapped without a disk and with one, in turns.  Bar: collecting
takes at most 1.1 x as long.  What is stored is compared with what was tapped first.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import finish, row
from tap_decoder import SIZE

import toyfeat as tf
from toyfeat.data.store import shard_taps
from toyfeat.language import collect, readout_of
from toyfeat.models.decoder import SITES, Decoder, llama

SIZES = {
    "small": {"layers": 6, "dim": 512, "heads": 8, "hidden": 1024, "vocab": 4096},
    "SmolLM2": SIZE,
}
TINY = {"tiny": {"layers": 2, "dim": 16, "heads": 2, "hidden": 32, "vocab": 64}}
BATCH, LENGTH, BATCHES, ROUNDS, BAR = 8, 128, 8, 3, 1.1


def measured(name: str, size: dict[str, int], sites: list[str]) -> dict[str, Any]:
    """One row."""
    names: dict[str, Any] = {"tied": False, **size}
    config = llama(**names)
    probed = tf.from_linen(Decoder(config))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab, (BATCH * BATCHES, LENGTH)).astype(np.int32)
    example = jnp.asarray(tokens[:BATCH])
    params = jax.jit(Decoder(config).init)(jax.random.key(0), example)
    readout = readout_of("loss")
    tapped = jax.jit(
        lambda p, x: tf.tap(probed, p, x, sites=sites, readout=readout(x, jnp.int32(0)))
    )

    def alone() -> Any:
        for start in range(0, len(tokens), BATCH):
            found = jax.block_until_ready(
                tapped(params, jnp.asarray(tokens[start : start + BATCH]))
            )
        return found

    def stored(folder: Path) -> Any:
        options: dict[str, Any] = {"batch": BATCH, "rows_per_shard": 1024}
        return collect(
            probed, params, tokens, sites, folder, readout=readout, **options
        )

    last, times = alone(), {"alone": [], "stored": []}
    with tempfile.TemporaryDirectory() as where:
        stores = stored(Path(where) / "first")  # compiles
        error = max(
            float(
                np.abs(
                    shard_taps(stores[s], len(stores[s].shards) - 1).acts[-64:]
                    - np.asarray(last[s].acts[-64:])
                ).max()
            )
            for s in sites
        )
        for i in range(ROUNDS):
            begun = time.perf_counter()
            alone()
            times["alone"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            stored(Path(where) / f"{i}")
            times["stored"].append(time.perf_counter() - begun)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    size_of_all = {**size, "sites": len(sites), "tokens": tokens.size}
    return row(
        name,
        size_of_all,
        "collect",
        ours_s=seconds["stored"],
        peer_s=seconds["alone"],
        ratio=seconds["stored"] / seconds["alone"],
        error=error,
    )


def main() -> None:
    """Measure and compare with the bar."""
    tf.keep_memory()  # as scripts/collect.py
    tiny = "--tiny" in sys.argv
    rows = []
    for case, size in (TINY if tiny else SIZES).items():
        middle = f"blocks_{size['layers'] // 2}"
        for names in (("resid_post",), SITES):
            line = measured(case, size, [f"{middle}/{name}" for name in names])
            rows.append(line)
            print(
                f"{case:8} {line['size']['sites']} sites: {line['peer_s']:.2f} s "
                f"tapped, {line['ours_s']:.2f} s stored, {line['ratio']:.2f} x",
                flush=True,
            )
    missed = [
        f"collect: {line['ratio']:.2f} x tapping alone at {line['size']['sites']} "
        f"sites of {line['case']}"
        for line in rows
        if line["ratio"] > BAR and not tiny
    ]
    finish(rows, missed)


if __name__ == "__main__":
    main()
