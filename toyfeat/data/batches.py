"""Shuffled batches as a pure function of the step, from a store or from arrays."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from toyfeat.checks import check_flag, check_int
from toyfeat.data.checks import check_taps
from toyfeat.data.parts import batch_part
from toyfeat.data.permutation import LARGEST, epoch_words, host_words, permute_index
from toyfeat.data.store import ALIGN, Store, check_shard, shard_taps
from toyfeat.types import Array, Taps


class Batches(NamedTuple):
    """Batches of arrays on the device, selected inside a compiled loop.

    Attributes:
      take: ``(data, step) -> Taps``, traceable; ``step`` is ``[]`` int32.
      data: a pytree of arrays, an argument of the compiled loop.
    """

    take: Callable[[Any, Array], Taps]
    data: Any

    def __call__(self, step: int | Array) -> Taps:
        """Return the batch of a step."""
        return self.take(self.data, step)  # type: ignore[arg-type]


def store_batches(
    store: Store,
    *,
    batch: int,
    seed: int,
    window: int | None = 16,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Callable[[int], Taps]:
    """Read shuffled batches from a store, as a pure function of the step.

    The shards are shuffled anew for every epoch, then cut into windows of ``window``
    consecutive shards, and the rows of each window are shuffled together.  So each
    row comes exactly once per epoch, and two rows of a shard can lie anywhere in its
    window.  Rows of different windows share a batch only where a batch crosses the
    border: a window should span many texts.  Shards are memory-mapped, and the
    operating system has to cache ``window`` shards to read each page of the disk
    only once; ``None`` shuffles the whole store, for stores that fit in memory and
    for fast disks.  A last batch that an epoch cannot fill is filled from the next
    epoch.  Rows of a batch are in the order of the store.  No state but open files
    passes from step to step.

    Args:
      store: from :func:`open_store`.
      batch: rows per step.
      seed: seed of the order, an int of at least 0.
      window: shards that are shuffled together, or ``None`` for all.
      mesh: of devices, of all processes if there are several.
      axis: of the mesh.

    Returns:
      ``step -> Taps``: ``acts [batch, D]`` and ``grads [batch, K, D]`` in the dtype of
      the store, ``weights [batch]`` float32.  The step must be concrete.

    Raises:
      ValueError: if the batch is larger than the store or the axis does not divide it,
        or the seed or window is out of range; from the function that is returned, if a
        shard was cut short.
    """
    if not isinstance(store, Store):
        raise TypeError(
            "store_batches: store must be that of open_store(path), got "
            f"{type(store).__name__}; open it first"
        )
    rows = store.rows
    batch = _check_batch("store_batches", batch, rows)
    seed = check_int("store_batches", "seed", seed, least=0)
    shards = len(store.shards)
    window = shards if window is None else window
    window = check_int("store_batches", "window", window)
    if min(window, shards) * store.rows_per_shard > LARGEST:
        raise ValueError(
            f"store_batches: a window must have 1 .. {LARGEST} rows, got {window} "
            f"shards of {store.rows_per_shard}; make the window smaller"
        )
    part = None if mesh is None else batch_part("store_batches", batch, mesh, axis)
    # A batch may cross the border of two windows and of two epochs.
    open_shard = _shard_opener(store, "store_batches", 2 * window)
    epoch_order = lru_cache(maxsize=2)(partial(_epoch_order, store, seed, window))

    def batches(step: int) -> Taps:
        step = check_int("store_batches", "step", step, least=0)
        epoch, start = divmod(step * batch, rows)
        count = min(batch, rows - start)
        ids = [*_row_ids(epoch_order(epoch), seed, epoch, start, count)]
        if count < batch:  # fill the batch from the next epoch
            following = epoch_order(epoch + 1)
            ids += _row_ids(following, seed, epoch + 1, 0, batch - count)
        sorted_ids = np.sort(np.concatenate(ids))
        if part is None:
            return jax.tree.map(jax.device_put, _read_rows(open_shard, sorted_ids))
        return part.assemble(_read_rows(open_shard, sorted_ids[part.rows]))

    return batches


def _shard_opener(store: Store, who: str, most: int | None) -> Callable[[int], Taps]:
    """Make a function that maps a shard of a store; ``most`` of them stay mapped."""
    map_shard = lru_cache(maxsize=most)(partial(shard_taps, store))

    def open_shard(index: int) -> Taps:
        check_shard(store, store.shards[index], who)
        return map_shard(index)

    return open_shard


def row_reader(store: Store) -> Callable[[np.ndarray], Taps]:
    """Make a reader of single rows of a store.

    Args:
      store: from :func:`open_store`.

    Returns:
      ``rows [n] -> Taps``, arrays of the host; rows are numbered in the order of the
      store, and may be in any order.
    """
    open_shard = _shard_opener(store, "row_reader", None)
    starts = np.cumsum([0, *(shard.rows for shard in store.shards)])

    def read(rows: np.ndarray) -> Taps:
        order = np.argsort(rows, kind="stable")
        shards = np.searchsorted(starts, rows[order], side="right") - 1
        ids = (shards << 32) + rows[order] - starts[shards]
        back = np.argsort(order)
        return jax.tree.map(lambda x: x[back], _read_rows(open_shard, ids))

    return read


def array_batches(
    taps: Taps, *, batch: int, seed: int | Array, replace: bool = False
) -> Callable[[int | Array], Taps]:
    """Select shuffled batches from arrays, as a pure function of a traceable step.

    Every epoch is another permutation of the rows.  It is computed per index, without
    an array of the length of the data, so that it runs inside ``jax.lax.scan``.  A last
    batch that an epoch cannot fill is filled from the next epoch.  The function is a
    pytree that holds the arrays: pass it to a jitted function as an argument, for
    a jitted function copies arrays that it closes over into its program.

    Args:
      taps: ``acts [N, D]``, ``grads [N, K, D]`` or ``None``, ``weights [N]``; ``N``
        at most 2^31 - 1.
      batch: rows per step, at most ``N``.
      seed: seed of the order.
      replace: whether to draw rows independently, with replacement.

    Returns:
      ``step -> Taps`` of ``batch`` rows; a :class:`jax.tree_util.Partial`.

    Raises:
      ValueError: if the batch is larger than the data, the arrays differ in length or
        a weight is negative or NaN.
      TypeError: if an argument is of another type.

    Example:
      >>> import jax.numpy as jnp
      >>> taps = Taps(jnp.arange(6.0).reshape(6, 1), None, jnp.ones(6))
      >>> batches = array_batches(taps, batch=2, seed=0)
      >>> steps = jnp.arange(3)
      >>> run = jax.jit(lambda f: jax.lax.map(lambda step: f(step).acts, steps))
      >>> sorted(run(batches).ravel().tolist())
      [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    taps = check_taps(taps)
    num = len(taps.weights)
    batch = _check_batch("array_batches", batch, num)
    if num > LARGEST:
        raise ValueError(
            f"array_batches: at most {LARGEST} rows, got {num}; use a store for more"
        )
    if not isinstance(seed, jax.Array):  # one that is traced cannot be looked at
        seed = check_int("array_batches", "seed", seed, least=-(2**63), most=2**63 - 1)
    elif seed.shape != () or not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(
            f"array_batches: seed must be one int, got {seed.dtype}{list(seed.shape)}; "
            "pass one int"
        )
    check_flag("array_batches", "replace", replace)
    key, offsets = jax.random.key(seed), jnp.asarray(np.arange(batch, dtype=np.uint32))
    if replace:
        return jax.tree_util.Partial(_take_drawn, taps, key, offsets)
    salt = _draw_salt(key)
    return jax.tree_util.Partial(_take_permuted, taps, salt, offsets)


@jax.jit  # one program, not one per operation
def _draw_salt(key: Array) -> Array:
    """Draw the two words that tell the orders of different seeds apart."""
    return jax.random.bits(key, (2,), jnp.uint32)


def _take_permuted(taps: Taps, salt: Array, offsets: Array, step: int | Array) -> Taps:
    """Select the rows at positions ``step * batch + offsets`` of permuted epochs."""
    num, batch = len(taps.weights), len(offsets)
    # Split the positions between the epoch of the first row and the next epoch.
    epoch, start = _divmod_of_product(jnp.asarray(step, jnp.uint32), batch, num)
    left = jnp.uint32(num) - start
    in_epoch = offsets < left
    index = jnp.where(in_epoch, start + offsets, offsets - left)
    # Permute every index by the words of its own epoch.
    words = epoch_words(salt, epoch), epoch_words(salt, epoch + jnp.uint32(1))
    words = jnp.where(in_epoch[None, None, :], *(x[:, :, None] for x in words))
    rows = permute_index(index, num, words)
    return jax.tree.map(lambda x: x[rows], taps)


def _take_drawn(taps: Taps, key: Array, offsets: Array, step: int | Array) -> Taps:
    """Select rows drawn with replacement by the key of a step."""
    key = jax.random.fold_in(key, step)
    rows = jax.random.randint(key, offsets.shape, 0, len(taps.weights))
    return jax.tree.map(lambda x: x[rows], taps)


def _divmod_of_product(step: Array, batch: int, num: int) -> tuple[Array, Array]:
    """Compute ``divmod(step * batch, num)`` in 32 bits, by doubling and adding.

    The product does not fit in 32 bits, but quotient and remainder do: after each
    operation the remainder is below ``2 * num``, and is brought below ``num`` again.
    """
    divisor, unit = jnp.uint32(num), jnp.uint32(1)

    def carry(quotient: Array, remainder: Array) -> tuple[Array, Array]:
        """Move one multiple of ``num`` from the remainder to the quotient, if any."""
        over = remainder >= divisor
        return jnp.where(over, quotient + unit, quotient), jnp.where(
            over, remainder - divisor, remainder
        )

    step_quotient, step_remainder = step // divisor, step % divisor
    quotient, remainder = jnp.zeros_like(step), jnp.zeros_like(step)
    # Horner's scheme over the bits of the batch size, from the highest down.
    for bit in f"{batch:b}":
        quotient, remainder = carry(quotient + quotient, remainder + remainder)
        if bit == "1":
            quotient, remainder = carry(
                quotient + step_quotient, remainder + step_remainder
            )
    return quotient, remainder


def _check_batch(who: str, batch: int, rows: int) -> int:
    """Return a batch size as an int, or raise unless it is in ``1 .. rows``."""
    return check_int(who, "batch", batch, most=rows, about=", the rows there are")


class _Order(NamedTuple):
    """The order of shards in an epoch.

    Attributes:
      shards: ``[S]`` indices of the shards, shuffled.
      starts: ``[S + 1]`` position of the first row of each, and the number of rows.
      windows: ``[W + 1]`` first shard of each window (into ``shards``), and ``S``.
    """

    shards: np.ndarray
    starts: np.ndarray
    windows: np.ndarray


def _epoch_order(store: Store, seed: int, window: int, epoch: int) -> _Order:
    """Shuffle the shards for an epoch, and cut them into windows of equal size."""
    num = len(store.shards)
    words = host_words(seed, epoch, 0)
    shards = permute_index(np.arange(num, dtype=np.uint32), num, words).astype(np.int64)
    sizes = np.array([store.shards[i].rows for i in shards])
    # As few windows as there can be, of equal sizes, so that no shard is left alone.
    count = -(-num // window)
    windows = np.arange(count + 1) * num // count
    return _Order(shards, np.concatenate([[0], np.cumsum(sizes)]), windows)


def _row_ids(
    order: _Order, seed: int, epoch: int, start: int, count: int
) -> Iterator[np.ndarray]:
    """Yield the ids of ``count`` rows from position ``start`` on, window by window.

    The id of a row is its shard times 2^32 plus its index in the shard.
    """
    shards, starts, windows = order
    window = int(np.searchsorted(starts[windows], start, side="right")) - 1
    while count:
        first, last = windows[window], windows[window + 1]
        low, size = int(starts[first]), int(starts[last] - starts[first])
        # Permute the positions within the window.
        taken = min(count, low + size - start)
        index = np.arange(start - low, start - low + taken, dtype=np.uint32)
        words = host_words(seed, epoch, 1 + window)
        position = low + permute_index(index, size, words).astype(np.int64)
        # Find the shard that holds each position.
        slot = np.searchsorted(starts, position, side="right") - 1
        yield (shards[slot] << 32) + position - starts[slot]
        start, count, window = start + taken, count - taken, window + 1


def _read_rows(open_shard: Callable[[int], Taps], ids: np.ndarray) -> Taps:
    """Copy the rows of sorted ids from their shards."""
    # Split the ids into runs of one shard.
    shards, rows = ids >> 32, ids & (2**32 - 1)
    cuts = np.flatnonzero(np.diff(shards)) + 1
    bounds = [0, *cuts.tolist(), len(ids)]
    # Gather each run straight into the batch, so that every row is copied once.
    batch = jax.tree.map(
        lambda x: _empty_aligned((len(ids), *x.shape[1:]), x.dtype),
        open_shard(int(shards[0])),
    )
    for low, high in pairwise(bounds):
        gather = partial(_gather, rows[low:high], slice(low, high))
        jax.tree.map(gather, open_shard(int(shards[low])), batch)
    return batch


def _gather(rows: np.ndarray, part: slice, block: np.ndarray, out: np.ndarray) -> None:
    """Copy rows of a block into a part of another array."""
    np.take(block, rows, axis=0, out=out[part], mode="clip")  # "raise" makes a copy


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array aligned to 64 bytes, which JAX on a CPU uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)
