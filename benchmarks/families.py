"""The table of method families that ``brittleness.py`` sweeps.

A new family is one row of :data:`FAMILIES`: a function from a task to the parts of its
sweep, each of them every learning rate with every coefficient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from method_tools import Budget, consensus_config, num_latents

import toyfeat as ft
from toyfeat.dictionary.types import Dictionary
from toyfeat.discover.gradients import tap_subject
from toyfeat.models.planted import Task
from toyfeat.tap.readouts import Readout
from toyfeat.train.trainer import UNSTABILIZED
from toyfeat.train.types import Trainer, TrainState
from toyfeat.types import Array, Subject, Taps


class Grid(NamedTuple):
    """A grid of settings, and the length of every run.

    Attributes:
      tasks: names of planted tasks.
      coefficients: of the penalties.
      rates: learning rates.
      starts: random starts of every setting.
      scales: of the output, and so of the gradients.
      steps: of training.
      examples: inputs that are tapped.
    """

    tasks: tuple[str, ...] = (
        "ignored structure",
        "product space",
        "circuits 20/60",
        "quiet but strong",
    )
    coefficients: tuple[float, ...] = (0.03, 0.3, 3.0, 30.0)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    starts: int = 2
    scales: tuple[float, ...] = (1e-3, 1.0, 1e3)
    steps: int = 2000
    examples: int = 20_000


class Run(NamedTuple):
    """A point of the grid and its result.

    Attributes:
      learning_rate: of the optimizer.
      coefficient: of the penalties.
      scale: of the output.
      readout: name.
      start: number of the random start.
      finite: whether the parameters are.
      coverage: of the task's readers.
      codes: per example, or ``None`` of a method that is asked for none.
    """

    learning_rate: float
    coefficient: float
    scale: float
    readout: str
    start: int
    finite: bool
    coverage: float
    codes: float | None


Part = Callable[[], list[Run]]
"""Every learning rate with every coefficient, all else the same."""

Sweep = Callable[[Task, float, Grid], list[Part]]


def make_readouts(key: Array) -> dict[str, Readout]:
    """Readouts that a user of the four-term loss may choose from."""
    return {
        "half square": ft.readouts.half_squared_norm(),
        "random direction": ft.readouts.random_directions(key, 1, "gaussian"),
    }


def scale_outputs(task: Task, scale: float) -> Subject:
    """Multiply the output of the model, and so all gradients."""

    def probed(params: Any, inputs: Any, probes: Any) -> Any:
        outputs, acts = task.probed(params, inputs, probes)
        return jax.tree.map(lambda x: scale * x, outputs), acts

    return Subject(probed, task.params, task.sample, task.site)


def grid_cells(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Pair every learning rate with every coefficient; two arrays of as many."""
    pairs = [(rate, c) for rate in grid.rates for c in grid.coefficients]
    rates, coefficients = np.array(pairs).T
    return rates, coefficients


def reader_coverage(rows: np.ndarray, task: Task) -> float:
    """Coverage of the true readers by rows, 0 if these are not finite."""
    readers, group = task.truth.readers, task.truth.group
    if readers is None:
        raise ValueError(f"reader_coverage: {task.name!r} has no readers")
    if not (len(rows) and np.isfinite(rows).all()):
        return 0.0
    return ft.metrics.match_features(rows, readers, group=group).coverage


def make_dictionary(task: Task) -> Dictionary:
    """Make the ReLU dictionary that both four-term losses train."""
    width = np.asarray(task.truth.readers).shape[1]
    return ft.dictionaries.standard(width, num_latents(width))


def sweep_published(task: Task, target: float, grid: Grid) -> list[Part]:
    """Sweep the four-term loss as it was published."""
    del target
    sae = make_dictionary(task)
    objective = ft.losses.attribution(sae, penalty="l1", form="signed")
    return attribution_parts(task, grid, ft.trainer(sae, objective, **UNSTABILIZED))


def sweep_robust(task: Task, target: float, grid: Grid) -> list[Part]:
    """Sweep our four-term loss, steered to a target of codes per example."""
    sae = make_dictionary(task)
    trainer = ft.trainer(
        sae,
        ft.losses.attribution(sae),
        controller=ft.controllers.target_l0(target),
        warm_up=grid.steps // 10,
    )
    return attribution_parts(task, grid, trainer)


