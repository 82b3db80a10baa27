"""Dictionaries of synthetic worlds, trained and scored as SynthSAEBench does it."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as tf
from toyfeat.types import Array, ArrayBatches, ArrayLike, Dictionary, Params, Taps

PUBLISHED = {
    "batch_topk": {"f1": 0.7316, "mcc": 0.7574, "uniqueness": 0.9837, "ev": 0.7923},
    "matryoshka": {"f1": 0.8793, "mcc": 0.7927, "uniqueness": 0.9987, "ev": 0.7792},
    "standard": {"f1": 0.5562, "mcc": 0.6039, "uniqueness": 0.8976, "ev": 0.7654},
    "jump_relu": {"f1": 0.7317, "mcc": 0.7527, "uniqueness": 0.9885, "ev": 0.7951},
}
"""SynthSAEBench-16k at 25 codes per example, arXiv 2602.14687."""


class Recipe(NamedTuple):
    """SynthSAEBench-16k; a smaller one for a test.

    Attributes:
      features: ``F`` of the world.
      dim: ``D``.
      latents: of the dictionary.
      l0: codes per example.
      widths: prefixes of the matryoshka, the last of them ``latents``.
      steps: of training.
      batch: samples per step.
      learning_rate: constant.
      evaluated: samples that scores are taken over.
    """

    features: int = 16384
    dim: int = 768
    latents: int = 4096
    l0: int = 25
    widths: tuple[int, ...] = (128, 512, 2048, 4096)
    steps: int = 195_312
    batch: int = 1024
    learning_rate: float = 3e-4
    evaluated: int = 102_400


TINY = Recipe(128, 16, 32, 2, (8, 32), 60, 128, 3e-3, 1024)


def fitted(
    name: str,
    key: Array,
    world: tf.data.World,
    recipe: Recipe,
    *,
    directory: str | Path | None = None,
) -> tuple[Dictionary, Params]:
    """A dictionary of an endless stream of samples, made inside the compiled loop.

    Args:
      name: a key of :data:`PUBLISHED`.
      key: of the start and of the samples.
      world: that samples come from.
      recipe: how it is trained.
      directory: of :func:`toyfeat.fit`, which goes on from there.

    Returns:
      The dictionary and its parameters, for samples as they are.
    """
    dictionary, trainer = _trainer(name, recipe)
    start, samples = jax.random.split(key)
    state = trainer.init(start, learning_rate=recipe.learning_rate)
    batches = ArrayBatches(partial(_drawn, recipe.batch), (samples, world))
    chunk = min(500, recipe.steps)
    state = tf.fit(
        trainer, state, batches, steps=recipe.steps, chunk=chunk, directory=directory
    )
    return dictionary, tf.folded(dictionary, state)


def samples(
    key: Array, world: tf.data.World, num: int, batch: int
) -> Iterator[tuple[Array, Array]]:
    """Pairs of activations and planted codes, ``num`` of them in batches."""
    draw: Callable[..., Any] = jax.jit(tf.data.world_batch, static_argnums=2)
    for index in range(-(-num // batch)):
        yield draw(jax.random.fold_in(key, index), world, batch)


def scores(
    dictionary: Dictionary,
    params: Params,
    truth: ArrayLike,
    batches: Iterable[tuple[ArrayLike, ArrayLike]],
    *,
    train: bool = False,
) -> dict[str, float]:
    """Figures of a dictionary on a world of known features.

    Args:
      dictionary: any.
      params: its parameters, for activations as they are.
      truth: ``[F, D]``, the features.
      batches: pairs of activations ``[N, D]`` and planted codes ``[N, F]``.
      train: choose the codes of a batch top-k over each batch, not by threshold.

    Returns:
      ``mcc``, ``uniqueness``, ``f1``, ``precision``, ``recall``, ``ev`` (share of
      the variance that is explained), ``l0`` and ``dead`` (latents that never fire).
    """
    sums = {"count": 0.0, "codes": 0.0, "square": 0.0, "rest": 0.0}
    total: Any = 0.0
    alive: Any = False

    def coded() -> Iterator[tuple[Array, ArrayLike]]:
        nonlocal total, alive
        for acts, planted in batches:
            acts = jnp.asarray(acts)
            codes, rest = _coded(dictionary, train, params, acts)
            acts = np.asarray(acts, np.float64)
            total = total + acts.sum(0)
            alive = alive | np.asarray((codes != 0).any(0))
            sums["count"] += len(acts)
            sums["codes"] += float((codes != 0).sum())
            sums["square"] += float(np.sum(acts**2))
            sums["rest"] += float(np.sum(np.asarray(rest, np.float64) ** 2))
            yield codes, planted

    found = tf.detection(params["W_dec"], truth, coded())
    num = sums["count"]
    variance = sums["square"] / num - float(np.sum((total / num) ** 2))
    return {
        "mcc": tf.match_features(params["W_dec"], truth).mcc,
        "uniqueness": tf.uniqueness(params["W_dec"], truth),
        **found._asdict(),
        "ev": 1 - sums["rest"] / num / variance,
        "l0": sums["codes"] / num,
        "dead": int(np.sum(~alive)),
    }


@partial(jax.jit, static_argnums=(0, 1))
def _coded(
    dictionary: Dictionary, train: bool, params: Params, acts: Array
) -> tuple[Array, Array]:
    codes = dictionary.encode(params, acts, train=train)
    return codes, acts - dictionary.decode(params, codes)


def _drawn(batch: int, data: tuple[Array, tf.data.World], step: Array) -> Taps:
    key, world = data
    acts = tf.data.world_acts(jax.random.fold_in(key, step), world, batch)
    return Taps(acts, None, jnp.ones(batch, acts.dtype))


def _trainer(name: str, recipe: Recipe) -> tuple[Dictionary, tf.Trainer]:
    sizes, control = (recipe.dim, recipe.latents), None
    if name == "batch_topk":
        dictionary = tf.batch_topk(*sizes, recipe.l0)
    elif name == "matryoshka":
        dictionary = tf.matryoshka(*sizes, recipe.l0, widths=recipe.widths)
    else:
        control = tf.controllers.target_l0(float(recipe.l0))
        dictionary = tf.standard(*sizes)
    if name == "jump_relu":
        dictionary = tf.jump_relu(
            *sizes, threshold=1.0, bandwidth=1.0, decoder_norm=0.5
        )
    objective = tf.dictionary_objective(dictionary)
    made = tf.trainer(dictionary, objective, controller=control, center=False)
    return dictionary, made
