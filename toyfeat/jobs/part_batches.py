"""Batches of a store of which each process reads its part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from toyfeat.data import array_batches
from toyfeat.data.batches import row_reader
from toyfeat.data.parts import batch_part
from toyfeat.data.store import Store, shard_taps
from toyfeat.types import Array, Taps


def part_batches(
    store: Store, batch: int, seed: int, of_gradients: bool, mesh: Mesh
) -> Callable[[int], Taps]:
    """Draw the batches that :func:`array_batches` would, and read rows of this process.

    Its order depends on the number of rows and the seed alone, so that it is drawn of
    their numbers.
    """
    weights = [shard_taps(store, i).weights for i in range(len(store.shards))]
    counted = np.flatnonzero(np.concatenate([np.asarray(x) for x in weights]))
    draws = (store.readouts or 1) if of_gradients else 1
    numbers = jnp.arange(len(counted) * draws, dtype=jnp.int32)
    batch = min(batch, len(numbers))
    part = batch_part("train", batch, mesh, "data")
    order = array_batches(
        Taps(numbers, None, jnp.ones(len(numbers))), batch=batch, seed=seed
    )
    draw = jax.jit(lambda order, step: order(step).acts)
    read = row_reader(store)

    def batches(step: int) -> Taps:
        mine = np.asarray(draw(order, step))[part.rows]
        rows = read(counted[mine // draws])
        taps = jax.tree.map(lambda x: np.asarray(x, np.float32), rows)
        if of_gradients:  # each draw is an example
            every = jax.tree.map(np.asarray, grads_as_acts(taps))
            place = np.arange(len(mine)) * draws + mine % draws
            taps = jax.tree.map(lambda x: x[place], every)
        return part.assemble(taps)

    return batches


def grads_as_acts(taps: Taps) -> Taps:
    """Put gradients in the place of activations, every draw an example of its own.

    Raises:
      ValueError: if there are no gradients.
    """
    if taps.grads is None:
        raise ValueError("train: a dictionary of gradients wants a store with some")
    num, draws, dim = taps.grads.shape
    rows: Any = taps.grads.reshape(num * draws, dim)
    rows = rows * np.sqrt(draws).astype(rows.dtype)  # draws are scaled by 1 / sqrt(K)
    weights: Array = taps.weights
    return Taps(rows, None, weights.repeat(draws))
