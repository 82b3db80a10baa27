"""SynthSAEBench-16k: dictionaries of a synthetic world, beside the published scores.

``benchmarks/synthetic.py`` compares with SAELens on smaller worlds instead.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import toyfeat as ft
from toyfeat import worlds
from toyfeat.data.batches import Batches
from toyfeat.dictionary.types import Dictionary
from toyfeat.types import Array, Params, Taps

PUBLISHED = {
    "batch_topk": {"f1": 0.7316, "mcc": 0.7574, "uniqueness": 0.9837, "ev": 0.7923},
    "matryoshka": {"f1": 0.8793, "mcc": 0.7927, "uniqueness": 0.9987, "ev": 0.7792},
    "standard": {"f1": 0.5562, "mcc": 0.6039, "uniqueness": 0.8976, "ev": 0.7654},
    "jump_relu": {"f1": 0.7317, "mcc": 0.7527, "uniqueness": 0.9885, "ev": 0.7951},
}
"""Published scores at 25 codes per example, arXiv 2602.14687."""

_CHUNK = 500  # steps per compiled call


class Recipe(NamedTuple):
    """Sizes of the world and of the training; by default those of the publication.

    Attributes:
      features: number ``F`` of features of the world.
      dim: width ``D`` of the activations.
      latents: of the dictionary.
      l0: codes per example.
      widths: prefixes of the matryoshka, the last of them ``latents``.
      steps: of training.
      batch: samples per step.
      learning_rate: of Adam, constant.
      evaluated: samples for the scores.
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


TINY = Recipe(
    features=128,
    dim=16,
    latents=32,
    l0=2,
    widths=(8, 32),
    steps=60,
    batch=128,
    learning_rate=3e-3,
    evaluated=1024,
)
"""A world for tests."""


def train_dictionary(
    name: str,
    key: Array,
    world: worlds.World,
    recipe: Recipe,
    *,
    directory: str | Path | None = None,
) -> tuple[Dictionary, Params]:
    """Train a dictionary on an endless stream of samples.

    The samples are drawn inside the compiled loop.

    Args:
      name: a key of :data:`PUBLISHED`.
      key: of the start and of the samples.
      world: to draw samples from.
      recipe: of the training.
      directory: of the run, see :func:`toyfeat.fit`; the same call goes on there.

    Returns:
      The dictionary and its parameters, for samples that are not normalized.
    """
    dictionary, trainer = _make_trainer(name, recipe)
    start, samples = jax.random.split(key)
    state = trainer.init(start, learning_rate=recipe.learning_rate)
    batches = Batches(partial(_draw_taps, recipe.batch), (samples, world))
    chunk = min(_CHUNK, recipe.steps)
    state = ft.fit(
        trainer, state, batches, steps=recipe.steps, chunk=chunk, directory=directory
    )
    return dictionary, ft.denormalized(dictionary, state)


def evaluation_batches(
    key: Array, world: worlds.World, num: int, batch: int
) -> Iterator[tuple[Array, Array]]:
    """Draw pairs of activations and planted codes.

    Args:
      key: random key.
      world: to draw from.
      num: samples in all, rounded up to whole batches.
      batch: samples per batch.

    Yields:
      Activations ``[batch, D]`` and codes ``[batch, F]``.
    """
    draw: Callable[..., Any] = jax.jit(worlds.world_batch, static_argnums=2)
    for index in range(-(-num // batch)):
        yield draw(jax.random.fold_in(key, index), world, batch)


def _draw_taps(batch: int, data: tuple[Array, worlds.World], step: Array) -> Taps:
    """Draw the batch of a step: activations without gradients, all of weight 1."""
    key, world = data
    acts = worlds.world_acts(jax.random.fold_in(key, step), world, batch)
    return Taps(acts, None, jnp.ones(batch, acts.dtype))


def _make_trainer(name: str, recipe: Recipe) -> tuple[Dictionary, ft.Trainer]:
    """Make a dictionary by name, and its trainer, which steers codes if it has no k."""
    sizes, control = (recipe.dim, recipe.latents), None
    if name == "batch_topk":
        dictionary = ft.dictionaries.batch_topk(*sizes, recipe.l0)
    elif name == "matryoshka":
        dictionary = ft.dictionaries.matryoshka(*sizes, recipe.l0, widths=recipe.widths)
    elif name in ("standard", "jump_relu"):
        control = ft.controllers.target_l0(float(recipe.l0))
        standard = name == "standard"
        dictionary = ft.dictionaries.standard(*sizes) if standard else jump_relu(*sizes)
    else:
        raise ValueError(f"synth_sae_bench: {name!r} is none of {[*PUBLISHED]}")
    objective = ft.losses.default(dictionary)
    trainer = ft.trainer(dictionary, objective, controller=control, center=False)
    return dictionary, trainer


def jump_relu(dim: int, latents: int) -> Dictionary:
    """Make a JumpReLU dictionary as ``benchmarks/peers/saelens_synthetic.py`` does.

    Decoder rows begin at norm .5: at .1 most latents stay under the threshold.

    Args:
      dim: width of the activations.
      latents: of the dictionary.

    Returns:
      The dictionary.
    """
    return ft.dictionaries.jump_relu(
        dim, latents, threshold=1.0, bandwidth=1.0, decoder_norm=0.5
    )
