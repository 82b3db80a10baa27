"""Shuffled batches as a function of the step, from a store or from arrays."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data.permutation import LARGEST, epoch_words, host_words, permuted
from toyfeat.data.store import Store, shard_taps
from toyfeat.types import Array, Taps


def store_batches(
    store: Store, *, batch: int, seed: int, window: int | None = 16
) -> Callable[[int], Taps]:
    """Shuffled batches of a store: a pure function of the step.

    Every epoch has another order of the shards; ``window`` shards that follow each
    other in it are then permuted together, row by row.  So each row comes exactly
    once an epoch, two rows of a shard lie anywhere within a window, and rows of
    shards in different windows never meet in an epoch except at a border: a window
    should span many texts.  Memory maps are read, and ``window`` shards are what the
    system has to keep in memory to read each page of the disk once; ``None`` permutes
    the whole store, for one that fits or for fast disks.  A batch that an epoch
    leaves unfilled is filled from the next.  Within a batch, rows are in the order
    of the store.  Nothing is kept from step to step but open files.

    Args:
      store: from :func:`open_store`.
      batch: rows per step.
      seed: of the order, an int of at least 0.
      window: shards that are permuted together, or ``None`` for all.

    Returns:
      ``step -> Taps``: ``acts [batch, D]`` and ``grads [batch, K, D]`` in the dtype of
      the store, ``weights [batch]`` float32.  The step must be concrete.

    Raises:
      ValueError: if the batch does not fit the store, or the seed or window is not
        possible.
    """
    rows = store.rows
    _check_batch("store_batches", batch, rows)
    if not (isinstance(seed, int) and seed >= 0):
        raise ValueError(f"store_batches: seed must be an int above -1, got {seed!r}")
    shards = len(store.shards)
    window = shards if window is None else window
    if window < 1 or min(window, shards) * store.rows_per_shard > LARGEST:
        raise ValueError(
            f"store_batches: a window must have 1 .. {LARGEST} rows, got {window} "
            f"shards of {store.rows_per_shard}"
        )
    maps = lru_cache(maxsize=2 * window)(partial(shard_taps, store))
    epochs = lru_cache(maxsize=2)(partial(_epoch, store, seed, window))

    def batches(step: int) -> Taps:
        if step < 0:
            raise ValueError(f"store_batches: step must not be negative, got {step}")
        epoch, start = divmod(int(step) * batch, rows)
        first = min(batch, rows - start)
        ids = [*_rows_of(epochs(epoch), seed, epoch, start, first)]
        if first < batch:
            ids += _rows_of(epochs(epoch + 1), seed, epoch + 1, 0, batch - first)
        return _read(store, maps, np.sort(np.concatenate(ids)))

    return batches


def array_batches(
    taps: Taps, *, batch: int, seed: int | Array, replace: bool = False
) -> Callable[[int | Array], Taps]:
    """Shuffled batches of arrays in memory: a pure function of a step, also traced.

    Every epoch is another permutation of the rows, computed per index (no array of
    the length of the data is made), so that it runs inside ``jax.lax.scan``.  A batch
    that an epoch leaves unfilled is filled from the next.  The function is a pytree
    that holds the arrays: pass it to a jitted function as an argument, for a constant
    of a program is copied into it.

    Args:
      taps: ``acts [N, D]``, ``grads [N, K, D]`` or ``None``, ``weights [N]``; ``N``
        at most 2^31 - 1.
      batch: rows per step, at most ``N``.
      seed: of the order.
      replace: draw rows independently, with replacement, instead.

    Returns:
      ``step -> Taps`` of ``batch`` rows; a :class:`jax.tree_util.Partial`.

    Raises:
      ValueError: if the batch does not fit, or the arrays differ in length.

    Example:
      >>> import jax.numpy as jnp
      >>> taps = Taps(jnp.arange(6.0).reshape(6, 1), None, jnp.ones(6))
      >>> batches = array_batches(taps, batch=2, seed=0)
      >>> steps = jnp.arange(3)
      >>> run = jax.jit(lambda f: jax.lax.map(lambda step: f(step).acts, steps))
      >>> sorted(run(batches).ravel().tolist())
      [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    taps = jax.tree.map(jnp.asarray, taps)
    lengths = [len(x) for x in jax.tree.leaves(taps)]
    if len(set(lengths)) > 1:
        raise ValueError(f"array_batches: arrays must have one length, got {lengths}")
    _check_batch("array_batches", batch, lengths[0])
    if lengths[0] > LARGEST:
        raise ValueError(f"array_batches: at most {LARGEST} rows, got {lengths[0]}")
    key, offsets = jax.random.key(seed), jnp.arange(batch, dtype=jnp.uint32)
    if replace:
        return jax.tree_util.Partial(_drawn_rows, taps, key, offsets)
    salt = jax.random.bits(key, (2,), jnp.uint32)
    return jax.tree_util.Partial(_permuted_rows, taps, salt, offsets)


def _permuted_rows(taps: Taps, salt: Array, offsets: Array, step: int | Array) -> Taps:
    num, batch = len(taps.weights), len(offsets)
    epoch, start = _product_divmod(jnp.asarray(step, jnp.uint32), batch, num)
    left = jnp.uint32(num) - start
    here = offsets < left
    index = jnp.where(here, start + offsets, offsets - left)
    words = epoch_words(salt, epoch), epoch_words(salt, epoch + jnp.uint32(1))
    words = jnp.where(here[None, None, :], *(x[:, :, None] for x in words))
    rows = permuted(index, num, words)
    return jax.tree.map(lambda x: x[rows], taps)


def _drawn_rows(taps: Taps, key: Array, offsets: Array, step: int | Array) -> Taps:
    key = jax.random.fold_in(key, step)
    rows = jax.random.randint(key, offsets.shape, 0, len(taps.weights))
    return jax.tree.map(lambda x: x[rows], taps)


def _product_divmod(step: Array, batch: int, num: int) -> tuple[Array, Array]:
    """``divmod(step * batch, num)`` in 32 bits, by doubling and adding."""
    total, one = jnp.uint32(num), jnp.uint32(1)

    def whole(quotient: Array, rest: Array) -> tuple[Array, Array]:
        over = rest >= total
        return jnp.where(over, quotient + one, quotient), jnp.where(
            over, rest - total, rest
        )

    steps, left = step // total, step % total
    quotient, rest = jnp.zeros_like(step), jnp.zeros_like(step)
    for bit in f"{batch:b}":
        quotient, rest = whole(quotient + quotient, rest + rest)
        if bit == "1":
            quotient, rest = whole(quotient + steps, rest + left)
    return quotient, rest


def _check_batch(who: str, batch: int, rows: int) -> None:
    if not (isinstance(batch, int) and 1 <= batch <= rows):
        raise ValueError(
            f"{who}: batch must be an int in 1 .. {rows}, the rows there are, got "
            f"{batch!r}"
        )


def _epoch(
    store: Store, seed: int, window: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shards in the order of an epoch, their first positions, the first of windows."""
    num = len(store.shards)
    words = host_words(seed, epoch, 0)
    order = permuted(np.arange(num, dtype=np.uint32), num, words).astype(np.int64)
    sizes = np.array([store.shards[i].rows for i in order])
    windows = -(-num // window)
    firsts = np.arange(windows + 1) * num // windows
    return order, np.concatenate([[0], np.cumsum(sizes)]), firsts


def _rows_of(
    layout: tuple[np.ndarray, np.ndarray, np.ndarray],
    seed: int,
    epoch: int,
    start: int,
    count: int,
) -> Iterator[np.ndarray]:
    """Shard times 2^32 plus row, of the positions from ``start`` on."""
    order, starts, firsts = layout
    window = int(np.searchsorted(starts[firsts], start, side="right")) - 1
    while count:
        first, last = firsts[window], firsts[window + 1]
        low, size = int(starts[first]), int(starts[last] - starts[first])
        here = min(count, low + size - start)
        index = np.arange(start - low, start - low + here, dtype=np.uint32)
        words = host_words(seed, epoch, 1 + window)
        at = low + permuted(index, size, words).astype(np.int64)
        shard = np.searchsorted(starts, at, side="right") - 1
        yield (order[shard] << 32) + at - starts[shard]
        start, count, window = start + here, count - here, window + 1


def _read(store: Store, maps: Callable[[int], Taps], ids: np.ndarray) -> Taps:
    """The rows of sorted ids, each copied once."""
    shards, rows = ids >> 32, ids & (2**32 - 1)
    cuts = np.flatnonzero(np.diff(shards)) + 1
    bounds = [0, *cuts.tolist(), len(ids)]
    out = jax.tree.map(
        lambda x: _aligned((len(ids), *x.shape[1:]), x.dtype), maps(int(shards[0]))
    )
    for low, high in pairwise(bounds):
        chosen, part = rows[low:high], slice(low, high)
        jax.tree.map(partial(_take, chosen, part), maps(int(shards[low])), out)
    return jax.tree.map(jax.device_put, out)


def _take(rows: np.ndarray, part: slice, block: np.ndarray, out: np.ndarray) -> None:
    np.take(block, rows, axis=0, out=out[part], mode="clip")  # "raise" makes a copy


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Room at a multiple of 64 bytes, which a device that is the host adopts."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
