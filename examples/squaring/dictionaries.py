"""Dictionaries of a squaring network's activations and gradients, and their scores."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

import toyfeat as ft
from examples.squaring import network
from examples.squaring.network import SITE
from toyfeat.dictionary.types import Dictionary
from toyfeat.models.planted.task import Truth
from toyfeat.types import Array, ArrayLike, Params, Taps

TASK = network.Squaring(20, 60, low=-0.5, high=1.0, probability=0.1)
"""Twenty sparse inputs, sixty neurons, rotated outputs."""


class Settings(NamedTuple):
    """Settings of the training, the same for all dictionaries.

    Attributes:
      latents: of a dictionary.
      k: codes per example: what the data have on average.
      steps: of the optimizer.
      batch: examples per step.
      examples: inputs that are tapped.
      learning_rate: of Adam.
    """

    latents: int = 40
    k: int = 2
    steps: int = 3000
    batch: int = 1024
    examples: int = 100_000
    learning_rate: float = 1e-3


def train_network(seed: int, *, steps: int = 8000) -> tuple[Params, Array]:
    """Train a squaring network on :data:`TASK`.

    Args:
      seed: of the start and of the inputs.
      steps: of the optimizer.

    Returns:
      Parameters and rotation.
    """
    keys = jax.random.key(seed)[None]
    nets = network.train(keys, TASK, steps=steps, batch=1024, learning_rate=3e-3)
    return jax.tree.map(lambda x: x[0], nets.params), nets.rotation[0]


def tap_network(
    seed: int, params: Params, rotation: Array, examples: int
) -> tuple[Taps, Truth]:
    """Tap the hidden layer, with gradients of half the squared norm of the output.

    Args:
      seed: of the inputs.
      params: from :func:`train_network`.
      rotation: from :func:`train_network`.
      examples: number of inputs.

    Returns:
      Taps, and the readers and writers of the network.
    """
    x = network.random_inputs(jax.random.key(1000 + seed), TASK, examples)
    norm = ft.readouts.scalar(lambda outputs: jnp.sum(outputs**2, axis=-1) / 2)
    taps = ft.tap(
        network.probed, params, x, sites=SITE, readout=norm, batch_size=10_000
    )[SITE]
    moments = ft.moments(TASK.neurons)
    stats = moments.finish(moments.update(moments.init(), taps))
    covariance = jnp.asarray(stats.scatter / stats.weight)
    return taps, network.truth(TASK, params, rotation, covariance)


def score_dictionaries(
    seed: int, taps: Taps, truth: Truth, settings: Settings
) -> dict[str, float]:
    """Train dictionaries, apart and paired, and score coverage of writers and readers.

    Args:
      seed: of the starts and of the batches.
      taps: from :func:`tap_network`.
      truth: from :func:`tap_network`.
      settings: of the training.

    Returns:
      ``writers`` (dictionary of activations), ``readers`` (of gradients),
      ``paired_writers`` and ``paired_readers`` under one assignment, and for the two
      dictionaries apart the same by that assignment of their latents' indices.
    """
    if taps.grads is None or truth.readers is None or truth.writers is None:
        raise ValueError("score_dictionaries: wanted gradients, readers and writers")
    acts = taps._replace(grads=None)
    grads = taps._replace(acts=taps.grads[:, 0], grads=None)
    # Two dictionaries trained apart, and one whose latents have both sides.
    sizes = TASK.neurons, settings.latents, settings.k
    signed = ft.dictionaries.topk(
        *sizes, signed=True
    )  # gradients have either sign, and no mean
    acts_params = _fit_dictionary(seed, ft.dictionaries.topk(*sizes), acts, settings)
    grads_params = _fit_dictionary(seed, signed, grads, settings, center=False)
    paired_params = _fit_dictionary(
        seed, ft.dictionaries.paired(*sizes), taps, settings
    )
    writers, readers = acts_params["W_dec"], grads_params["W_dec"]
    # Under one assignment of latents to features.
    apart = paired_coverage(writers, readers, truth)
    paired = paired_coverage(paired_params["W_dec"], paired_params["W_read"], truth)
    return {
        "writers": ft.metrics.match_features(writers, truth.writers).coverage,
        "readers": ft.metrics.match_features(readers, truth.readers).coverage,
        "paired_writers": paired[0],
        "paired_readers": paired[1],
        "apart_writers": apart[0],
        "apart_readers": apart[1],
    }


def paired_coverage(
    writers: ArrayLike, readers: ArrayLike, truth: Truth
) -> tuple[float, float]:
    """Compute the coverage of both sides under one assignment.

    Latents are assigned to features by the sum of ``|cos|`` of both sides.

    Args:
      writers: ``[H, D]``, of the latents.
      readers: ``[H, D]``, of the same latents.
      truth: of ``F`` features.

    Returns:
      Mean ``|cos|`` of the writers, and of the readers.
    """
    writer_cosines, reader_cosines = (
        np.abs(_unit_rows(latents) @ _unit_rows(true).T)
        for latents, true in ((writers, truth.writers), (readers, truth.readers))
    )
    index = linear_sum_assignment(-(writer_cosines + reader_cosines))
    num = writer_cosines.shape[1]
    return (
        float(writer_cosines[index].sum() / num),
        float(reader_cosines[index].sum() / num),
    )


def _unit_rows(rows: Any) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _fit_dictionary(
    seed: int, dictionary: Dictionary, taps: Taps, settings: Settings, **options: Any
) -> dict[str, Array]:
    """Train a dictionary; returns parameters for activations that are not normalized.

    ``options`` are for :func:`toyfeat.trainer`.
    """
    trainer = ft.trainer(dictionary, ft.losses.default(dictionary), **options)
    state = trainer.init(
        jax.random.key(2000 + seed), learning_rate=settings.learning_rate
    )
    batches = ft.data.array_batches(taps, batch=settings.batch, seed=seed)
    state = ft.fit(trainer, state, batches, steps=settings.steps, chunk=500)
    return ft.denormalized(dictionary, state)
