"""Time samples of a synthetic world, beside SAELens' own generator.

    pip install sae-lens==6.54.12           # into the peers' environment
    python benchmarks/world.py [--tiny] [--json PATH] [--peer PYTHON]

A world of SynthSAEBench's recipe (512 features in 64 dimensions) is written to disk
and sampled by both, in turns and on one processor, where both need the fewest
processor seconds.  Before a time is reported, both sides' firing rates have to agree.
Without a peer only our own samples are timed.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if hasattr(os, "sched_setaffinity"):  # one processor, before threads are made
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import numpy as np
from contest import HERE, PEERS, Worker
from harness import BenchmarkConfig, finish, parse_command, row

from toyfeat import worlds
from toyfeat.types import Array

BAR = 20.0
METHODS = {"world_acts": worlds.world_acts, "world_batch": worlds.world_batch}


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Options."""

    peer: Path = PEERS
    """Python of the peers' environment."""


class Sampler:
    """Our generator, which answers as the peer's process does."""

    def __init__(self, method: str, world: worlds.World, batch: int) -> None:
        """Compile."""
        fn = jax.jit(METHODS[method], static_argnums=2)
        self.batch, self.world = batch, world
        self.run = fn.lower(jax.random.key(0), world, batch).compile()
        self.keys = list(jax.random.split(jax.random.key(0), 64))
        jax.block_until_ready(self.run(self.keys[0], world))

    def ask(self, *, seconds: float) -> dict[str, float]:
        """Sample for about so many seconds."""
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


def firing(world: worlds.World, batch: int, batches: int) -> np.ndarray:
    """Measure how often each feature fires, ``[F]``."""

    def rates(key: Array, world: worlds.World) -> Array:
        return (worlds.world_codes(key, world, batch) > 0).mean(0)

    run = jax.jit(rates)
    keys = jax.random.split(jax.random.key(1), batches)
    return np.mean([run(key, world) for key in keys], axis=0)


def deviation(ours: np.ndarray, peer: np.ndarray, num: int, peer_num: int) -> float:
    """Root mean square difference of rates in standard errors; about 1 if equal."""
    rate = (num * ours + peer_num * peer) / (num + peer_num)
    noise = np.sqrt(rate * (1 - rate) * (1 / num + 1 / peer_num)) + 1e-9
    return float(np.sqrt(np.mean(((ours - peer) / noise) ** 2)))


def measure(
    world: worlds.World, peer: Worker | None, batch: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Time all generators in turns; a row per method of ours."""
    samplers: dict[str, Any] = {name: Sampler(name, world, batch) for name in METHODS}
    if peer is not None:
        peer.ask(op="prepare", batch=batch)
    turns: dict[str, list[dict]] = {name: [] for name in (*METHODS, "peer")}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            turns[name].append(sampler.ask(seconds=seconds))
        if peer is not None:
            turns["peer"].append(peer.ask(op="run", seconds=seconds))
    all_rates = {
        name: [turn["samples"] / turn["cpu_s"] for turn in runs]
        for name, runs in turns.items()
        if runs
    }
    rates = {name: statistics.median(values) for name, values in all_rates.items()}
    theirs = rates.get("peer")
    features, dim = world.feature_vectors.shape
    size = {"features": features, "dim": dim, "batch": batch}
    for name, rate in rates.items():
        low, high = min(all_rates[name]), max(all_rates[name])
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
    """Write a world, check the firing rates, then time."""
    config = parse_command(Config, __doc__)
    tiny, python = config.tiny, config.peer
    sizes = (128, 16) if tiny else (512, 64)
    world = worlds.synth_sae_bench(jax.random.key(0), features=sizes[0], dim=sizes[1])
    peer, error = None, 0.0
    if python.exists() and not tiny:
        peer = Worker(python, HERE / "peers" / "worlds.py", 1)
        with tempfile.TemporaryDirectory() as folder:
            worlds.save_synthetic_model(folder, world)
            peer.ask(op="load", path=folder)
        peer.ask(op="prepare", batch=4096)
        theirs = np.asarray(peer.ask(op="rates", batches=100)["rates"])
        error = deviation(firing(world, 4096, 400), theirs, 400 * 4096, 100 * 4096)
        print(f"firing rates differ by {error:.2f} standard errors (RMS; bar 1.2)")
        if error > 1.2:
            missed = ["firing rates are not those of the peer; nothing was timed"]
            finish([], missed, config.json)
    rows = []
    for batch in (256,) if tiny else (1024, 4096):
        settings = (2, 0.05) if tiny else (7, 0.5)
        for line in measure(world, peer, batch, *settings):
            rows.append(line | {"error": error, "peer_error": None})
    if peer is not None:
        peer.end()
    missed = [
        f"{r['method']} at batch {r['size']['batch']}: {r['ratio']:.1f} x the samples "
        f"of SAELens per processor second, the bar is {BAR:.0f}"
        for r in rows
        if r["method"] == "world_acts" and r["ratio"] and r["ratio"] < BAR
    ]
    finish(rows, missed, config.json)


if __name__ == "__main__":
    main()