def attribution_parts(task: Task, grid: Grid, trainer: Trainer) -> list[Part]:
    """Parts that train an attribution dictionary in every cell of the grid."""
    population = ft.population(trainer)
    rates, coefficients = grid_cells(grid)
    input_key, readout_key = jax.random.split(jax.random.key(1))

    def part(scale: float, name: str, readout: Readout, start: int) -> list[Run]:
        # One population has every cell of learning rate and coefficient.
        subject = scale_outputs(task, scale)
        taps = tap_subject(subject, subject.sample(input_key, grid.examples), readout)
        keys = jax.random.split(jax.random.key(start), len(rates))
        state = population.init(
            keys,
            learning_rate=jnp.asarray(rates, float),
            sparsity=jnp.asarray(coefficients, float),
            attribution_sparsity=jnp.asarray(coefficients, float),
        )
        state, codes = train_population(population, state, taps, grid, start)
        decoders = np.asarray(state.params["W_dec"])
        encoders = np.asarray(state.params["W_enc"]).swapaxes(1, 2)
        runs = []
        for i, (rate, c) in enumerate(zip(rates, coefficients, strict=True)):
            # The better one of decoder and encoder counts.
            sides = decoders[i], encoders[i]
            finite = all(np.isfinite(side).all() for side in sides)
            best = max(reader_coverage(side, task) for side in sides) if finite else 0.0
            run = Run(
                learning_rate=float(rate),
                coefficient=float(c),
                scale=scale,
                readout=name,
                start=start,
                finite=finite,
                coverage=best,
                codes=float(codes[i]),
            )
            runs.append(run)
        return runs

    return [
        partial(part, scale, name, readout, start)
        for scale in grid.scales
        for name, readout in make_readouts(readout_key).items()
        for start in range(grid.starts)
    ]


def train_population(
    population: Trainer, state: TrainState, taps: Taps, grid: Grid, seed: int
) -> tuple[TrainState, np.ndarray]:
    """Train; the last state, and codes per example over the last tenth of the steps.

    Parameters are NaN and codes 0 if all members are lost.
    """
    codes: list[np.ndarray] = []
    batches = ft.data.array_batches(taps, batch=256, seed=seed)
    try:
        state = ft.fit(
            population,
            state,
            batches,
            steps=grid.steps,
            chunk=max(1, grid.steps // 10),
            progress=False,
            check_data=False,
            on_chunk=lambda _, metrics: codes.append(metrics["l0"]),
        )
    except FloatingPointError:  # every member is lost
        lost = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
        return state._replace(params=lost), np.zeros(len(state.step))
    return state, np.nan_to_num(codes[-1])


def sweep_consensus(task: Task, target: float, grid: Grid) -> list[Part]:
    """Run the consensus at every scale and start.

    It has no learning rate and no coefficient: what it finds stands at every one of the
    grid.
    """
    del target
    budget = Budget(examples=grid.examples, steps=grid.steps)
    config = consensus_config(budget)

    def part(scale: float, start: int) -> list[Run]:
        subject = scale_outputs(task, scale)
        result = ft.consensus(jax.random.key(start), subject, config=config)
        readers = np.asarray(result.features.readers)
        coverage = reader_coverage(readers, task)
        return [
            Run(
                learning_rate=float(rate),
                coefficient=float(c),
                scale=scale,
                readout="both",
                start=start,
                finite=bool(np.isfinite(readers).all()),
                coverage=coverage,
                codes=None,
            )
            for rate, c in zip(*grid_cells(grid), strict=True)
        ]

    return [
        partial(part, scale, start)
        for scale in grid.scales
        for start in range(grid.starts)
    ]


class Family(NamedTuple):
    """A row of the table.

    Attributes:
      sweep: ``(task, target, grid) -> parts``.
      version: raised where the results change: earlier files are refused then.
      ours: whether it is held to the bar.
      best_coefficient: whether success (b) takes its best coefficient at every other
        setting.
    """

    sweep: Sweep
    version: int = 1
    ours: bool = False
    best_coefficient: bool = False


FAMILIES = {
    "published": Family(sweep_published, best_coefficient=True),
    "robust": Family(sweep_robust, ours=True),
    "consensus": Family(sweep_consensus, version=6, ours=True),
}
"""Name to family; a new one is one row."""
