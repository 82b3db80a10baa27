"""The published attribution loss beside the robust one, over a grid of settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import toyfeat as tf
from toyfeat.report.dictionaries import TASK
from toyfeat.report.sweeps import brittleness_figure, front_figure, write_sweep
from toyfeat.types import Dictionary, Member, Taps, Trainer, Truth

_GOOD = 0.9  # coverage from which a run is a success

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
    """What is swept, and how each member is trained."""

    coefficients: Sequence[float]
    learning_rates: Sequence[float]
    latents: int = 40
    steps: int = 2000
    batch: int = 256
    target: float = 2.0
    group: int | None = None


def checked(sweep: Sweep) -> Sweep:
    """The sweep itself.

    Raises:
      ValueError: for an axis with fewer than two values or one that is not positive,
        and for sizes below 1: before anything is trained.
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
    return sweep


PLAIN: dict[str, Any] = {
    "normalize": False,
    "center": False,
    "clip": np.inf,
    "warm_up": 0,
}
"""Settings of a trainer without what makes one robust."""


def trainers(sweep: Sweep) -> tuple[Dictionary, dict[str, Trainer]]:
    """A dictionary, and the two ways to train it.

    ``published`` is the four-term loss as it was written down, all of what makes a
    training robust switched off; ``robust`` has a bounded penalty, a positive fourth
    term, everything scaled, clipped and warmed up, and a controller that steers the
    sparsity to ``sweep.target`` codes.
    """
    sae = tf.standard(TASK.neurons, sweep.latents)
    plain = tf.attribution_objective(sae, penalty="l1", form="signed")
    control = tf.controllers.target_l0(sweep.target)
    robust = tf.attribution_objective(sae)
    return sae, {
        "published": tf.trainer(sae, plain, **PLAIN),
        "robust": tf.trainer(
            sae, robust, controller=control, warm_up=sweep.steps // 20
        ),
    }


def swept(
    folder: Path, taps: Taps, truth: Truth, sweep: Sweep, *, seed: int = 0
) -> dict[str, list[Member]]:
    """Train both populations and score every member.

    The same coefficient is that of the sparsity and of the attributions.  Scores are
    the coverage of the true writers by decoder rows, and of the true readers by
    encoder columns.

    Args:
      folder: gets a run per family; the same call goes on where it was cut off.
      taps: activations and gradients of the network.
      truth: its readers and writers.
      sweep: what is swept.
      seed: of the random start, the same for all members.

    Returns:
      Family to its members.
    """
    families = {}
    batches = tf.data.array_batches(taps, batch=sweep.batch, seed=seed)
    _, both = trainers(sweep)
    for name, one in both.items():
        settings = tf.grid(
            learning_rate=sweep.learning_rates, sparsity=sweep.coefficients, seed=seed
        )
        many = tf.population(one, group=sweep.group)
        start = many.init(**settings, attribution_sparsity=settings["sparsity"])
        options: dict[str, Any] = {"directory": folder / name, "check_data": False}
        state = tf.fit(many, start, batches, steps=sweep.steps, **options)
        metrics = tf.final_metrics(folder / name, steps=max(1, sweep.steps // 10))
        rows = tf.sweep_table(state, metrics, scores=scores(state.params, truth))
        for row in rows:  # the same as the sparsity
            row.settings.pop("attribution_sparsity", None)
        families[name] = rows
    return families


def scores(params: dict[str, jax.Array], truth: Truth) -> dict[str, np.ndarray]:
    """Coverage of writers and readers by every member, NaN where it diverged."""
    sides = {
        "writers": (np.asarray(params["W_dec"]), truth.writers),
        "readers": (np.asarray(params["W_enc"]).swapaxes(1, 2), truth.readers),
    }
    return {
        name: np.array([_coverage(rows, true) for rows in found])
        for name, (found, true) in sides.items()
    }


def _coverage(rows: np.ndarray, true: Any) -> float:
    if not np.isfinite(rows).all():
        return float("nan")
    return tf.match_features(rows, true).coverage


def write(
    folder: Path,
    families: dict[str, list[Member]],
    header: Mapping[str, Any],
    console: Console | None = None,
) -> Path:
    """Table, pictures and page of both families, see :func:`write_sweep`."""
    axes = ("sparsity", "learning_rate")
    pictures = {
        "brittleness": (
            brittleness_figure(families, *axes, score="writers", good=_GOOD),
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
