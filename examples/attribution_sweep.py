"""A sweep of the published attribution loss and of the robust one.

On a squaring network, over a grid of coefficients and learning rates.
``benchmarks/brittleness.py`` asks the same of planted tasks, where outputs are scaled
and readouts differ, and of the consensus.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import toyfeat as ft
from examples.squaring.dictionaries import TASK
from toyfeat.dictionary.types import Dictionary
from toyfeat.models.planted.task import Truth
from toyfeat.report.sweeps import brittleness_figure, front_figure, write_sweep
from toyfeat.train.sweeps import Row
from toyfeat.train.trainer import UNSTABILIZED
from toyfeat.train.types import Trainer
from toyfeat.types import Taps

GOOD = 0.9
"""Coverage of the writers from which on a run is a success.

The best runs of either loss reach .995 to .999, see docs/decisions.
"""

_ARGUMENT = (
    "A squaring network with known features: its last layer reads each of them by a "
    "reader, and the activations hold each as a writer. A ReLU dictionary of its "
    "activations is trained with the attribution loss in two ways, over a grid of "
    "coefficients (of the sparsity and of the attributions alike) and learning rates, "
    "all members of a family in one compiled step.",
    "Published: the L1 of gradient times activation and the signed unexplained effect, "
    "on raw activations and gradients, without a warm-up, clipping or a controller. "
    "Robust: a bounded penalty, a squared unexplained effect, activations and "
    "gradients in units of their size, warm-up and clipping, and a controller that "
    "steers the codes per example to 2, what the data have.",
)


class Sweep(NamedTuple):
    """Axes of the sweep, and the training of each member.

    Attributes:
      coefficients: of the sparsity and of the attributions alike.
      learning_rates: of Adam.
      latents: of a dictionary.
      steps: of the optimizer.
      batch: examples per step.
      target: codes per example of the controller: what the data have.
      group: members trained at a time, see :func:`toyfeat.population`.
    """

    coefficients: Sequence[float]
    learning_rates: Sequence[float]
    latents: int = 40
    steps: int = 2000
    batch: int = 256
    target: float = 2.0
    group: int | None = None


def check_sweep(sweep: Sweep) -> None:
    """Refuse a sweep that cannot work, before anything is trained.

    Raises:
      ValueError: for an axis with fewer than two values or a value that is not
        positive, and for sizes below 1.
    """
    for name in ("coefficients", "learning_rates"):
        values = np.asarray(getattr(sweep, name), float)
        if len(np.unique(values)) < 2 or not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(
                f"sweep: {name} must be two positive numbers or more, got "
                f"{getattr(sweep, name)}"
            )
    for name in ("latents", "steps", "batch"):
        if getattr(sweep, name) < 1:
            raise ValueError(
                f"sweep: {name} must be at least 1, got {getattr(sweep, name)}"
            )


def published_trainer(sae: Dictionary) -> Trainer:
    """Make a trainer of the four-term loss as published: nothing steadies it."""
    objective = ft.losses.attribution(sae, penalty="l1", form="signed")
    return ft.trainer(sae, objective, **UNSTABILIZED)


def robust_trainer(sae: Dictionary, *, target: float, warm_up: int) -> Trainer:
    """Make a trainer of the bounded loss: scaled, clipped, warmed up and steered.

    Args:
      sae: to train.
      target: codes per example, to which a controller steers the sparsity.
      warm_up: steps in which the coefficients grow.

    Returns:
      The trainer.
    """
    return ft.trainer(
        sae,
        ft.losses.attribution(sae),
        controller=ft.controllers.target_l0(target),
        warm_up=warm_up,
    )


def run_sweep(
    folder: Path, taps: Taps, truth: Truth, sweep: Sweep, *, seed: int = 0
) -> dict[str, list[Row]]:
    """Train a population with either loss and score every member.

    Scores are the coverage of the true writers by decoder rows, and of the true
    readers by encoder columns.

    Args:
      folder: gets a run per family; the same call goes on where it was cut off.
      taps: activations and gradients of the network.
      truth: its readers and writers.
      sweep: axes and settings.
      seed: of the random start, the same for all members.

    Returns:
      Family (``"published"``, ``"robust"``) to its members.
    """
    sae = ft.dictionaries.standard(TASK.neurons, sweep.latents)
    trainers = {
        "published": published_trainer(sae),
        "robust": robust_trainer(sae, target=sweep.target, warm_up=sweep.steps // 20),
    }
    batches = ft.data.array_batches(taps, batch=sweep.batch, seed=seed)
    families = {}
    for name, trainer in trainers.items():
        settings = ft.sweeps.grid(
            learning_rate=sweep.learning_rates, sparsity=sweep.coefficients, seed=seed
        )
        population = ft.population(trainer, group=sweep.group)
        # One coefficient: that of the sparsity is that of the attributions too.
        start = population.init(**settings, attribution_sparsity=settings["sparsity"])
        options: dict[str, Any] = {"directory": folder / name, "check_data": False}
        state = ft.fit(population, start, batches, steps=sweep.steps, **options)
        metrics = ft.sweeps.final_metrics(
            folder / name, steps=max(1, sweep.steps // 10)
        )
        scores = score_members(state.params, truth)
        members = ft.sweeps.table(state, metrics, scores=scores)
        for member in members:
            member.settings.pop("attribution_sparsity", None)
        families[name] = members
    return families


def score_members(params: dict[str, jax.Array], truth: Truth) -> dict[str, np.ndarray]:
    """Compute coverage of writers and readers by every member, NaN where it diverged.

    Args:
      params: of a population of dictionaries.
      truth: with readers and writers.

    Returns:
      ``writers`` and ``readers``, each ``[P]``.
    """
    sides = {
        "writers": (np.asarray(params["W_dec"]), truth.writers),
        "readers": (np.asarray(params["W_enc"]).swapaxes(1, 2), truth.readers),
    }
    return {
        name: np.array([_coverage(rows, true) for rows in rows_of_members])
        for name, (rows_of_members, true) in sides.items()
    }


def _coverage(rows: np.ndarray, true: Any) -> float:
    if not np.isfinite(rows).all():
        return float("nan")
    return ft.metrics.match_features(rows, true).coverage


def write_report(
    folder: Path,
    families: dict[str, list[Row]],
    header: Mapping[str, Any],
    console: Console | None = None,
) -> Path:
    """Write table, pictures and page of both families, and print the table.

    Args:
      folder: an existing folder.
      families: from :func:`run_sweep`.
      header: settings and versions.
      console: where to print; ``None`` for nowhere.

    Returns:
      The path of the page, see :func:`toyfeat.report.sweeps.write_sweep`.
    """
    axes = ("sparsity", "learning_rate")
    pictures = {
        "brittleness": (
            brittleness_figure(families, *axes, score="writers", good=GOOD),
            "Coverage of the true writers by decoder rows. A cross is a run that "
            "diverged, a ring one whose controller was at a limit.",
        ),
        "pareto": (
            front_figure(families, "l0", "fvu"),
            "Codes per example against the share of the variance that is left.",
        ),
    }
    return write_sweep(
        folder,
        families,
        pictures,
        title="The published attribution loss and a robust one",
        argument=_ARGUMENT,
        header=header,
        figures=("fvu", "l0", "attribution_l0", "dead", "writers", "readers"),
        console=console,
    )
