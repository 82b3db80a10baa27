"""Decompose the weights of toys with known mechanisms, over seeds, and score that.

Targets and decompositions of all seeds are trained as one population, with the
published settings but for what flags change; rows hold both.  A run goes on where it
was stopped.

    python benchmarks/partition.py --toys 5-2 --seeds 10 --out out/partition
    python benchmarks/partition.py --map --out out/partition      # brittleness
    python benchmarks/partition.py --speed --out out/partition    # population

``--batch`` is the number of examples of a step that inputs of zeros, joined into one,
count for (``partition.sparse_batches``).
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, medians, parse_command, row
from partition_picture import draw_importances
from partition_scores import correct, make_judge, member_of, score
from partition_toys import (
    TOYS,
    Targets,
    batches_of,
    cpu_seconds,
    decomposition_of,
    train_targets,
)

import toyfeat as ft
from toyfeat.files.atomic import write_whole

BARS = {"mmcs": 0.999, "ml2r": 0.03}
"""Least MMCS, and how far ML2R may be from 1."""
MAP_COEFFICIENTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MAP_RATES = (3e-4, 1e-3, 3e-3)
DATA_SEED = 7
PICTURED = 3
"""Seeds in a picture."""


@dataclass(frozen=True)
class PartitionConfig(BenchmarkConfig):
    """Options of this benchmark."""

    toys: tuple[str, ...] = ("5-2",)
    """Which toys."""
    seeds: int = 10
    """Targets and decompositions."""
    batch: int = 0
    """Examples per step; 0 for those of the preset."""
    steps: int = 0
    """Steps; 0 for those of the preset."""
    target_batch: int = 0
    """Examples per step of the targets' training; 0 for the published number."""
    group: int = 0
    """Seeds computed at once; 0 for all. With large batches 1 stays in the cache."""
    stop: int = 0
    """Stop after so many of the steps, and score what there is; 0 for all."""
    picture: Path | None = None
    """Draw the importances of the seeds of the last toy there."""
    out: Path = Path("out/partition")
    """Folder of checkpoints and rows."""
    map: bool = False
    """Map coefficients and learning rates, published settings against a controller."""
    target_l0: float = 0.5
    """Components per example that the controller of the map aims at: .25 inputs at each
    of two sites."""
    target_error: float = 0.0
    """Stochastic error that it aims at instead, if it is not 0; of toys too, which
    have no controller otherwise."""
    low_start: bool = False
    """Give a controller of parts the gains of one of an error: no proportional part,
    and a hundredth of the coefficient to start from."""
    learning_rate: float = 0.0
    """Of toys; 0 for that of the preset."""
    speed: bool = False
    """Time populations of 1 and 16 seeds."""


def measure_toy(name: str, config: PartitionConfig) -> list[dict[str, Any]]:
    """Train all seeds of a toy, and score each."""
    toy, folder = TOYS[name], config.out / name.replace(" ", "-")
    seeds = list(range(config.seeds))
    targets = _stored_targets(name, seeds, folder, _changes(config))
    split = decomposition_of(name, targets, 4 if config.tiny else None)
    judge = make_judge(name, split)
    steps = config.steps or toy.preset.steps
    batch = config.batch or toy.preset.batch
    control, aim = _controller(config) if config.target_error else (None, {})
    trainer = toy.preset.trainer(
        split, targets.params, networks=True, steps=steps, controller=control
    )
    trainer = ft.population(trainer, group=config.group or None)
    rate = {"learning_rate": config.learning_rate} if config.learning_rate else {}
    batches = batches_of(name, jax.random.key(DATA_SEED), batch)
    done = config.stop or steps
    state, seconds = _train(trainer, targets, seeds, batches, done, folder, **rate)
    size = {"steps": steps, "done": done, "batch": batch}
    if config.target_batch:
        size["target_batch"] = config.target_batch
    rows = [
        row(
            name,
            size | {"seed": seed},
            "spd_2025" if control is None else "controller",
            **score(name, judge, state, seed),
            **aim,
            **rate,
            target_correct=bool(targets.correct[seed]),
            target_fit=float(targets.fits[seed]),
            seconds_of_all=seconds,
        )
        for seed in seeds
    ]
    if config.picture is not None:
        alone = [judge(*member_of(state, seed)).alone for seed in seeds[:PICTURED]]
        draw_importances(config.picture, name, alone)
    return rows


def _changes(config: PartitionConfig) -> dict[str, Any]:
    """Return what the training of targets has in place of published settings."""
    if config.tiny:
        return {"steps": 20, "batch": 64}
    return {"batch": config.target_batch} if config.target_batch else {}


def _stored_targets(
    name: str, seeds: list[int], folder: Path, changes: dict[str, Any]
) -> Targets:
    """Train targets, or read those that an earlier call has trained."""
    path = folder / "targets.npz"
    if not path.exists():
        targets = train_targets(name, seeds, **changes)
        folder.mkdir(parents=True, exist_ok=True)
        leaves = {str(i): x for i, x in enumerate(jax.tree.leaves(targets.params))}
        with path.open("wb") as file:
            np.savez(file, correct=targets.correct, fits=targets.fits, **leaves)
        return targets
    with np.load(path) as held:
        arrays = dict(held)
    if len(arrays["fits"]) != len(seeds):
        raise SystemExit(
            f"partition: {path} holds {len(arrays['fits'])} targets, wanted "
            f"{len(seeds)}; give another --out"
        )
    # An untrained network has the form of the parameters.
    form = train_targets(name, [0], **(changes | {"steps": 1}))
    tree = jax.tree.structure(form.params)
    leaves = [jnp.asarray(arrays[str(i)]) for i in range(tree.num_leaves)]
    params = jax.tree.unflatten(tree, leaves)
    return form._replace(params=params, correct=arrays["correct"], fits=arrays["fits"])


def _train(
    trainer: ft.Trainer,
    targets: Targets,
    seeds: list[int],
    batches: ft.data.Batches,
    steps: int,
    folder: Path,
    **hyper: Any,
) -> tuple[ft.TrainState, float]:
    """Train a population; seconds of all calls that it took."""
    keys = jnp.stack([jax.random.key(1000 + seed) for seed in seeds])
    network = jnp.asarray(seeds) % len(targets.fits)
    state = trainer.init(keys, network=network, **hyper)
    clock = folder / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    began = time.perf_counter()

    def note(step: int, means: Any) -> None:
        del step, means
        write_whole(clock, json.dumps(before + time.perf_counter() - began))

    state = ft.fit(
        trainer,
        state,
        batches,
        steps=steps,
        chunk=50,
        checkpoint_every=10,
        directory=folder,
        progress=False,
        on_chunk=note,
    )
    return state, before + time.perf_counter() - began


def measure_map(config: PartitionConfig) -> list[dict[str, Any]]:
    """Train 5-2 for coefficients, rates and seeds, with and without a controller."""
    toy, steps = TOYS["5-2"], config.steps or 3000
    seeds = list(range(config.seeds))
    targets = _stored_targets("5-2", seeds, config.out / "5-2", _changes(config))
    split = decomposition_of("5-2", targets, 4 if config.tiny else None)
    judge = make_judge("5-2", split)
    cells = list(product(MAP_COEFFICIENTS, MAP_RATES, seeds))
    coefficients, rates, members = zip(*cells, strict=True)
    rows = []
    control, aim = _controller(config)
    for method, controller in (("published", None), ("controller", control)):
        trainer = toy.preset.trainer(
            split, targets.params, networks=True, steps=steps, controller=controller
        )
        batches = batches_of("5-2", jax.random.key(DATA_SEED), config.batch or 256)
        state, seconds = _train(
            ft.population(trainer),
            targets,
            list(members),
            batches,
            steps,
            config.out / f"map-{method}",
            importance=jnp.array(coefficients),
            learning_rate=jnp.array(rates),
        )
        for member, (coefficient, rate, seed) in enumerate(cells):
            figures = score("5-2", judge, state, member)
            size = {"steps": steps, "batch": config.batch or 256, "seed": seed}
            settings = {"coefficient": coefficient, "learning_rate": rate}
            if controller is not None:
                settings |= aim
            figures |= {"correct": correct("5-2", figures), "seconds_of_all": seconds}
            rows.append(row("5-2 map", size, method, **settings, **figures))
    return rows


