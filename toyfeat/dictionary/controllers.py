r"""Controllers of coefficients: a target in, a factor of the coefficient out.

With :math:`e_t` the logarithm of the measured metric, averaged, less that of the
target, the logarithm of the factor changes by

.. math:: k_i \tanh(e_t) + k_p \, (e_t - e_{t - 1})

in every step: a PI controller that starts without a jump.  The two parts balance where
the metric approaches its target at a pace of :math:`k_i / k_p` a step, so that the
factor does not run away from a count that follows slowly, such as that of learned
thresholds.  The default gains are for thousands of steps; ``integral=0.015`` suits
1000.  docs/decisions/dictionary.md, "Controllers are PI, in velocity form", tells how
they were chosen.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.checks import check_number
from toyfeat.types import Array

GAINS = {
    "integral": 0.005,
    "proportional": 3.0,
    "memory": 20.0,
    "limit": 1e4,
    "start": 1.0,
}
"""Defaults of the gains; docs/decisions/dictionary.md, "Controllers are PI, in velocity
form"."""

_LEAST_GAINS = {
    "integral": 0.0,
    "proportional": 0.0,
    "memory": 1.0,
    "limit": 1.0,
    "start": 0.0,
}

_ERROR_GAINS = {"proportional": 0.0, "start": 0.01}  # of target_error

_LEAST_MEASURED = 1e-3
"""Share of the target that a metric counts as at least, so that its log is finite."""


class Controller(NamedTuple):
    """Controller of the coefficient of one term; pure, without branches.

    Attributes:
      term: whose coefficient it multiplies.
      measures: the metric that it reads: ``"l0"``, ``"attribution_l0"``, ``"fvu"``, or
        the name of a term.
      target: the default of ``hyper["target"]``.
      init: ``() -> state``.
      update: ``(state, measured, target) -> (state, factor, saturated)``; the
        coefficient is its default times ``factor``, and ``saturated`` is true where
        the factor is at a limit.
      start: factor of the first step.
    """

    term: str
    measures: str
    target: float
    init: Callable[[], Any]
    update: Callable[[Any, Array, Array], tuple[Any, Array, Array]]
    start: float = 1.0


class ControllerState(NamedTuple):
    """State of a controller.

    Attributes:
      log_factor: ``[]``, the logarithm of the factor.
      smooth: ``[]``, the logarithm of the measured metric, averaged.
      weight: ``[]``, the weight of that average.
    """

    log_factor: Array
    smooth: Array
    weight: Array


def target_l0(target: float, *, term: str = "sparsity", **gains: float) -> Controller:
    """Control the number of codes per example.

    Args:
      target: codes per example, mean over a batch; a default that
        ``init(key, target=)`` overrides.
      term: whose coefficient is controlled.
      gains: ``integral`` (change of the log factor per step and unit of log
        error), ``proportional`` (per unit of change of the log error), ``memory``
        (of the average, in steps), ``limit`` (of the factor, either way) and
        ``start`` (the factor of the first step).

    Returns:
      :class:`Controller`.

    Raises:
      ValueError: if the target is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> control = target_l0(8.0)
      >>> state, factor, saturated = control.update(
      ...     control.init(), jnp.asarray(32.0), jnp.asarray(8.0)
      ... )
      >>> bool(factor > 1), bool(saturated)  # too many codes: a larger coefficient
      (True, False)
    """
    return _controller(term, "l0", target, 1.0, gains)


def target_attribution_l0(
    target: float, *, term: str = "attribution_sparsity", **gains: float
) -> Controller:
    """Control the number of latents that account for the first-order effect.

    Args:
      target: latents per example and readout, see
        :func:`toyfeat.metrics.attribution_l0`.
      term: as in :func:`target_l0`.
      gains: as in :func:`target_l0`.

    Returns:
      :class:`Controller`.

    Raises:
      ValueError: if the target is not positive.
    """
    return _controller(term, "attribution_l0", target, 1.0, gains)


def target_fvu(target: float, *, term: str = "sparsity", **gains: float) -> Controller:
    """Control the reconstruction error: as much of a penalty as it allows.

    Args:
      target: share of the variance that is not explained; a default that
        ``init(key, target=)`` overrides.
      term: as in :func:`target_l0`.
      gains: as in :func:`target_l0`.

    Returns:
      :class:`Controller`.

    Raises:
      ValueError: if the target is not positive.

    References:
      Rezende and Viola (2018), "Taming VAEs" (GECO), dual ascent.
    """
    return _controller(term, "fvu", target, -1.0, gains)


