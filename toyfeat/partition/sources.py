r"""Masked reconstructions: sources of masks, at random or by an adversary.

A mask is :math:`m = g + (1 - g) r` with a source :math:`r \in [0, 1]`; a remainder has
the raw source as its mask.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.metrics.partition import ascend
from toyfeat.partition.decomposition import Components, Decomposition
from toyfeat.partition.importance import Importance, importances
from toyfeat.types import Array, Inputs, Outputs, Params

Distance = Callable[[Outputs, Outputs], Array]
"""``(masked, target) -> [B]``."""

Sources = dict[str, Array]
"""Site to ``[B or 1, ..., C + 1]``; the last entry is that of the remainder."""


_LEAST = 1e-30
"""Keeps a quotient finite where all weights of a batch are 0."""


class LossInputs(NamedTuple):
    """Arguments of a loss.

    Attributes:
      decomposition: that is trained.
      params: of the target.
      components: parts of the weights.
      inputs: a batch for the model.
      weights: ``[B]``, summing to 1.
      count: ``[]``, examples that the batch stands for.
      outputs: of the target.
      lower: site to importances for masks, ``[B, ..., C]``.
      upper: site to importances for penalties.
      key: random key of the step.
      progress: ``[]``, share of the training that is done.
      distance: between outputs.
      sources: of terms that keep them from step to step, by the term's name.
    """

    decomposition: Decomposition
    params: Params
    components: Components
    inputs: Inputs
    weights: Array
    count: Array
    outputs: Outputs
    lower: dict[str, Array]
    upper: dict[str, Array]
    key: Array
    progress: Array
    distance: Distance
    sources: dict[str, Sources]


def loss_inputs(
    decomposition: Decomposition,
    importance: Importance,
    target: Params,
    params: Params,
    inputs: Inputs,
    weights: Array | None,
    *,
    key: Array,
    progress: Array,
    distance: Distance,
) -> LossInputs:
    """Run the target and the importance function on a batch.

    Args:
      decomposition: with the sites.
      importance: the family of importance functions.
      target: parameters of the model.
      params: ``"components"`` and ``"importance"``.
      inputs: of the model.
      weights: ``[B]``, not normalized; ``None`` for ones.
      key: of what a loss draws.
      progress: ``[]``, share of the training that is done.
      distance: between outputs.

    Returns:
      :class:`LossInputs` without sources that were kept.
    """
    outputs, lower, upper = importances(
        decomposition, importance, target, params, inputs
    )
    if weights is None:
        weights = jnp.ones(len(jax.tree.leaves(inputs)[0]))
    count = jnp.sum(weights)
    return LossInputs(
        decomposition=decomposition,
        params=target,
        components=params["components"],
        inputs=inputs,
        weights=weights / jnp.maximum(count, _LEAST),
        count=count,
        outputs=outputs,
        lower=lower,
        upper=upper,
        key=key,
        progress=progress,
        distance=distance,
        sources={},
    )


def mean_squared_error(masked: Outputs, target: Outputs) -> Array:
    """Return the mean squared difference of each example, ``[B]``."""
    return jnp.mean((masked - target) ** 2, axis=tuple(range(1, target.ndim)))


def kl_divergence(masked: Outputs, target: Outputs) -> Array:
    """Return ``KL(target || masked)`` of logits, mean over positions, ``[B]``."""
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(masked)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.mean(divergence, axis=tuple(range(1, divergence.ndim)))


def reconstruction_error(
    inputs: LossInputs,
    sources: Sources,
    routes: dict[str, Array] | None = None,
    *,
    delta: bool = True,
) -> Array:
    """Return the distance to the target of the model masked by sources, ``[]``.

    Args:
      inputs: of a loss.
      sources: of the sites that are masked.
      routes: site to ``[B]`` bool, where it is masked; ``None`` for all.
      delta: whether the remainders take part.
    """
    masks, deltas = {}, {}
    for name, source in sources.items():
        low = inputs.lower[name]
        masks[name] = low + (1 - low) * source[..., :-1]
        deltas[name] = source[..., -1] if delta else jnp.zeros_like(source[..., -1])
        if routes is not None:  # elsewhere the site is the target's own
            route = routes[name].reshape(-1, *(1,) * (low.ndim - 1))
            masks[name] = jnp.where(route, masks[name], 1)
            deltas[name] = jnp.where(route[..., 0], deltas[name], 1)
    outputs = inputs.decomposition.masked(
        inputs.params, inputs.components, inputs.inputs, masks, deltas
    )
    return inputs.weights @ inputs.distance(outputs, inputs.outputs)


def ascend_sources(
    inputs: LossInputs,
    key: Array,
    *,
    steps: int,
    step_size: float,
    shared: bool = True,
    routes: dict[str, Array] | None = None,
) -> Sources:
    """Choose sources that raise the error, by the sign of its gradient.

    Returns:
      Sources, constants.
    """
    fixed = jax.lax.stop_gradient(inputs._replace(decomposition=None, distance=None))
    fixed = fixed._replace(decomposition=inputs.decomposition, distance=inputs.distance)
    sources = draw_sources(key, fixed.lower, shared=shared)
    chosen = ascend(
        lambda s: reconstruction_error(fixed, s, routes),
        sources,
        steps=steps,
        step_size=step_size,
    )
    return jax.lax.stop_gradient(chosen)


def draw_routes(key: Array, batch: int, sites: list[str]) -> dict[str, Array]:
    """Draw a uniform size in 1 .. S and a subset of that size for each example."""
    size_key, order_key = jax.random.split(key)
    size = jax.random.randint(size_key, (batch,), 1, len(sites) + 1)
    scores = jax.random.uniform(order_key, (len(sites), batch))
    rank = jnp.sum(scores[None] < scores[:, None], axis=1)  # place of each site
    return {name: rank[i] < size for i, name in enumerate(sites)}


def draw_sources(
    key: Array, lower: dict[str, Array], *, shared: bool = False
) -> Sources:
    """Draw sources of all sites, ``[B, ..., C + 1]``, or one for all examples."""
    sources = {}
    for i, (name, low) in enumerate(lower.items()):
        lead = (1,) * (low.ndim - 1) if shared else low.shape[:-1]
        shape = (*lead, low.shape[-1] + 1)
        sources[name] = jax.random.uniform(jax.random.fold_in(key, i), shape, low.dtype)
    return sources