def _controller(
    config: PartitionConfig,
) -> tuple[ft.controllers.Controller, dict[str, float]]:
    """Make the controller of the importances, and name what it aims at."""
    if not config.target_error:
        gains = {"proportional": 0.0, "start": 0.01} if config.low_start else {}
        target = config.target_l0
        control = ft.controllers.target_l0(target, term="importance", **gains)
        return control, {"target_l0": target, **gains}
    control = ft.controllers.target_error(
        config.target_error, measures="stochastic", term="importance"
    )
    # The map of an earlier controller has the same keys, and other gains.
    return control, {"target_error": config.target_error, "start": control.start}


def measure_speed(config: PartitionConfig) -> list[dict[str, Any]]:
    """Time a step of one seed, and of 16 together and in groups of 1, in turns."""
    targets = train_targets("5-2", [0], steps=20, batch=64)
    toy, split = TOYS["5-2"], decomposition_of("5-2", targets)
    batch = config.batch or toy.preset.batch
    taps = batches_of("5-2", jax.random.key(DATA_SEED), batch)(0)
    trainer = toy.preset.trainer(split, targets.params, networks=True)
    keys = jax.random.split(jax.random.key(0), 16)
    runs: dict[str, Callable[[], Any]] = {}
    for method, group in (("one", 0), ("together", 16), ("groups of 1", 1)):
        many = ft.population(trainer, group=group) if group else trainer
        state = many.init(keys, network=jnp.zeros(16)) if group else many.init(keys[0])
        update = jax.jit(many.update).lower(state, taps).compile()
        runs[method] = partial(_wait, update, state, taps)
    times = medians(runs, rounds=3 if config.tiny else 7)
    cpu = {method: cpu_seconds(run) for method, run in runs.items()}
    rows = []
    for method, seconds in times.items():
        seeds = 1 if method == "one" else 16
        size = {"batch": batch, "rows": len(taps.acts), "seeds": seeds}
        rows.append(
            row(
                "5-2 speed",
                size,
                method,
                step_ms=1e3 * seconds,
                seeds_per_second=seeds / seconds,
                cpu_ms=1e3 * cpu[method],
                seeds_per_cpu_second=seeds / cpu[method],
            )
        )
    return rows


def _wait(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(fn(*args))


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """Compare rows with the bars."""
    missed = []
    for name in sorted({r["case"] for r in rows if r["case"] in TOYS}):
        own = [r for r in rows if r["case"] == name]
        share = sum(correct(name, r) for r in own) / len(own)
        if share < 0.9:
            missed.append(f"{name}: importances are right on {share:.0%} of the seeds")
        for r in own:
            if "mmcs" in r and r["mmcs"] < BARS["mmcs"]:
                missed.append(f"{name} seed {r['size']['seed']}: MMCS {r['mmcs']:.4f}")
            if "ml2r" in r and abs(r["ml2r"] - 1) > BARS["ml2r"]:
                missed.append(f"{name} seed {r['size']['seed']}: ML2R {r['ml2r']:.3f}")
    return missed


def measure(config: PartitionConfig) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure what the flags ask for."""
    if config.speed:
        return measure_speed(config), []
    if config.map:
        return measure_map(config), []
    rows = [r for name in config.toys for r in measure_toy(name, config)]
    return rows, missed_bars(rows)


if __name__ == "__main__":
    options = parse_command(PartitionConfig, __doc__)
    finish(*measure(options), options.json)
