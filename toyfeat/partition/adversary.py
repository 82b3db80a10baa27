"""An adversary that remembers: sources that are kept from step to step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_int, check_number
from toyfeat.partition.decomposition import Decomposition
from toyfeat.partition.losses import Persistent, Term
from toyfeat.partition.sources import LossInputs, Sources, reconstruction_error
from toyfeat.types import Array

_EPS = 1e-8
"""Of Adam, as published."""


class _Ascent(NamedTuple):
    """Arguments of :func:`persistent_pgd`, by the same names."""

    batch: int
    positions: tuple[int, ...]
    ascents: int
    learning_rate: float
    ramp: float
    decay: tuple[float, float]


def persistent_pgd(
    coefficient: float = 1.0,
    *,
    batch: int,
    positions: tuple[int, ...] = (),
    ascents: int = 2,
    learning_rate: float = 0.01,
    ramp: float = 0.025,
    decay: tuple[float, float] = (0.5, 0.99),
) -> Term:
    """Make the error under sources that Adam raises from step to step.

    Every place in the batch (and position, and component) has a source of its own.  It
    ascends ``ascents`` times before a step, and once more by the gradient of the step.

    Args:
      coefficient: of the term.
      batch: examples of a batch, which must not change.
      positions: sizes of the axes between examples and components.
      ascents: before each step.
      learning_rate: of the ascent.
      ramp: share of the training in which that rate grows from 0.
      decay: of Adam's two averages.

    Returns:
      :class:`toyfeat.partition.losses.Term`.

    References:
      Goodfire (2026), VPD: decays .5 and .99, rate .01 after a ramp of 2.5 %, two
      ascents before the step and one fused with it.
    """
    check_int("persistent_pgd", "batch", batch)
    check_int("persistent_pgd", "ascents", ascents, least=0)
    check_number("persistent_pgd", "learning_rate", learning_rate, above=0)
    check_number("persistent_pgd", "ramp", ramp, least=0, most=1)

    check_number("persistent_pgd", "coefficient", coefficient, least=0)
    ascent = _Ascent(batch, tuple(positions), ascents, learning_rate, ramp, decay)
    persistent = Persistent(
        init=partial(_init, ascent),
        ascend=partial(_ascend, ascent),
        finish=partial(_finish, ascent),
    )
    return Term("persistent_pgd", _loss, coefficient, persistent)


def _init(ascent: _Ascent, key: Array, decomposition: Decomposition) -> dict[str, Any]:
    """Draw uniform sources, and start Adam."""
    sources = {
        site.name: jax.random.uniform(
            jax.random.fold_in(key, i),
            (ascent.batch, *ascent.positions, site.components + 1),
        )
        for i, site in enumerate(decomposition.sites)
    }
    zeros = jax.tree.map(jnp.zeros_like, sources)
    moments = {"first": zeros, "second": zeros, "count": jnp.zeros(())}
    return {"sources": sources, **moments}


def _finish(
    ascent: _Ascent, grads: Sources, state: dict[str, Any], progress: Array
) -> dict[str, Any]:
    """Do one step of Adam, upwards, and back into [0, 1]."""
    count = state["count"] + 1
    ramp = jnp.minimum(progress / ascent.ramp, 1) if ascent.ramp else 1
    slow, slower = ascent.decay
    first = jax.tree.map(lambda m, g: slow * m + (1 - slow) * g, state["first"], grads)
    second = jax.tree.map(
        lambda m, g: slower * m + (1 - slower) * g**2, state["second"], grads
    )

    def move(source: Array, mean: Array, square: Array) -> Array:
        size = jnp.sqrt(square / (1 - slower**count)) + _EPS
        change = mean / (1 - slow**count) / size
        return jnp.clip(source + ascent.learning_rate * ramp * change, 0, 1)

    sources = jax.tree.map(move, state["sources"], first, second)
    return {"sources": sources, "first": first, "second": second, "count": count}


def _ascend(
    ascent: _Ascent, inputs: LossInputs, state: dict[str, Any]
) -> dict[str, Any]:
    """Ascend before a step, against parameters that are held."""
    slope = jax.grad(lambda sources: reconstruction_error(inputs, sources))
    for _ in range(ascent.ascents):
        state = _finish(ascent, slope(state["sources"]), state, inputs.progress)
    return state


def _loss(inputs: LossInputs) -> Array:
    return reconstruction_error(inputs, inputs.sources["persistent_pgd"])
