"""Judge a decomposition: errors of the masked model, by kind of mask."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.metrics.partition import ALIVE, adversarial_error
from toyfeat.partition.decomposition import Decomposition
from toyfeat.partition.importance import Importance
from toyfeat.partition.sources import (
    Distance,
    draw_sources,
    loss_inputs,
    mean_squared_error,
    reconstruction_error,
)
from toyfeat.types import Array, Inputs, Params


def reconstructions(
    key: Array,
    decomposition: Decomposition,
    importance: Importance,
    target: Params,
    params: Params,
    inputs: Inputs,
    weights: Array | None = None,
    *,
    distance: Distance = mean_squared_error,
    steps: int = 20,
    step_size: float = 0.1,
) -> dict[str, Array]:
    """Measure how well the masked model reproduces the target.

    Args:
      key: of the random sources.
      decomposition: with the sites.
      importance: the family of importance functions.
      target: parameters of the model.
      params: ``"components"`` and ``"importance"``, as in ``state.params``.
      inputs: of the model.
      weights: ``[B]``, or ``None``.
      distance: between outputs, ``[B]``.
      steps: of the adversary.
      step_size: of the adversary.

    Returns:
      ``"unmasked"`` (all parts, no remainder), ``"stochastic"``, ``"ci_masked"``
      (importances as masks; never train on it), ``"rounded"`` (parts over .1 whole),
      ``"adversarial"`` (sources shared by all examples).  Only ``"stochastic"`` and
      ``"adversarial"`` have remainders.
    """
    first, second = jax.random.split(key)
    batch = loss_inputs(
        decomposition,
        importance,
        target,
        params,
        inputs,
        weights,
        key=first,
        progress=jnp.ones(()),
        distance=distance,
    )
    lower = batch.lower

    def masked(masks: dict[str, Array]) -> Array:
        own: Any = decomposition.masked(target, params["components"], inputs, masks)
        return batch.weights @ distance(own, batch.outputs)

    error = partial(reconstruction_error, batch)
    return {
        "unmasked": masked({n: jnp.ones_like(g) for n, g in lower.items()}),
        "stochastic": error(draw_sources(first, lower)),
        "ci_masked": masked(lower),
        "rounded": masked({n: (g > ALIVE).astype(g.dtype) for n, g in lower.items()}),
        "adversarial": adversarial_error(
            error,
            draw_sources(second, lower, shared=True),
            steps=steps,
            step_size=step_size,
        ),
    }
