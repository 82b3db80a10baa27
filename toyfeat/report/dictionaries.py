"""Dictionaries of a squaring network's activations and gradients, scored."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

import toyfeat as tf
from toyfeat.models import squaring
from toyfeat.types import Array, ArrayLike, Dictionary, Taps, Truth

TASK = squaring.Squaring(20, 60, low=-0.5, high=1.0, probability=0.1)
"""Twenty sparse inputs, sixty neurons, rotated outputs."""


class Setting(NamedTuple):
    """How the dictionaries are trained; the same for all of them."""

    latents: int = 40
    k: int = 2
    steps: int = 3000
    batch: int = 1024
    examples: int = 100_000
    learning_rate: float = 1e-3


def trained(seed: int, *, steps: int = 8000) -> tuple[Any, Array]:
    """Parameters and rotation of a squaring network."""
    keys = jax.random.key(seed)[None]
    done = squaring.train(keys, TASK, steps=steps, batch=1024, learning_rate=3e-3)
    return jax.tree.map(lambda x: x[0], done.params), done.rotation[0]


def tapped(
    seed: int, params: Any, rotation: Array, examples: int
) -> tuple[Taps, Truth]:
    """Activations, gradients of half the squared norm of the output, and the truth."""
    x = squaring.random_inputs(jax.random.key(1000 + seed), TASK, examples)
    norm = tf.readouts.scalar(lambda outputs: jnp.sum(outputs**2, axis=-1) / 2)
    taps = tf.tap(
        squaring.probed, params, x, sites=["hidden"], readout=norm, batch_size=10_000
    )["hidden"]
    moments = tf.moments(TASK.neurons)
    stats = moments.finish(moments.update(moments.init(), taps))
    covariance = jnp.asarray(stats.scatter / stats.weight)
    return taps, squaring.truth(TASK, params, rotation, covariance)


def scores(seed: int, taps: Taps, truth: Truth, setting: Setting) -> dict[str, float]:
    """Coverage of writers and readers by dictionaries trained apart and paired.

    Returns:
      ``writers`` (dictionary of activations), ``readers`` (of gradients),
      ``paired_writers`` and ``paired_readers`` under one assignment, and for the two
      dictionaries apart the same by that assignment of their latents' indices.
    """
    assert taps.grads is not None
    assert truth.readers is not None
    assert truth.writers is not None
    acts = taps._replace(grads=None)
    grads = taps._replace(acts=taps.grads[:, 0], grads=None)
    sizes = TASK.neurons, setting.latents, setting.k
    of_acts = _fitted(seed, tf.topk(*sizes), acts, setting)
    of_grads = _fitted(seed, tf.topk(*sizes, signed=True), grads, setting, center=False)
    both = _fitted(seed, tf.paired(*sizes), taps, setting)
    apart = one_assignment(of_acts["W_dec"], of_grads["W_dec"], truth)
    together = one_assignment(both["W_dec"], both["W_read"], truth)
    return {
        "writers": tf.match_features(of_acts["W_dec"], truth.writers).coverage,
        "readers": tf.match_features(of_grads["W_dec"], truth.readers).coverage,
        "paired_writers": together[0],
        "paired_readers": together[1],
        "apart_writers": apart[0],
        "apart_readers": apart[1],
    }


def one_assignment(
    writers: ArrayLike, readers: ArrayLike, truth: Truth
) -> tuple[float, float]:
    """Mean ``|cos|`` on either side, latents assigned by the sum of both sides."""
    sides = [
        np.abs(_unit(found) @ _unit(true).T)
        for found, true in ((writers, truth.writers), (readers, truth.readers))
    ]
    rows, columns = linear_sum_assignment(-(sides[0] + sides[1]))
    num = sides[0].shape[1]
    first, second = (float(side[rows, columns].sum() / num) for side in sides)
    return first, second


def _unit(rows: Any) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _fitted(
    seed: int, dictionary: Dictionary, taps: Taps, setting: Setting, **options: Any
) -> dict[str, Array]:
    trainer = tf.trainer(dictionary, tf.dictionary_objective(dictionary), **options)
    state = trainer.init(
        jax.random.key(2000 + seed), learning_rate=setting.learning_rate
    )
    batches = tf.data.array_batches(taps, batch=setting.batch, seed=seed)
    state = tf.fit(trainer, state, batches, steps=setting.steps, chunk=500)
    return tf.folded(dictionary, state)
