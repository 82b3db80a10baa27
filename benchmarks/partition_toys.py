"""Toys whose weights are decomposed: targets, what is decomposed, and their truth."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat import partition
from toyfeat.models import planted
from toyfeat.models.planted.residual import RESIDUAL_STREAM

PROBE = 0.75
"""Size of the one active input on which targets and importances are judged."""
TARGET_TOLERANCE = 0.1
"""How far an output of a target may be from that, as in the authors' own check."""


class Toy(NamedTuple):
    """A toy.

    Attributes:
      preset: settings of the published decomposition.
      paths: of the weights.
      features: inputs.
      batches: arguments of ``sparse_batches``.
      target: arguments of the planted task.
      identity: sites that should have one component per feature.
      dense: sites that should have so many components, all active together.
    """

    preset: partition.Preset
    paths: tuple[str, ...]
    features: int
    batches: dict[str, Any]
    target: dict[str, Any]
    identity: tuple[str, ...]
    dense: dict[str, int]


def _superposition(
    name: str, features: int, hidden: int, batch: int, identity: bool
) -> Toy:
    return Toy(
        preset=partition.spd_2025(name),
        paths=("weight", "identity") if identity else ("weight",),
        features=features,
        batches={"probability": 0.05},
        target={
            "features": features,
            "hidden": hidden,
            "identity": identity,
            "published": True,
            "steps": 10_000,
            "batch": batch,
        },
        identity=("weight", "weight#1"),
        dense={"identity": hidden} if identity else {},
    )


def _residual(layers: int, features: int, neurons: int, steps: int) -> Toy:
    name = f"residual {layers}"
    places = range(layers)
    return Toy(
        preset=partition.spd_2025(name),
        paths=tuple(f"{side}/{layer}" for layer in places for side in ("in", "out")),
        features=features,
        batches={"probability": 0.01, "low": -1.0},
        target={
            "layers": layers,
            "features": features,
            "neurons": neurons,
            "steps": steps,
        },
        identity=tuple(f"in/{layer}" for layer in places),
        dense={f"out/{layer}": neurons for layer in places},
    )


TOYS = {
    "5-2": _superposition("5-2", 5, 2, 1024, False),
    "5-2+identity": _superposition("5-2+identity", 5, 2, 1024, True),
    "40-10": _superposition("40-10", 40, 10, 8192, False),
    "40-10+identity": _superposition("40-10+identity", 40, 10, 8192, True),
    "residual 1": _residual(1, 100, 50, 1000),
    "residual 2": _residual(2, 100, 25, 1000),
    "residual 3": _residual(3, 102, 17, 10_000),
}


class Targets(NamedTuple):
    """Trained targets, one per seed.

    Attributes:
      probed: the model.
      params: leaves ``[P, ...]``.
      correct: ``[P]``, whether every feature alone comes out as it should.
      fits: ``[P]``, share of the variance that a target leaves.
    """

    probed: Any
    params: Any
    correct: np.ndarray
    fits: np.ndarray


def train_targets(name: str, seeds: list[int], **changes: Any) -> Targets:
    """Train the targets of a toy."""
    toy = TOYS[name]
    is_residual = name.startswith("residual")
    make = planted.resid_mlp if is_residual else planted.superposition
    tasks = [make(jax.random.key(seed), **(toy.target | changes)) for seed in seeds]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[t.params for t in tasks]
    )
    x = PROBE * np.eye(toy.features, dtype=np.float32)
    wanted = 2 * PROBE if is_residual else PROBE
    outputs = [np.asarray(task.probed(task.params, x, {})[0]) for task in tasks]
    errors = [np.abs(np.diag(y) - wanted).max() for y in outputs]
    # Two layers and more need a residual stream that is written down.
    deep = toy.target.get("layers", 1) > 1
    return Targets(
        probed=RESIDUAL_STREAM if deep else tasks[0].probed,
        params=stacked,
        correct=np.array(errors) <= TARGET_TOLERANCE * wanted / PROBE,
        fits=np.array([task.fit for task in tasks]),
    )


def decomposition_of(
    name: str, targets: Targets, components: int | None = None
) -> partition.Decomposition:
    """Make the decomposition of a toy."""
    toy = TOYS[name]
    first = jax.tree.map(lambda x: x[0], targets.params)
    x = PROBE * jnp.eye(toy.features)
    count = toy.preset.components if components is None else components
    return partition.decompose_weights(targets.probed, first, toy.paths, count, x)


def batches_of(name: str, key: jax.Array, batch: int) -> ft.data.Batches:
    """Make the batches of a toy."""
    toy = TOYS[name]
    return partition.sparse_batches(key, toy.features, batch=batch, **toy.batches)


def cpu_seconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Measure the processor time of a call, which other programs disturb less."""
    run()
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats
