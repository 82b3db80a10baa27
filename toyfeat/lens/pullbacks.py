"""Derivatives of the final residual stream with respect to all earlier ones."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.lens.model import LensModel
from toyfeat.types import Acts, Array, Inputs, Params

Reduce = Callable[[str, Array, Array], Array]
"""``(site, acts [B, T, D], grads [K, B, T, D]) -> Array``, what gradients become."""


class Pulled(NamedTuple):
    """Gradients of all cotangents at all sites but the final one, reduced.

    Attributes:
      acts: by site, ``[B, T, D]``.
      grads: by site, what ``reduce`` has made of the gradients.
    """

    acts: Acts
    grads: dict[str, Array]


def valid_positions(mask: Array, skip_first: int, skip_last: int) -> Array:
    """Mark the positions that count, of rows of any length.

    Args:
      mask: ``[B, T]``, not 0 at tokens.
      skip_first: tokens left out at the start of a row.
      skip_last: tokens left out at its end.

    Returns:
      ``[B, T]``, 1.0 where a position counts.

    Example:
      >>> import jax.numpy as jnp
      >>> valid_positions(jnp.array([[0, 1, 1, 1, 1]]), 1, 1).tolist()
      [[0.0, 0.0, 1.0, 1.0, 0.0]]
    """
    is_token = mask.astype(bool)
    index = jnp.cumsum(is_token, axis=1) - 1
    end = jnp.sum(is_token, axis=1, keepdims=True) - skip_last
    valid = is_token & (index >= skip_first) & (index < end)
    return valid.astype(jnp.result_type(float))


def pull_back(
    model: LensModel,
    params: Params,
    inputs: Inputs,
    valid: Array,
    directions: Array,
    reduce: Reduce,
    *,
    summed: bool,
    chunk: int,
    chain: bool,
) -> Pulled:
    """Pull cotangents at all valid positions of the final stream back to all sites.

    Cotangent ``k`` is ``directions[k]`` at every valid position at once.  Its gradient
    at an earlier stream and position ``t`` is ``directions[k]`` times the sum over
    ``t' >= t`` of the derivatives of the final stream at ``t'``.

    Args:
      model: of the streams.
      params: its parameters.
      inputs: a batch.
      valid: ``[B, T]``, 1 at the positions that count.
      directions: ``[K, B, D]`` or ``[K, 1, D]``.
      reduce: what is kept of the gradients at a site.
      summed: whether ``reduce`` sums over the cotangents, instead of keeping their axis
        ``K`` as the first.
      chunk: cotangents at a time.
      chain: whether to go block by block, with all cotangents at once, instead of
        through the whole model, with ``chunk`` of them.

    Returns:
      :class:`Pulled`.
    """
    acts, pull = _whole_pull(model, params, inputs)
    cast = partial(jnp.asarray, dtype=acts[model.sites[-1]].dtype)
    valid = cast(valid)[None, :, :, None]

    def cotangents(directions: Array) -> Array:
        return cast(directions)[:, :, None, :] * valid

    if chain:
        grads = cotangents(directions)
        grads = _pull_chain(model, params, inputs, acts, grads, reduce, chunk)
        return Pulled(acts, grads)

    def reduce_chunk(directions: Array) -> dict[str, Array]:
        grads = jax.vmap(pull)(cotangents(directions))
        return {site: reduce(site, acts[site], grad) for site, grad in grads.items()}

    return Pulled(acts, _map_chunks(reduce_chunk, directions, chunk, summed))


def _whole_pull(
    model: LensModel, params: Params, inputs: Inputs
) -> tuple[Acts, Callable[[Array], dict[str, Array]]]:
    """Run the model once; return its streams and the pull-back to all of them."""
    *sources, final = model.sites
    shapes = jax.eval_shape(lambda p, x: model.probed(p, x, {})[1], params, inputs)
    zeros = {s: jnp.zeros(shapes[s].shape, shapes[s].dtype) for s in sources}

    # A zero added to a stream has the gradient of the stream itself.
    def run(probes: dict[str, Array]) -> tuple[Array, Acts]:
        acts = model.probed(params, inputs, probes)[1]
        return acts[final], {site: acts[site] for site in model.sites}

    _, pull, acts = jax.vjp(run, zeros, has_aux=True)
    return acts, lambda cotangent: pull(cotangent)[0]


def _pull_chain(
    model: LensModel,
    params: Params,
    inputs: Inputs,
    acts: Acts,
    grads: Array,
    reduce: Reduce,
    chunk: int,
) -> dict[str, Array]:
    """Pull all cotangents ``[K, B, T, D]`` back block by block, the last one first."""
    results = {}
    pairs = list(zip(model.sites[:-1], model.sites[1:], strict=True))
    for start, stop in reversed(pairs):
        # The block is linearized once, for all cotangents.
        run = partial(model.run, params, inputs, start=start, stop=stop)
        _, pull = jax.vjp(run, acts[start])
        grads = jax.lax.map(
            lambda cotangent, pull=pull: pull(cotangent)[0], grads, batch_size=chunk
        )
        results[start] = reduce(start, acts[start], grads)
    return {site: results[site] for site in model.sites[:-1]}


def _map_chunks(
    reduce_chunk: Callable[[Array], dict[str, Array]],
    directions: Array,
    chunk: int,
    summed: bool,
) -> dict[str, Array]:
    """Map over cotangents, ``chunk`` at a time; add up or stack what comes of them."""
    num = directions.shape[0]
    if chunk >= num:
        return reduce_chunk(directions)
    # Fill the last chunk with cotangents of 0, whose gradients are 0.
    filled = jnp.pad(directions, ((0, -num % chunk), (0, 0), (0, 0)))
    chunks = filled.reshape(-1, chunk, *directions.shape[1:])
    if not summed:
        stacked = jax.lax.map(reduce_chunk, chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], stacked)
    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(reduce_chunk, chunks[0])
    )

    def add_chunk(total: Any, directions: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, reduce_chunk(directions)), None

    return jax.lax.scan(add_chunk, start, chunks)[0]
