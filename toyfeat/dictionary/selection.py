"""Which codes are kept, and how derivatives pass."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.types import Array


def kept_of_each(values: Array, score: Array, k: int, fewer: Array | None) -> Array:
    """In each row the values of the ``k`` largest scores, 0 elsewhere.

    Args:
      values: ``[N, M]``.
      score: ``[N, M]``; gradients go to ``values`` only.
      k: how many.
      fewer: ``[]`` int, a smaller number, or ``None``.
    """
    # Both outputs are used: with one of them alone XLA sorts every row.
    top, index = jax.lax.top_k(jax.lax.stop_gradient(score), k)
    kept = jnp.take_along_axis(values, index, axis=1)
    here = jnp.isfinite(top)
    if fewer is not None:
        here = here & (jnp.arange(k)[None, :] < fewer)
    kept = jnp.where(here, kept, jnp.zeros_like(kept))
    rows = jnp.arange(len(values))[:, None]
    return jnp.zeros_like(values).at[rows, index].set(kept, unique_indices=True)


def kept_of_batch(values: Array, k: int, fewer: Array | None) -> Array:
    """The ``k N`` largest values of all ``[N, M]``, 0 elsewhere."""
    num = len(values)
    flat = values.reshape(1, -1)
    less = None if fewer is None else num * fewer
    return kept_of_each(flat, flat, k * num, less).reshape(values.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumped(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """``max(0, pre)`` where ``pre > threshold [M]``, with a kernel derivative.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equation 11.
    """
    del bandwidth
    return jnp.where(pre > threshold[None, :], jax.nn.relu(pre), jnp.zeros_like(pre))


def _forward(pre: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple]:
    return jumped(pre, threshold, bandwidth), (pre, threshold)


def _backward(bandwidth: float, kept: tuple, change: Array) -> tuple[Array, Array]:
    pre, threshold = kept
    above = ((pre > threshold[None, :]) & (pre > 0)).astype(pre.dtype)
    near = (jnp.abs(pre - threshold[None, :]) < bandwidth / 2).astype(pre.dtype)
    return above * change, -(threshold / bandwidth) * jnp.sum(near * change, axis=0)


jumped.defvjp(_forward, _backward)
