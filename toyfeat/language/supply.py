"""Where dictionaries get activations and gradients from."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data import array_batches, store_batches
from toyfeat.data.store import Store, shard_taps
from toyfeat.language.collecting import chunks_of
from toyfeat.types import Array, ArrayBatches, Taps

Batches = ArrayBatches | Callable[[int], Taps]
IN_MEMORY = 2**31  # bytes of a store that are held at once


class Supply(NamedTuple):
    """Activations and gradients of a site.

    Attributes:
      dim: ``D``.
      readouts: ``K``.
      about: JSON values that say what it is of.
      batches: ``(seed, of_gradients) -> Batches`` for :func:`toyfeat.fit`, in random
        order; with ``of_gradients`` these are in the place of the activations.
      chunks: all of it in the order of the text, ``[rows, ...]`` a time.
    """

    dim: int
    readouts: int
    about: Mapping[str, Any]
    batches: Callable[[int, bool], Batches]
    chunks: Callable[[], Iterator[Taps]]

    @property
    def size(self) -> int:
        """Bytes of a token in float32."""
        return 4 * self.dim * (1 + self.readouts)


def of_store(store: Store, batch: int) -> Supply:
    """What was collected.

    Args:
      store: of a site.
      batch: tokens per step.

    Returns:
      :class:`Supply`.
    """
    return Supply(
        store.dim,
        store.readouts or 0,
        store.metadata,
        partial(batches_of, store, batch),
        partial(chunks_of, store),
    )


def batches_of(store: Store, batch: int, seed: int, of_gradients: bool) -> Batches:
    """Tokens that count, activations or gradients in their place, shuffled.

    A store that fits is held in memory; a larger one is read as it goes, tokens of
    weight 0 included.
    """
    size = sum((store.path / shard.file).stat().st_size for shard in store.shards)
    if size <= IN_MEMORY:
        parts = [_counting(shard_taps(store, i)) for i in range(len(store.shards))]
        taps = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        taps = as_acts(taps) if of_gradients else taps
        return array_batches(taps, batch=min(batch, len(taps.weights)), seed=seed)
    batches = store_batches(store, batch=batch, seed=seed)
    return lambda step: as_acts(batches(step)) if of_gradients else batches(step)


def as_acts(taps: Taps) -> Taps:
    """Gradients in the place of activations, every draw an example of its own.

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


def _counting(taps: Taps) -> Taps:
    kept = np.flatnonzero(np.asarray(taps.weights))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x[kept], np.float32)), taps)
