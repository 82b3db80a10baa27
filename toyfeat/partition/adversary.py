"""An adversary that remembers: sources that are kept from step to step."""

from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_int, check_number
from toyfeat.partition.decomposition import Decomposition
from toyfeat.partition.losses import Persistent, Term
from toyfeat.partition.sources import LossInputs, Sources, reconstruction_error
from toyfeat.types import Array

_EPS = 1e-8
"""Of Adam, as published."""


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

    def init(key: Array, decomposition: Decomposition) -> dict[str, Any]:
        sources = {
            site.name: jax.random.uniform(
                jax.random.fold_in(key, i), (batch, *positions, site.components + 1)
            )
            for i, site in enumerate(decomposition.sites)
        }
        zeros = jax.tree.map(jnp.zeros_like, sources)
        moments = {"first": zeros, "second": zeros, "count": jnp.zeros(())}
        return {"sources": sources, **moments}

    def finish(
        grads: Sources, state: dict[str, Any], progress: Array
    ) -> dict[str, Any]:
        # Adam, upwards, and back into [0, 1].
        count = state["count"] + 1
        rate = learning_rate * (jnp.minimum(progress / ramp, 1) if ramp else 1)
        means = []
        for name, power, beta in (("first", 1, decay[0]), ("second", 2, decay[1])):
            means.append(
                jax.tree.map(
                    lambda m, g, b=beta, k=power: b * m + (1 - b) * g**k,
                    state[name],
                    grads,
                )
            )
        scales = [1 - beta**count for beta in decay]
        sources = jax.tree.map(
            lambda r, m, v: jnp.clip(
                r + rate * (m / scales[0]) / (jnp.sqrt(v / scales[1]) + _EPS), 0, 1
            ),
            state["sources"],
            *means,
        )
        moments = {"first": means[0], "second": means[1], "count": count}
        return {"sources": sources, **moments}

    def ascend(inputs: LossInputs, state: dict[str, Any]) -> dict[str, Any]:
        slope = jax.grad(lambda sources: reconstruction_error(inputs, sources))
        for _ in range(ascents):
            state = finish(slope(state["sources"]), state, inputs.progress)
        return state

    def loss(inputs: LossInputs) -> Array:
        return reconstruction_error(inputs, inputs.sources["persistent_pgd"])

    check_number("persistent_pgd", "coefficient", coefficient, least=0)
    persistent = Persistent(init, ascend, finish)
    return Term("persistent_pgd", loss, coefficient, persistent)