def target_error(
    target: float, *, measures: str, term: str, **gains: float
) -> Controller:
    """Control an error, by its name: as much of a penalty as it allows.

    While the error is over the target the penalty falls, so that a model is first
    fitted and then made sparse, whatever its coefficient.

    Args:
      target: the error, in its own units; a default that ``init(key, target=)``
        overrides.
      measures: metric of the trainer that a larger penalty raises, such as the value
        of a term: ``"stochastic"`` of a partition.
      term: whose coefficient is controlled, ``"importance"`` of a partition.
      gains: as in :func:`target_l0`; by default ``proportional=0``, since an error
        falls anyway while a model is fitted, and ``start=0.01``.

    Returns:
      :class:`Controller`.

    Raises:
      ValueError: if the target is not positive, or the metric is the penalty itself
        or a number of codes, which a penalty lowers.
      TypeError: if a name is no string.

    Example:
      >>> control = target_error(2e-4, measures="stochastic", term="importance")
      >>> control.measures, control.target
      ('stochastic', 0.0002)

    References:
      Rezende and Viola (2018), "Taming VAEs" (GECO).
    """
    if not isinstance(measures, str):
        raise TypeError(
            f"controller: measures must be the name of a metric, got {measures!r}; "
            "such as 'stochastic'"
        )
    if measures in (term, "l0", "attribution_l0"):
        raise ValueError(
            f"controller: measures must be an error, which a penalty raises, got "
            f"{measures!r}, which it lowers; use target_l0 for a number of codes"
        )
    return _controller(term, measures, target, -1.0, _ERROR_GAINS | gains)


def _controller(
    term: str, measures: str, target: float, sign: float, gains: dict[str, float]
) -> Controller:
    """Make a controller; ``sign`` is -1 where a larger factor raises the metric."""
    gains = _check_settings(term, target, gains)
    decay, limit = 1 - 1 / gains["memory"], math.log(gains["limit"])
    start = math.log(gains["start"])

    def init() -> ControllerState:
        return ControllerState(jnp.full((), start), jnp.zeros(()), jnp.zeros(()))

    def update(
        state: ControllerState, measured: Array, target: Array
    ) -> tuple[ControllerState, Array, Array]:
        # Average the logarithm of the metric over the last steps.
        tiny = jnp.finfo(measured.dtype).tiny
        now = jnp.log(jnp.maximum(measured, _LEAST_MEASURED * target) + tiny)
        # Dividing by the summed weights makes the early averages unbiased, as in Adam.
        smooth = decay * state.smooth + (1 - decay) * now
        weight = decay * state.weight + (1 - decay)
        level, begun = smooth / weight, state.weight > 0
        # The level a step ago; at the first step there was none, and no change.
        before = state.smooth / jnp.where(begun, state.weight, 1)
        before = jnp.where(begun, before, level)
        # Move the factor by the error and by its change, within the limit.
        error = sign * (level - jnp.log(target))
        change = gains["proportional"] * sign * (level - before)
        factor = state.log_factor + gains["integral"] * jnp.tanh(error) + change
        # Clipping the integrated factor itself leaves nothing to unwind at a limit.
        factor = jnp.clip(factor, -limit, limit)
        state = ControllerState(factor, smooth, weight)
        return state, jnp.exp(factor), jnp.abs(factor) >= limit

    return Controller(term, measures, target, init, update, gains["start"])


def _check_settings(
    term: str, target: float, gains: dict[str, float]
) -> dict[str, float]:
    """Check what a controller is made of; return all gains."""
    if unknown := set(gains) - set(GAINS):
        raise ValueError(
            f"controller: unknown gains {sorted(unknown)}; known are {sorted(GAINS)}"
        )
    if not isinstance(term, str):
        raise TypeError(
            f"controller: term must be the name of a term, got {term!r}; such as "
            "'sparsity'"
        )
    check_number("controller", "target", target, above=0)
    gains = GAINS | gains
    for name, least in _LEAST_GAINS.items():
        check_number("controller", name, gains[name], least=least)
    if not 1 / gains["limit"] <= gains["start"] <= gains["limit"]:
        raise ValueError(
            f"controller: start must be within the limit, {1 / gains['limit']:g} to "
            f"{gains['limit']:g}, got {gains['start']:g}; give another start or limit"
        )
    return gains
