"""What the methods of the leaderboard share: its rules, taps, training.

No method sees the truth, the number of features or how often they fire.  It chooses its
settings by these rules:

- gradients are those of half the squared output, the only scalar that every model
  has, or of random directions of the output where a method is named so; second moments
  use these, and :func:`toyfeat.discover.consensus` both;
- bases keep the directions that hold .99 of the spectrum;
- dictionaries have four latents per dimension, 16 at least and 512 at most, and ``k``
  is the least of 1, 2, 4, 8 with which a short TopK training leaves at most a tenth of
  the variance (8 if none does); a penalty is steered to that many codes, but the
  published four-term loss, which has no controller, keeps our default coefficient on
  activations and gradients in units of their size.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat.dictionary.tensors import latent_axes
from toyfeat.dictionary.types import Dictionary, Objective
from toyfeat.discover import ConsensusConfig
from toyfeat.discover.gradients import tap_subject
from toyfeat.train import normalization
from toyfeat.train.types import Trainer, TrainState
from toyfeat.types import Array, Basis, Features, Moments, Subject, Taps


class Budget(NamedTuple):
    """Limits on what a method may sample and train.

    Attributes:
      examples: inputs that are tapped.
      steps: of training.
      batch: examples per step.
    """

    examples: int = 20_000
    steps: int = 2000
    batch: int = 256


# The rules of the module's docstring, the same for all methods and tasks.
K_CANDIDATES = (1, 2, 4, 8)
ENERGY = 0.99  # share of the spectrum that a basis keeps
MAX_UNEXPLAINED = 0.1  # share of the variance that a TopK dictionary may leave
LATENTS_PER_DIM, MIN_LATENTS, MAX_LATENTS = 4, 16, 512
LEARNING_RATE = 3e-3  # between too slow and too fast (docs/research.md, section 8)
# Readouts per example where gradients are along random directions.
DIRECTIONS = 4


def consensus_config(budget: Budget) -> ConsensusConfig:
    """Settings of the consensus, which takes fewer steps with more rows than others.

    Each of its dictionaries sees no more rows than the budget has.
    """
    steps = min(ConsensusConfig().steps, budget.steps)
    batch_size = min(ConsensusConfig().batch_size, budget.steps * budget.batch // steps)
    return ConsensusConfig(
        examples=budget.examples, steps=steps, batch_size=max(1, batch_size)
    )


def tap_readout(key: Array, subject: Subject, budget: Budget, num: int = 0) -> Taps:
    """Tap gradients of half the squared output, or of ``num`` random directions."""
    input_key, readout_key = jax.random.split(key)
    readout = ft.readouts.half_squared_norm()
    if num:
        readout = ft.readouts.random_directions(readout_key, num, "gaussian")
    return tap_subject(subject, subject.sample(input_key, budget.examples), readout)


def second_moments(key: Array, subject: Subject, budget: Budget) -> Moments:
    """Accumulate second moments, with gradients along random directions."""
    taps = tap_readout(key, subject, budget, DIRECTIONS)
    stats = ft.moments(taps.acts.shape[1])
    return stats.finish(stats.update(stats.init(), taps))


def truncate_basis(basis: Basis) -> Features:
    """Keep the leading directions, which hold :data:`ENERGY` of the spectrum."""
    share = np.cumsum(np.asarray(basis.spectrum)) / float(basis.diagnostics.total)
    num = min(int(np.searchsorted(share, ENERGY)) + 1, int(basis.diagnostics.rank))
    return Features(basis.readers.T[:num], basis.writers[:num])


def num_latents(width: int) -> int:
    """Latents of a dictionary of so many dimensions."""
    return int(np.clip(LATENTS_PER_DIM * width, MIN_LATENTS, MAX_LATENTS))


def train_dictionary(
    key: Array,
    dictionary: Dictionary,
    objective: Objective,
    taps: Taps,
    budget: Budget,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Train a dictionary, and leave out the latents that never fire.

    Args:
      key: random key.
      dictionary: what to train.
      objective: its loss.
      taps: what to train on.
      budget: steps and batch.
      options: of :func:`toyfeat.trainer`.

    Returns:
      The parameters, with an entry, row or column per latent that fires.
    """
    init_key, order_key = jax.random.split(key)
    trainer = ft.trainer(dictionary, objective, warm_up=budget.steps // 10, **options)
    state = trainer.init(init_key, learning_rate=LEARNING_RATE)
    seed = int(jax.random.randint(order_key, (), 0, 2**31 - 1))
    state = fit_quietly(trainer, state, taps, budget, seed=seed)
    # Encode some of the examples, in the units of the training.
    scales = normalization(state)
    acts = taps.acts[:5000] / scales.acts
    extra = {}
    if dictionary.architecture.reads_gradients:
        if taps.grads is None:
            raise ValueError("train_dictionary: wanted taps with gradients, got none")
        extra["grads"] = taps.grads[:5000] / scales.grads[None, :, None]
    codes = dictionary.encode(state.params, acts, **extra)
    alive = np.asarray(jnp.any(codes != 0, axis=0))
    params = {name: np.asarray(x) for name, x in state.params.items()}
    axes = latent_axes(dictionary.architecture)
    return {
        name: x if axes[name] is None else np.compress(alive, x, axes[name])
        for name, x in params.items()
    }


def fit_quietly(
    trainer: Trainer, state: TrainState, taps: Taps, budget: Budget, *, seed: int = 0
) -> TrainState:
    """Train for the budget's steps, without a bar and without a check of the data."""
    batches = ft.data.array_batches(
        taps, batch=min(budget.batch, len(taps.acts)), seed=seed
    )
    quiet: dict[str, Any] = {"progress": False, "check_data": False}
    return ft.fit(trainer, state, batches, steps=budget.steps, **quiet)


def rows_as_taps(rows: Array) -> Taps:
    """Wrap rows, such as gradients, as activations that a dictionary is trained on."""
    return Taps(rows, None, jnp.ones(len(rows)))


_CHOSEN_K: dict[Any, int] = {}


def choose_k(key: Array, rows: Array, budget: Budget, *, signed: bool = False) -> int:
    """Codes per example by the rule of the module, computed once for the same rows.

    So the seconds of the first dictionary of a task include those of the rule.
    """
    words = np.asarray(jax.random.key_data(key)).tobytes()
    question = (words, zlib.crc32(np.asarray(rows).data), rows.shape, budget, signed)
    if question not in _CHOSEN_K:
        _CHOSEN_K[question] = _smallest_k(key, rows, budget, signed)
    return _CHOSEN_K[question]


def _smallest_k(key: Array, rows: Array, budget: Budget, signed: bool) -> int:
    """Train a TopK dictionary of every candidate; the least ``k`` that explains."""
    latents = num_latents(rows.shape[1])
    sae = ft.dictionaries.topk(rows.shape[1], latents, max(K_CANDIDATES), signed=signed)
    population = ft.population(ft.trainer(sae, ft.losses.default(sae)))
    settings = ft.sweeps.grid(k=K_CANDIDATES, learning_rate=LEARNING_RATE)
    settings["keys"] = jax.random.split(key, len(K_CANDIDATES))
    taps = rows_as_taps(rows)
    steps = max(200, budget.steps // 4)  # a short training tells them apart
    unexplained: list[np.ndarray] = []
    ft.fit(
        population,
        population.init(**settings),
        ft.data.array_batches(taps, batch=min(budget.batch, len(rows)), seed=0),
        steps=steps,
        chunk=max(1, steps // 4),
        progress=False,
        check_data=False,
        on_chunk=lambda _, metrics: unexplained.append(metrics["fvu"]),
    )
    enough = [
        k
        for k, fvu in zip(K_CANDIDATES, unexplained[-1], strict=True)
        if fvu <= MAX_UNEXPLAINED
    ]
    return min(enough, default=max(K_CANDIDATES))
