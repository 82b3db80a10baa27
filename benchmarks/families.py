"""The families of methods that ``brittleness.py`` sweeps, and what a sweep is."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as tf
from toyfeat.consensus import agreed, descriptions, half_square, tapped
from toyfeat.report.brittleness import PLAIN
from toyfeat.tap.readouts import Readout
from toyfeat.types import Array, Dictionary, Subject, Taps, Task, Trainer, TrainState


class Grid(NamedTuple):
    """What is swept, and how long every run is."""

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
    """One point of the grid and what became of it."""

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


def readouts(key: Array) -> dict[str, Readout]:
    """Those that a user of the four-term loss may choose from."""
    return {
        "half square": tf.readouts.scalar(half_square),
        "random direction": tf.readouts.random_directions(key, 1, "gaussian"),
    }


def scaled(task: Task, scale: float) -> Subject:
    """The model with its output, and so all gradients, times ``scale``."""

    def probed(params: Any, inputs: Any, probes: Any) -> Any:
        outputs, acts = task.probed(params, inputs, probes)
        return jax.tree.map(lambda x: scale * x, outputs), acts

    return Subject(probed, task.params, task.sample, task.site)


def cells_of(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Every learning rate with every coefficient."""
    pairs = [(rate, c) for rate in grid.rates for c in grid.coefficients]
    rates, coefficients = np.array(pairs).T
    return rates, coefficients


def covered(found: np.ndarray, task: Task) -> float:
    """Coverage of the readers, 0 for what is not finite."""
    readers, group = task.truth.readers, task.truth.group
    assert readers is not None
    if not (len(found) and np.isfinite(found).all()):
        return 0.0
    return tf.match_features(found, readers, group=group).coverage


def standard(task: Task) -> Dictionary:
    """Of the width that both four-term losses train."""
    width = len(np.asarray(task.truth.readers)[0])
    return tf.standard(width, int(np.clip(4 * width, 16, 512)))


def published(task: Task, target: float, grid: Grid) -> list[Part]:
    """The four-term loss as it was written down."""
    del target
    sae = standard(task)
    objective = tf.attribution_objective(sae, penalty="l1", form="signed")
    return four_terms(task, grid, tf.trainer(sae, objective, **PLAIN))


def robust(task: Task, target: float, grid: Grid) -> list[Part]:
    """Our four-term loss, steered to the codes that were asked for."""
    sae = standard(task)
    control = tf.controllers.target_l0(target)
    one = tf.trainer(
        sae,
        tf.attribution_objective(sae),
        controller=control,
        warm_up=grid.steps // 10,
    )
    return four_terms(task, grid, one)


def four_terms(task: Task, grid: Grid, one: Trainer) -> list[Part]:
    """An attribution dictionary over the whole grid."""
    many = tf.population(one)
    rates, coefficients = cells_of(grid)
    inputs, drawn = jax.random.split(jax.random.key(1))

    def part(scale: float, name: str, readout: Readout, start: int) -> list[Run]:
        subject = scaled(task, scale)
        taps = tapped(subject, subject.sample(inputs, grid.examples), readout)
        keys = jax.random.split(jax.random.key(start), len(rates))
        state = many.init(
            keys,
            learning_rate=jnp.asarray(rates, float),
            sparsity=jnp.asarray(coefficients, float),
            attribution_sparsity=jnp.asarray(coefficients, float),
        )
        state, codes = trained(many, state, taps, grid, start)
        decoders = np.asarray(state.params["W_dec"])
        encoders = np.asarray(state.params["W_enc"]).swapaxes(1, 2)
        runs = []
        for i, (rate, c) in enumerate(zip(rates, coefficients, strict=True)):
            sides = decoders[i], encoders[i]
            finite = all(np.isfinite(side).all() for side in sides)
            best = max(covered(side, task) for side in sides) if finite else 0.0
            where = (float(rate), float(c), scale, name, start)
            runs.append(Run(*where, finite, best, float(codes[i])))
        return runs

    return [
        partial(part, scale, name, readout, start)
        for scale in grid.scales
        for name, readout in readouts(drawn).items()
        for start in range(grid.starts)
    ]


def trained(
    many: Trainer, state: TrainState, taps: Taps, grid: Grid, seed: int
) -> tuple[TrainState, np.ndarray]:
    """A population at its end, and codes per example over the last tenth."""
    last: list[np.ndarray] = []
    batches = tf.data.array_batches(taps, batch=256, seed=seed)
    try:
        state = tf.fit(
            many,
            state,
            batches,
            steps=grid.steps,
            chunk=max(1, grid.steps // 10),
            progress=False,
            check_data=False,
            on_chunk=lambda _, metrics: last.append(metrics["l0"]),
        )
    except FloatingPointError:  # of all members
        lost = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
        return state._replace(params=lost), np.zeros(len(state.step))
    return state, np.nan_to_num(last[-1])


def consensus(task: Task, target: float, grid: Grid) -> list[Part]:
    """The consensus at every learning rate, in one population per readout."""
    del target
    settings = {"learning_rate": np.array(grid.rates)}
    description = tf.Description(examples=grid.examples, steps=grid.steps)

    def part(scale: float, start: int) -> list[Run]:
        subject = scaled(task, scale)
        described = descriptions(
            jax.random.key(start), subject, description, settings=settings
        )
        runs = []
        for rate, sets in zip(grid.rates, described.sets, strict=True):
            finite = all(map(len, sets))  # what diverged has no used latents
            reached = covered(agreed(sets, described)[0], task)
            for c in grid.coefficients:
                where = (rate, c, scale, "both", start)
                runs.append(Run(*where, finite, reached, None))
        return runs

    return [
        partial(part, scale, start)
        for scale in grid.scales
        for start in range(grid.starts)
    ]


class Family(NamedTuple):
    """A way to sweep; its version is raised where it comes to something else."""

    sweep: Sweep
    version: int = 1


FAMILIES = {
    "published": Family(published),
    "robust": Family(robust),
    "consensus": Family(consensus, 3),
}
