"""Toy models of superposition: sparse inputs through a narrow layer and out again.

References:
  Elhage et al. (2022), "Toy models of superposition".
  Braun et al. (2025), APD, arXiv 2501.14926, section 3, for the hidden identity.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from toyfeat.loops import train
from toyfeat.models.planted.heads import check_ints, dot, sparse_uniform, unit
from toyfeat.models.planted.targets import unexplained_variance, untapped
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_function
from toyfeat.types import Array, Params

# Inputs behind the fit: its standard error is 1 / sqrt(50,000), half a percent.
_EXAMPLES = 50_000
# Decay of weights in published trainings, torch's default.
_DECAY = 0.01

_LIMITS = (
    "A feature that the training gave up has a row near 0, whose direction means "
    "nothing."
)


def superposition(
    key: Array,
    *,
    features: int = 5,
    hidden: int = 2,
    identity: bool = False,
    probability: float = 0.05,
    steps: int = 4000,
    batch: int = 1024,
    learning_rate: float = 5e-3,
    published: bool = False,
) -> Task:
    """Plant sparse inputs in a narrow layer, which the same weights read again.

    ``ReLU(W^T W x + b)``; an input's writer is its output's reader.

    Args:
      key: random key of the task.
      features: ``F`` inputs and outputs.
      hidden: width ``D`` of the narrow layer.
      identity: whether an identity matrix stands after the narrow layer; the site is
        before it.
      probability: of an input not to be 0; it is U[0, 1] then.
      steps: of Adam, whose rate falls to 0 along a cosine.
      batch: inputs per step.
      learning_rate: of the first step.
      published: whether training is that of the papers on parameters, AdamW at a
        constant rate from short uniform weights, for 10,000 steps there.

    Returns:
      :class:`toyfeat.models.planted.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    _check(features, hidden, probability, steps, batch)
    params, fit = _train_superposition(
        features, hidden, probability, steps, batch, learning_rate, published, key
    )
    if not jnp.isfinite(fit):
        raise ValueError(
            f"superposition: the fit is {fit}, wanted a larger probability, got "
            f"{probability}"
        )
    # The hidden layer is passed on, too, so that all of it is read.
    if identity:
        params["identity"] = jnp.eye(hidden)
    rows = params["weight"]
    return Task(
        probed=_SUPERPOSITION,
        params=params,
        sample=partial(_sparse_inputs, features, probability),
        site="hidden",
        truth=Truth(
            readers=rows, writers=rows, frequency=jnp.full(features, probability)
        ),
        side="readers",
        name=f"superposition {features}-{hidden}" + identity * " with identity",
        features=_inputs_themselves,
        fit=float(fit),
        ignored=None,
        about=f"{features} sparse inputs in {hidden} dimensions and back.",
        limits=_LIMITS,
    )


def _check(
    features: int, hidden: int, probability: float, steps: int, batch: int
) -> None:
    """Raise for sizes that do not fit."""
    check_ints(
        "superposition", features=features, hidden=hidden, steps=steps, batch=batch
    )
    if min(features, hidden, steps, batch) < 1 or not 0 < probability <= 1:
        raise ValueError(
            "superposition: sizes must be at least 1, the probability in (0, 1], got "
            f"features {features}, hidden {hidden}, steps {steps}, batch {batch}, "
            f"probability {probability}"
        )


def _inputs_themselves(params: Params, x: Array) -> Array:
    del params
    return x


def _superposed(params: Params, x: Array, tap: Callable[[str, Array], Array]) -> Array:
    hidden = tap("hidden", dot(x, params["weight"]))
    if "identity" in params:
        hidden = tap("after", dot(hidden, params["identity"]))
    return jax.nn.relu(dot(hidden, params["weight"].T) + params["bias"][None, :])


_SUPERPOSITION = from_function(_superposed)


def _sparse_inputs(features: int, probability: float, key: Array, num: int) -> Array:
    return sparse_uniform(key, (num, features), probability)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _train_superposition(
    features: int,
    hidden: int,
    probability: float,
    steps: int,
    batch: int,
    learning_rate: float,
    published: bool,
    key: Array,
) -> tuple[Params, Array]:
    """Train one network; parameters and the share of the variance that they leave."""
    init_key, data_key = jax.random.split(key)
    if published:  # torch's default for the layer that writes, of fan-in F
        weight = jax.random.uniform(init_key, (features, hidden), minval=-1, maxval=1)
        weight = weight / features**0.5
        optimizer = optax.adamw(learning_rate, weight_decay=_DECAY)
    else:
        weight = unit(jax.random.normal(init_key, (features, hidden)))
        optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    params = {"weight": weight, "bias": jnp.zeros(features)}

    # Squared error per example, summed over the outputs.
    def loss(params: Params, x: Array) -> Array:
        return jnp.sum((_superposed(params, x, untapped) - x) ** 2) / len(x)

    def draw(step: Array | int, num: int) -> Array:
        key = jax.random.fold_in(data_key, step)
        return _sparse_inputs(features, probability, key, num)

    # Train on fresh inputs, then measure on inputs that training did not see.
    params = train(
        loss, params, lambda step: draw(step, batch), steps=steps, optimizer=optimizer
    ).params
    x = draw(steps, _EXAMPLES)
    return params, unexplained_variance(loss(params, x) * len(x), x)
