"""Samples of a synthetic world per processor second, beside SAELens' own generator.

    pip install sae-lens==6.54.12           # into the peers' environment
    python benchmarks/world.py [--tiny] [--json PATH] [--peer PYTHON]

A world of SynthSAEBench's recipe (512 features in 64 dimensions) is written to disk
and sampled by both, in turns and on one processor, where both need the fewest
processor seconds.  Before a time is reported, both sides' firing rates have to agree.
Without a peer only our own samples are timed.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if hasattr(os, "sched_setaffinity"):  # one processor, before threads are made
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import numpy as np
from contest import HERE, PEERS, Worker
from harness import finish, row

from toyfeat import data
from toyfeat.types import Array

BAR = 20.0
METHODS = {"world_acts": data.world_acts, "world_batch": data.world_batch}


class Sampler:
    """Our side, answering as the peer's process does."""

    def __init__(self, method: str, world: data.World, batch: int) -> None:
        """Compile."""
        fn = jax.jit(METHODS[method], static_argnums=2)
        self.batch, self.world = batch, world
        self.run = fn.lower(jax.random.key(0), world, batch).compile()
        self.keys = list(jax.random.split(jax.random.key(0), 64))
        jax.block_until_ready(self.run(self.keys[0], world))

    def ask(self, *, seconds: float) -> dict[str, float]:
        """Samples for about so many seconds."""
        cpu, start, samples = time.process_time(), time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            key = self.keys[samples // self.batch % len(self.keys)]
            jax.block_until_ready(self.run(key, self.world))
            samples += self.batch
        return {
            "cpu_s": time.process_time() - cpu,
            "seconds": time.perf_counter() - start,
            "samples": samples,
        }


def firing(world: data.World, batch: int, batches: int) -> np.ndarray:
    """``[F]``, how often each feature fires."""

    def rates(key: Array, world: data.World) -> Array:
        return (data.world_codes(key, world, batch) > 0).mean(0)

    run = jax.jit(rates)
    keys = jax.random.split(jax.random.key(1), batches)
    return np.mean([run(key, world) for key in keys], axis=0)


def deviation(ours: np.ndarray, peer: np.ndarray, num: int, peer_num: int) -> float:
    """Root mean square of the difference, in standard errors; about 1 if equal."""
    rate = (num * ours + peer_num * peer) / (num + peer_num)
    noise = np.sqrt(rate * (1 - rate) * (1 / num + 1 / peer_num)) + 1e-9
    return float(np.sqrt(np.mean(((ours - peer) / noise) ** 2)))


def measured(
    world: data.World, peer: Worker | None, batch: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One row per method of ours."""
    samplers: dict[str, Any] = {name: Sampler(name, world, batch) for name in METHODS}
    if peer is not None:
        peer.ask(op="prepare", batch=batch)
    each: dict[str, list[dict]] = {name: [] for name in (*METHODS, "peer")}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            each[name].append(sampler.ask(seconds=seconds))
        if peer is not None:
            each["peer"].append(peer.ask(op="run", seconds=seconds))
    rates = {
        name: statistics.median(x["samples"] / x["cpu_s"] for x in runs)
        for name, runs in each.items()
        if runs
    }
    theirs = rates.get("peer")
    features, dim = world.feature_vectors.shape
    size = {"features": features, "dim": dim, "batch": batch}
    several = {n: [x["samples"] / x["cpu_s"] for x in each[n]] for n in rates}
    for name, rate in rates.items():
        low, high = min(several[name]), max(several[name])
        print(
            f"batch {batch:>5} {name:<12} {rate:12,.0f} samples per processor second "
            f"({low:,.0f} to {high:,.0f})"
        )
    return [
        row(
            "synthetic world",
            size,
            name,
            ours_s=batch / rates[name],
            peer_s=batch / theirs if theirs else None,
            ratio=rates[name] / theirs if theirs else None,
            samples_per_cpu_s=rates[name],
            peer_samples_per_cpu_s=theirs,
        )
        for name in METHODS
    ]


def main() -> None:
    """Write a world, check the rates, time."""
    tiny = "--tiny" in sys.argv
    python = PEERS
    if "--peer" in sys.argv:
        python = Path(sys.argv[sys.argv.index("--peer") + 1])
    sizes = (128, 16) if tiny else (512, 64)
    world = data.synth_sae_bench(jax.random.key(0), features=sizes[0], dim=sizes[1])
    peer, error = None, 0.0
    if python.exists() and not tiny:
        peer = Worker(python, HERE / "peers" / "worlds.py", 1)
        with tempfile.TemporaryDirectory() as folder:
            data.save_synthetic_model(folder, world)
            peer.ask(op="load", path=folder)
        peer.ask(op="prepare", batch=4096)
        theirs = np.asarray(peer.ask(op="rates", batches=100)["rates"])
        error = deviation(firing(world, 4096, 400), theirs, 400 * 4096, 100 * 4096)
        print(f"firing rates differ by {error:.2f} standard errors (RMS; bar 1.2)")
        if error > 1.2:
            finish([], ["firing rates are not those of the peer; nothing was timed"])
    rows = []
    for batch in (256,) if tiny else (1024, 4096):
        settings = (2, 0.05) if tiny else (7, 0.5)
        for line in measured(world, peer, batch, *settings):
            rows.append(line | {"error": error, "peer_error": None})
    if peer is not None:
        peer.end()
    missed = [
        f"{r['method']} at batch {r['size']['batch']}: {r['ratio']:.1f} x the samples "
        f"of SAELens per processor second, the bar is {BAR:.0f}"
        for r in rows
        if r["method"] == "world_acts" and r["ratio"] and r["ratio"] < BAR
    ]
    finish(rows, missed)


if __name__ == "__main__":
    main()
