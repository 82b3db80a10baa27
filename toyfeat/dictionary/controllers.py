r"""Coefficients that find their own value: a target in, a factor out.

With :math:`e_t` the logarithm of what is measured, averaged, less that of the target,
the logarithm of the factor changes by

.. math:: k_i \tanh(e_t) + k_p \, (e_t - e_{t - 1})

in every step: a PI controller that starts without a jump.  The two balance where the
measured comes nearer at a pace of :math:`k_i / k_p` a step, so that the factor does
not run away from a count that follows slowly, such as that of learned thresholds.  The
defaults, one in 600 steps, are for thousands of steps; ``integral=0.015`` suits 1000.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from toyfeat.types import Array, Controller

_LIMIT = 1e4  # how far the factor may move from 1, either way


class Steering(NamedTuple):
    """State of a controller.

    Attributes:
      log_factor: ``[]``, the logarithm of the factor.
      smooth: ``[]``, the logarithm of what is measured, averaged.
      seen: ``[]``, the weight of that average.
    """

    log_factor: Array
    smooth: Array
    seen: Array


def target_l0(target: float, *, term: str = "sparsity", **gains: float) -> Controller:
    """Steer to so many codes per example.

    Args:
      target: codes per example, mean over a batch; a default that
        ``init(key, target=)`` overrides.
      term: whose coefficient is steered.
      gains: ``integral`` (change of the log factor per step and unit of log
        error), ``proportional`` (per unit of change of the log error), ``memory``
        (of the average, in steps) and ``limit``.

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
    """Steer to so many latents that account for the first-order effect.

    Args:
      target: latents per example and readout, see :func:`attribution_l0`.
      term: as in :func:`target_l0`.
      gains: as in :func:`target_l0`.

    Returns:
      :class:`Controller`.

    Raises:
      ValueError: if the target is not positive.
    """
    return _controller(term, "attribution_l0", target, 1.0, gains)


def reconstruction_budget(
    fvu: float, *, term: str = "sparsity", **gains: float
) -> Controller:
    """As much of a penalty as a reconstruction error allows: dual ascent.

    Args:
      fvu: the share of the variance that may stay unexplained.
      term: as in :func:`target_l0`.
      gains: as in :func:`target_l0`.

    Returns:
      :class:`Controller`.

    Raises:
      ValueError: if the budget is not positive.

    References:
      Rezende and Viola (2018), "Taming VAEs" (GECO).
    """
    return _controller(term, "fvu", fvu, -1.0, gains)


def _controller(
    term: str,
    measures: str,
    target: float,
    sign: float,
    gains: dict[str, float],
) -> Controller:
    known = {"integral": 0.005, "proportional": 3.0, "memory": 20.0, "limit": _LIMIT}
    if extra := set(gains) - set(known):
        raise ValueError(
            f"controller: unknown gains {sorted(extra)}; known are {sorted(known)}"
        )
    if not target > 0:
        raise ValueError(f"controller: the target must be positive, got {target}")
    gains = known | gains
    least = {"integral": 0.0, "proportional": 0.0, "memory": 1.0, "limit": 1.0}
    for name, low in least.items():
        if not low <= gains[name] < math.inf:
            raise ValueError(
                f"controller: {name} must be finite and at least {low:g}, got "
                f"{gains[name]}"
            )
    keep, most = 1 - 1 / gains["memory"], jnp.log(gains["limit"])

    def init() -> Steering:
        return Steering(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    def update(
        state: Steering, measured: Array, target: Array
    ) -> tuple[Steering, Array, Array]:
        tiny = jnp.finfo(measured.dtype).tiny
        now = jnp.log(jnp.maximum(measured, 1e-3 * target) + tiny)
        smooth = keep * state.smooth + (1 - keep) * now
        seen = keep * state.seen + (1 - keep)
        level, known = smooth / seen, state.seen > 0
        before = jnp.where(known, state.smooth / jnp.where(known, state.seen, 1), level)
        error = sign * (level - jnp.log(target))
        change = gains["proportional"] * sign * (level - before)
        whole = state.log_factor + gains["integral"] * jnp.tanh(error) + change
        whole = jnp.clip(whole, -most, most)
        return Steering(whole, smooth, seen), jnp.exp(whole), jnp.abs(whole) >= most

    return Controller(term, measures, target, init, update)
