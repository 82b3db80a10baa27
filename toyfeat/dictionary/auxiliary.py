"""Auxiliary loss of dead latents, which costs nothing while there are none."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.dictionary.base import lengths
from toyfeat.dictionary.gather import decode_dense, weighted_rows
from toyfeat.dictionary.selection import best_of_each
from toyfeat.dictionary.shard_selection import best_of_shards
from toyfeat.dictionary.types import Dictionary
from toyfeat.linalg.orthonormal import choose
from toyfeat.types import Array, Params


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def auxiliary_error(dictionary: Dictionary, params: Params, *data: Array) -> Array:
    """Compute the error that dead latents leave of what the others leave.

    It is 0, and costs nothing, while all latents (of all members) fire.

    Args:
      dictionary: whose latents they are.
      params: its parameters; only they have a derivative.
      data: ``acts [N, D]``, ``residual [N, D]``, ``dead [M]`` and ``weights [N]``.

    Returns:
      ``[]``, see :func:`toyfeat.losses.dead_latents`.
    """
    zero = jnp.zeros((), params["W_dec"].dtype)
    error = partial(_dead_latents_error, dictionary)
    return choose(jnp.any(data[2]), error, lambda *_: zero, params, *data)


def _error_forward(dictionary: Dictionary, params: Params, *data: Array) -> tuple:
    """Compute the error with its derivatives, both inside of the condition."""
    slopes = jax.value_and_grad(partial(_dead_latents_error, dictionary))

    def nothing(params: Params, *data: Array) -> tuple[Array, Params]:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), data[1].dtype), zeros

    return choose(jnp.any(data[2]), slopes, nothing, params, *data)


def _error_backward(dictionary: Dictionary, slopes: Params, change: Array) -> tuple:
    """Scale the derivatives; acts, residual, dead and weights have none."""
    del dictionary
    return jax.tree.map(lambda x: change * x, slopes), None, None, None, None


auxiliary_error.defvjp(_error_forward, _error_backward)


def _dead_latents_error(
    dictionary: Dictionary,
    params: Params,
    acts: Array,
    residual: Array,
    dead: Array,
    weights: Array,
) -> Array:
    """Compute the error of a reconstruction of the residual by dead latents."""
    rows, pre = params["W_dec"], dictionary.forward(params, acts).hidden_pre
    half = max(1, residual.shape[1] // 2)
    # The dead latents that would add most to each example.
    score = pre * lengths(rows)[None, :]
    if dictionary.architecture.signed:
        score = jnp.abs(score)
    # Living latents are never chosen: their score is minus infinity.
    score = jnp.where(dead[None, :], score, jnp.full_like(score, -jnp.inf))
    num = min(half, len(rows))
    # Their reconstruction of what the others leave.
    if dictionary.split is not None:
        filled = best_of_shards(score, num, None, dictionary.split)
        recon = decode_dense(jnp.where(filled, pre, 0 * pre), rows)
    else:
        index, filled = best_of_each(score, num)
        values = jnp.take_along_axis(pre, index, axis=1)
        recon = weighted_rows(jnp.where(filled, values, 0 * values), index, rows)
    # Few dead latents explain little, so their error counts for less.
    share = jnp.minimum(jnp.sum(dead).astype(residual.dtype) / half, 1)
    return share * jnp.sum(weights * jnp.sum((residual - recon) ** 2, axis=1))
