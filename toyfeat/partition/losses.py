r"""Terms of the losses that decompositions are trained with.

``g`` are causal importances in [0, 1], squashed from below for masks and from above for
penalties; a mask is :math:`m = g + (1 - g) r` with a source :math:`r \in [0, 1]`, and a
remainder has the raw source as its mask.  Means over examples are weighted.

References:
  SPD: Bushnaq et al. (2025), arXiv 2506.20790.
  VPD: Goodfire (2026), "Interpreting language model parameters".
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_flag, check_int, check_number
from toyfeat.partition.decomposition import Components, Decomposition
from toyfeat.partition.sources import (
    LossInputs,
    Sources,
    ascend_sources,
    draw_routes,
    draw_sources,
    reconstruction_error,
)
from toyfeat.types import Array, Params

_EPS = 1e-12
"""Added to importances under a power, as published: their gradient is finite at 0."""


class Persistent(NamedTuple):
    """State that a term keeps from step to step.

    Attributes:
      init: ``(key, decomposition) -> state`` with an entry ``"sources"``.
      ascend: ``(inputs, state) -> state`` before the step.
      finish: ``(grads of the sources, state, progress) -> state`` after it.
    """

    init: Callable[[Array, Decomposition], dict[str, Any]]
    ascend: Callable[[LossInputs, dict[str, Any]], dict[str, Any]]
    finish: Callable[[Sources, dict[str, Any], Array], dict[str, Any]]


class Term(NamedTuple):
    """Summand of a loss.

    Attributes:
      name: of the term, of its coefficient in ``hyper`` and of its metric.
      loss: ``LossInputs -> []``.
      coefficient: the default.
      persistent: what it keeps from step to step, or ``None``.
    """

    name: str
    loss: Callable[[LossInputs], Array]
    coefficient: float = 1.0
    persistent: Persistent | None = None


def stochastic(
    coefficient: float = 1.0, *, samples: int = 1, delta: bool = True
) -> Term:
    """Make the error of the model with all sites masked at random.

    Args:
      coefficient: of the term.
      samples: draws of the sources.
      delta: whether remainders take part; without them their masks are 0.

    Returns:
      :class:`Term`.
    """
    check_int("stochastic", "samples", samples)
    check_flag("stochastic", "delta", delta)

    def loss(inputs: LossInputs) -> Array:
        errors = []
        for key in jax.random.split(inputs.key, samples):
            sources = draw_sources(key, inputs.lower)
            errors.append(reconstruction_error(inputs, sources, delta=delta))
        return jnp.mean(jnp.stack(errors))

    return _term("stochastic", loss, coefficient)


def layerwise(coefficient: float = 1.0, *, delta: bool = True) -> Term:
    """Make the error of the model with one site masked, mean over sites.

    Args:
      coefficient: of the term.
      delta: as in :func:`stochastic`.

    Returns:
      :class:`Term`.
    """
    check_flag("layerwise", "delta", delta)

    def loss(inputs: LossInputs) -> Array:
        sources = draw_sources(jax.random.fold_in(inputs.key, 1), inputs.lower)
        errors = [
            reconstruction_error(inputs, {name: source}, delta=delta)
            for name, source in sources.items()
        ]
        return jnp.mean(jnp.stack(errors))

    return _term("layerwise", loss, coefficient)


def subset(coefficient: float = 1.0, *, delta: bool = True) -> Term:
    """Make the error of the model with a random subset of sites masked per example.

    The size of a subset is uniform in 1 .. S.

    Args:
      coefficient: of the term.
      delta: as in :func:`stochastic`.

    Returns:
      :class:`Term`.
    """
    check_flag("subset", "delta", delta)

    def loss(inputs: LossInputs) -> Array:
        source_key, route_key = jax.random.split(jax.random.fold_in(inputs.key, 2))
        sources = draw_sources(source_key, inputs.lower)
        routes = draw_routes(route_key, len(inputs.weights), list(inputs.lower))
        return reconstruction_error(inputs, sources, routes, delta=delta)

    return _term("subset", loss, coefficient)


def pgd(
    coefficient: float = 1.0,
    *,
    steps: int = 1,
    step_size: float = 1.0,
    routed: bool = False,
    shared: bool = True,
) -> Term:
    """Make the error of the model with sources that an adversary chose.

    Args:
      coefficient: of the term.
      steps: of ascent by the sign of the gradient, from uniform sources.
      step_size: of each.
      routed: whether a random subset of sites is masked, as in :func:`subset`.
      shared: whether all examples have the same sources.

    Returns:
      :class:`Term`.
    """
    check_int("pgd", "steps", steps)
    check_number("pgd", "step_size", step_size, above=0)
    for name, flag in (("routed", routed), ("shared", shared)):
        check_flag("pgd", name, flag)

    def loss(inputs: LossInputs) -> Array:
        key, route_key = jax.random.split(jax.random.fold_in(inputs.key, 3))
        routes = None
        if routed:
            routes = draw_routes(route_key, len(inputs.weights), list(inputs.lower))
        sources = ascend_sources(
            inputs, key, steps=steps, step_size=step_size, shared=shared, routes=routes
        )
        return reconstruction_error(inputs, sources, routes)

    return _term("pgd", loss, coefficient)


def importance(
    coefficient: float, *, p: float = 1.0, p_end: float | None = None, beta: float = 0.0
) -> Term:
    r"""Make the penalty of importances, :math:`\sum_{s, c} E_b |g|^p`.

    Args:
      coefficient: of the term.
      p: power.
      p_end: power at the end of the training, reached along a line; ``None`` for ``p``.
      beta: weight of the frequency in it, see :func:`frequency`.

    Returns:
      :class:`Term`, a sum over sites, not a mean.
    """
    for name, value in (("p", p), ("p_end", p if p_end is None else p_end)):
        check_number("importance", name, value, above=0)
    check_number("importance", "beta", beta, least=0)

    def loss(inputs: LossInputs) -> Array:
        total = jnp.zeros(())
        for f, count in _power_means(inputs, p, p_end):
            total = total + jnp.sum(f)
            if beta:
                total = total + beta * jnp.sum(f * jnp.log2(1 + count * f))
        return total

    return _term("importance", loss, coefficient)


def frequency(
    coefficient: float, *, p: float = 1.0, p_end: float | None = None
) -> Term:
    r"""Make the penalty of components that matter often.

    :math:`\frac1n \sum_{s, c} S \log_2(1 + S)` with :math:`S = \sum_b |g|^p` over the
    ``n`` examples and positions of a batch.

    Args:
      coefficient: of the term.
      p: as in :func:`importance`.
      p_end: as in :func:`importance`.

    Returns:
      :class:`Term`.
    """
    for name, value in (("p", p), ("p_end", p if p_end is None else p_end)):
        check_number("frequency", name, value, above=0)

    def loss(inputs: LossInputs) -> Array:
        means = _power_means(inputs, p, p_end)
        terms = (jnp.sum(f * jnp.log2(1 + count * f)) for f, count in means)
        return sum(terms, jnp.zeros(()))

    return _term("frequency", loss, coefficient)


def smooth_l0(
    coefficient: float,
    *,
    gamma: float = 1.0,
    gamma_end: float = 0.01,
    frequency: float = 0.0,
    reference: float = 32768.0,
) -> Term:
    r"""Make the penalty :math:`\sum_{s, c} E_b\, g^2 / (g^2 + \gamma^2)`.

    Args:
      coefficient: of the term.
      gamma: importance that counts as half.
      gamma_end: the same at the end of training, reached along a line.
      frequency: weight of :math:`f \log_2(1 + R f)`, ``f`` the mean over examples.
      reference: ``R``, a number of examples that does not depend on the batch.

    Returns:
      :class:`Term`, named ``"importance"`` as the other penalty is.
    """
    for name, value in (("gamma", gamma), ("gamma_end", gamma_end)):
        check_number("smooth_l0", name, value, above=0)
    check_number("smooth_l0", "frequency", frequency, least=0)

    def loss(inputs: LossInputs) -> Array:
        size = gamma + inputs.progress * (gamma_end - gamma)
        total = jnp.zeros(())
        for upper in inputs.upper.values():
            f = _mean(inputs, upper**2 / (upper**2 + size**2))
            total = total + jnp.sum(f + frequency * f * jnp.log2(1 + reference * f))
        return total

    return _term("importance", loss, coefficient)


def faithfulness(coefficient: float = 1.0, *, relative: bool = False) -> Term:
    r"""Make the error of the weights, :math:`\frac1N \sum_s |W_s - V_s U_s|^2`.

    The remainders of all weights: with :func:`stochastic` and its ``delta`` they are
    learned away, and this term is left out; VPD has both.

    Args:
      coefficient: of the term.
      relative: whether it is the mean over weights of the error's share of the squares.

    Returns:
      :class:`Term`.
    """
    check_flag("faithfulness", "relative", relative)

    def loss(inputs: LossInputs) -> Array:
        return weight_error(
            inputs.decomposition, inputs.params, inputs.components, relative
        )

    return _term("faithfulness", loss, coefficient)


def weight_error(
    decomposition: Decomposition,
    params: Params,
    components: Components,
    relative: bool = False,
) -> Array:
    """Return the squared remainders per entry, or as a share of each weight."""
    matrices = decomposition.matrices(params)
    errors, sizes = [], []
    for path, matrix in matrices.items():
        parts = components[path]
        # TF32 would be as large an error as a good remainder.
        product = jnp.matmul(parts["V"], parts["U"], precision="highest")
        errors.append(jnp.sum((matrix - product) ** 2))
        sizes.append(jnp.sum(matrix**2) if relative else matrix.size)
    if relative:
        shares = [e / s for e, s in zip(errors, sizes, strict=True)]
        return jnp.mean(jnp.stack(shares))
    return jnp.sum(jnp.stack(errors)) / sum(sizes)


def _mean(inputs: LossInputs, values: Array) -> Array:
    """Average ``[B, ..., C]`` over examples and positions, ``[C]``."""
    values = jnp.mean(values, axis=tuple(range(1, values.ndim - 1)))
    return inputs.weights @ values


def _power_means(
    inputs: LossInputs, p: float, p_end: float | None
) -> list[tuple[Array, Array]]:
    """Return for each site the means of powers, ``[C]``, and what they are means of.

    That is a number of examples times positions.
    """
    power = p if p_end is None else p + inputs.progress * (p_end - p)
    return [
        (
            _mean(inputs, (upper + _EPS) ** power),
            inputs.count * math.prod(upper.shape[1:-1]),
        )
        for upper in inputs.upper.values()
    ]


def _term(name: str, loss: Callable[[LossInputs], Array], coefficient: float) -> Term:
    check_number(name, "coefficient", coefficient, least=0)
    return Term(name, loss, coefficient)
