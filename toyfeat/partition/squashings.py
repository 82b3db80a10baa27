"""Squashings of causal importances to [0, 1], whose gradients do not die at the ends.

A dead gradient at 0 would keep a component off for ever.  Masks are made of
:func:`lower_leaky`, the penalty of :func:`upper_leaky`; swapped, nothing is learned.

References:
  Bushnaq et al. (2025), SPD, arXiv 2506.20790, and its code of
  February 2026, which has a gate by the sign of the gradient for a leak in the values.
"""

import jax
import jax.numpy as jnp

from toyfeat.types import Array

LEAK = 0.01
"""Slope of a leak, as published."""


@jax.custom_vjp
def lower_leaky(x: Array) -> Array:
    """Clip to [0, 1]; below 0 a gradient that would raise the value leaks through.

    Args:
      x: any shape.

    Returns:
      Values in [0, 1].  The derivative is 1 inside, 0 above 1, and at or below 0
      :data:`LEAK` where the gradient of the loss is negative, else 0.
    """
    return jnp.clip(x, 0, 1)


def _lower_forward(x: Array) -> tuple[Array, Array]:
    return jnp.clip(x, 0, 1), x


def _lower_backward(x: Array, grad: Array) -> tuple[Array]:
    # A negative gradient is a loss that falls as the importance grows.
    leak = jnp.where(grad < 0, LEAK * grad, jnp.zeros_like(grad))
    inside = jnp.where(x > 1, jnp.zeros_like(grad), grad)
    return (jnp.where(x > 0, inside, leak),)


lower_leaky.defvjp(_lower_forward, _lower_backward)


def upper_leaky(x: Array) -> Array:
    """Clip to [0, 1] below, and go on above 1 with a small slope.

    Args:
      x: any shape.

    Returns:
      0 below 0, ``x`` in [0, 1], ``1 + LEAK (x - 1)`` above.
    """
    return jnp.where(x > 1, 1 + LEAK * (x - 1), jnp.clip(x, 0, 1))
