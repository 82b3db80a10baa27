"""Score activation, gradient and parameter methods on the same mechanisms.

    python benchmarks/partition_methods.py --seeds 2 --json rows.jsonl

A parameter method splits the weight that reads a site; the side of its parts that lies
there are readers, scored as those of all methods are (``leaderboard.py``).  A part
counts if it has an importance above .1 on some fresh input.  Seconds are those of the
processor, so that other programs count less.  Of the controls, one has nothing to find,
and one has fewer mechanisms than features.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from method_tools import Budget, choose_k, num_latents, rows_as_taps, train_dictionary
from methods import METHODS

import toyfeat as ft
from toyfeat import partition
from toyfeat.metrics.partition import ALIVE
from toyfeat.models import planted
from toyfeat.models.planted import Task
from toyfeat.types import Array, Features

OTHERS = (
    "random",
    "activation PCA",
    "TopK",
    "gradient PCA",
    "LIB",
    "gradient TopK",
    "consensus",
)
"""Methods of activations and gradients that stand beside those of parameters."""


class Case(NamedTuple):
    """A task and the weight that reads its site.

    Attributes:
      make: ``key -> Task``.
      paths: of the weights that are decomposed.
      weight: path of the one that reads the site.
      transposed: whether it does so where it is used a second time, transposed.
      preset: settings of the decomposition.
      components: parts of each weight.
      limit: most mechanisms that there are, for controls.
    """

    make: Callable[[Array], Task]
    paths: tuple[str, ...]
    weight: str
    transposed: bool
    preset: partition.Preset
    components: int
    limit: int | None = None


def _superposition(name: str, paths: tuple[str, ...], **knobs: Any) -> Case:
    make = partial(planted.superposition, published=True, **knobs)
    preset = partition.spd_2025(name)
    return Case(make, paths, "weight", True, preset, preset.components)


_TWO = ("weight", "identity")
_WIDE = {"features": 40, "hidden": 10, "batch": 512}
_CONTROL = partition.spd_2025("40-10")
_RANDOM = partial(planted.random_network, dim=16, width=32, layers=2, outputs=8)
_COMPRESSED = partial(planted.compressed_computation, features=20, neurons=10)
CASES = {
    "5-2": _superposition("5-2", ("weight",), steps=10_000),
    "5-2+identity": _superposition("5-2+identity", _TWO, identity=True, steps=10_000),
    "40-10": _superposition("40-10", ("weight",), steps=10_000, **_WIDE),
    "random network": Case(
        _RANDOM, ("weights/0",), "weights/0", False, _CONTROL, 40, limit=0
    ),
    "compressed 20/10": Case(
        _COMPRESSED, ("in/0",), "in/0", False, _CONTROL, 40, limit=10
    ),
}


@dataclass(frozen=True)
class MethodsConfig(BenchmarkConfig):
    """Options of this benchmark."""

    cases: tuple[str, ...] = ("5-2", "5-2+identity", "random network")
    """Which tasks."""
    methods: tuple[str, ...] = ()
    """Which methods; all of them without."""
    seeds: int = 2
    """Draws of every task."""
    steps: int = 10_000
    """Of decompositions."""
    batch: int = 256
    """Examples per step of decompositions."""


def decompose(
    key: Array, task: Task, case: Case, config: MethodsConfig, *, budget: Budget
) -> Features:
    """Train a decomposition, and return the parts in use where they read the site."""
    state_key, data_key, test_key = jax.random.split(key, 3)
    x = task.sample(test_key, 4096)
    split = _split(task, case, x[:8])
    trainer = case.preset.trainer(split, task.params, steps=config.steps)
    # Data of sparse inputs join the zeros; others are drawn as they are.
    if case.transposed:
        batches = partition.sparse_batches(
            data_key, x.shape[1], probability=0.05, batch=config.batch
        )
    else:
        draw = partial(_draw, task, data_key, config.batch)
        batches = ft.data.Batches(lambda _, step: draw(step), {})
    state = ft.fit(
        trainer,
        trainer.init(state_key),
        batches,
        steps=config.steps,
        chunk=max(1, config.steps // 20),
        progress=False,
    )
    family = case.preset.importance_of(split)
    lower = partition.importances(split, family, task.params, state.params, x)[1]
    alive = np.asarray(lower[case.weight + "#1" * case.transposed] > ALIVE).any(0)
    parts = state.params["components"][case.weight]
    rows = parts["U"] if case.transposed else parts["V"].T
    return _as_features(key, np.asarray(rows)[alive], task, budget)


def gradients_of_weights(
    key: Array, task: Task, case: Case, config: MethodsConfig, *, budget: Budget
) -> Features:
    """Return the side of :func:`gradient_parts` that lies at the site."""
    del config
    left, right = gradient_parts(key, task, case, budget=budget)
    return _as_features(key, right if case.transposed else left, task, budget)


def gradient_parts(
    key: Array, task: Task, case: Case, *, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """Train a TopK dictionary on gradients by the weight: directions of its space.

    Returns:
      ``[R, d_in]`` and ``[R, d_out]``, the leading singular pair of each direction.
    """
    x_key, pair_key, train_key, k_key = jax.random.split(key, 4)
    x = task.sample(x_key, min(budget.examples, 5000))
    split = _split(task, case._replace(paths=(case.weight,)), x[:8])
    rows = partition.gradient_batch(pair_key, split, task.params, x).acts
    rows = rows[jnp.linalg.norm(rows, axis=1) > 0]
    k = choose_k(k_key, rows, budget, signed=True)
    width = rows.shape[1]
    sae = ft.dictionaries.topk(width, num_latents(width), k, signed=True)
    taps = rows_as_taps(rows)
    objective = ft.losses.default(sae)
    params = train_dictionary(train_key, sae, objective, taps, budget, center=False)
    shape = split.weights[case.weight].matrix_shape()
    left, _, right = np.linalg.svd(params["W_dec"].reshape(-1, *shape))
    return left[:, :, 0], right[:, 0]


PARAMETER_METHODS = {
    "partition (SPD)": decompose,
    "gradients of weights (L3D)": gradients_of_weights,
}


def _split(task: Task, case: Case, x: Any) -> partition.Decomposition:
    return partition.decompose_weights(
        task.probed, task.params, case.paths, case.components, x
    )


def _draw(task: Task, key: Array, batch: int, step: Array) -> ft.Taps:
    x = task.sample(jax.random.fold_in(key, step), batch)
    return ft.Taps(x, None, jnp.ones(batch))


def _as_features(
    key: Array, readers: np.ndarray, task: Task, budget: Budget
) -> Features:
    """Add the regression patterns of readers as writers."""
    subject = planted.subject_of(task)
    x = subject.sample(jax.random.fold_in(key, 1), min(budget.examples, 4096))
    acts = subject.probed(subject.params, x, {})[1][subject.site]
    rows = jnp.asarray(readers, jnp.float32)
    return Features(rows, rows @ jnp.cov(acts.reshape(-1, acts.shape[-1]).T))


def measure_case(name: str, seed: int, config: MethodsConfig) -> list[dict[str, Any]]:
    """Run the methods on a draw of a task."""
    case = CASES[name]
    short = {"steps": 20} if config.tiny and case.limit is None else {}
    task = case.make(jax.random.key(seed), **short)
    tiny = Budget(examples=500, steps=20, batch=32)
    budget = tiny if config.tiny else Budget()
    key = jax.random.fold_in(jax.random.key(1), seed)
    runs: dict[str, Callable[[], Any]] = {}
    for method in OTHERS:
        run = METHODS[method].run
        runs[method] = partial(run, key, planted.subject_of(task), budget=budget)
    for method, decomposed in PARAMETER_METHODS.items():
        runs[method] = partial(decomposed, key, task, case, config, budget=budget)
    rows = []
    for method in config.methods or runs:
        began = time.process_time()
        features = jax.block_until_ready(runs[method]())
        seconds = time.process_time() - began
        scores = ft.metrics.score_task(jax.random.fold_in(key, 1), task, features)
        sizes = {"seed": seed, "steps": config.steps, "batch": config.batch}
        rows.append(
            row(
                name,
                sizes,
                method,
                **_plain(scores._asdict()),
                returned=len(features.readers),
                limit=case.limit,
                cpu_seconds=seconds,
            )
        )
        if config.json is not None:  # what there is, if the run is cut off
            with config.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        figures = f"readers {scores.readers:.3f}, {len(features.readers)} rows"
        print(f"{name}, seed {seed}, {method}: {figures}, {seconds:.0f} s", flush=True)
    return rows


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """Keep the figures that are numbers."""
    kinds = (int, float, np.integer, np.floating)
    return {n: float(x) for n, x in figures.items() if isinstance(x, kinds)}


def measure(config: MethodsConfig) -> list[dict[str, Any]]:
    """Measure all cases."""
    return [
        line
        for name in config.cases
        for seed in range(config.seeds)
        for line in measure_case(name, seed, config)
    ]


if __name__ == "__main__":
    options = parse_command(MethodsConfig, __doc__)
    finish(measure(options), [], options.json)
