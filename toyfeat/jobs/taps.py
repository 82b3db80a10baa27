"""Activations and gradients of a site, of a store or the model, and their moments."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from toyfeat.checkpoint import load_tree, save_tree
from toyfeat.checkpoint.files import DamagedFileError
from toyfeat.data import array_batches, store_batches
from toyfeat.data.batches import Batches as DeviceBatches
from toyfeat.data.store import Store, open_store, shard_taps, verify_store
from toyfeat.files.atomic import write_whole
from toyfeat.files.json import field, read_json
from toyfeat.jobs.config import Job
from toyfeat.jobs.part_batches import grads_as_acts, part_batches
from toyfeat.jobs.results import moments_path, require_collected, store_path
from toyfeat.jobs.windows import full_batches
from toyfeat.lm.collect import accumulate_moments, read_chunks
from toyfeat.types import Array, Moments, Params, Taps

Batches = DeviceBatches | Callable[[int], Taps]
TapWindows = Callable[[Params, Array, Array | int], Taps]
"""``(params, tokens [B, T], index of the first window or of each) -> Taps``."""

# Bytes of taps that are held in memory at once: a fourth of a machine with 8 GiB, so
# that a copy in float32 and the model fit beside them.
MAX_BYTES_IN_MEMORY = 2**31


class TapSource(NamedTuple):
    """Source of the activations and gradients of a site.

    Attributes:
      dim: ``D``.
      readouts: ``K``, 0 without gradients.
      metadata: JSON values that say which model, text and settings made the taps.
      batches: ``(seed, of_gradients) -> Batches`` for :func:`toyfeat.fit`, in random
        order; with ``of_gradients`` the gradients take the place of the activations.
      chunks: iterate over all taps in the order of the text, ``[rows, ...]`` at a time.
      mesh: that batches and latents are split over, with axes ``data`` and
        ``latents``, of all processes, or ``None``.
    """

    dim: int
    readouts: int
    metadata: Mapping[str, Any]
    batches: Callable[[int, bool], Batches]
    chunks: Callable[[], Iterator[Taps]]
    mesh: Mesh | None = None

    @property
    def bytes_per_token(self) -> int:
        """Size of the taps of one token in float32."""
        return 4 * self.dim * (1 + self.readouts)

    def moments(self) -> Moments:
        """Accumulate second moments over all taps."""
        return accumulate_moments(self.chunks())


def from_store(store: Store, batch: int, mesh: Mesh | None = None) -> TapSource:
    """Make a source from collected taps.

    Args:
      store: of a site.
      batch: tokens per training step.
      mesh: with axes ``data`` and ``latents``, of the devices of all processes.

    Returns:
      :class:`TapSource`.
    """
    return TapSource(
        dim=store.dim,
        readouts=store.readouts or 0,
        metadata=store.metadata,
        batches=partial(shuffled_batches, store, batch, mesh=mesh),
        chunks=partial(read_chunks, store),
        mesh=mesh,
    )


def shuffled_batches(
    store: Store, batch: int, seed: int, of_gradients: bool, mesh: Mesh | None = None
) -> Batches:
    """Shuffle the tokens of a store into batches.

    A store that fits into memory is held there, without the tokens of weight 0; a
    larger one is read during training, tokens of weight 0 included.  Several processes
    never hold it, and each reads its part of the same batches.

    Args:
      store: of a site.
      batch: tokens per training step.
      seed: of the order.
      of_gradients: whether gradients take the place of the activations.
      mesh: with an axis ``data``, of the devices of all processes.

    Returns:
      Batches for :func:`toyfeat.fit`.

    Raises:
      ValueError: if the devices do not divide the tokens of a step.
    """
    size = sum((store.path / shard.file).stat().st_size for shard in store.shards)
    if size <= MAX_BYTES_IN_MEMORY:
        if mesh is not None:
            return part_batches(store, batch, seed, of_gradients, mesh)
        shards = (shard_taps(store, i) for i in range(len(store.shards)))
        parts = [_nonzero_weight(shard) for shard in shards]
        taps = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        taps = grads_as_acts(taps) if of_gradients else taps
        return array_batches(taps, batch=min(batch, len(taps.weights)), seed=seed)
    batches = store_batches(store, batch=batch, seed=seed, mesh=mesh)
    return lambda step: grads_as_acts(batches(step)) if of_gradients else batches(step)


def from_model(
    tap_windows: TapWindows,
    params: Params,
    tokens: np.ndarray,
    *,
    dim: int,
    readouts: int,
    metadata: Mapping[str, Any],
    train_batch: int,
    chunk_windows: int,
) -> TapSource:
    """Make a source that runs the model whenever taps are needed and stores nothing.

    Batches for training are whole windows in random order, tapped on the device inside
    the training loop; tokens that do not count have weight 0 in them.

    Args:
      tap_windows: taps of a batch of windows at the site.
      params: of the model.
      tokens: ``[num, T]``, the training text.
      dim: width of the site.
      readouts: ``K``.
      metadata: JSON values that say which model, text and settings make the taps.
      train_batch: tokens per training step, whole windows.
      chunk_windows: windows at a time where all taps are read in order.

    Returns:
      :class:`TapSource`.

    Raises:
      ValueError: if ``train_batch`` is not of whole windows.
    """
    length = tokens.shape[1]
    if train_batch % length or train_batch > tokens.size:
        raise ValueError(
            f"job: train.batch must be whole windows of {length} tokens, at most the "
            f"{tokens.size} there are, got {train_batch}"
        )
    windows = train_batch // length
    return TapSource(
        dim=dim,
        readouts=readouts,
        metadata=metadata,
        batches=partial(_model_batches, tap_windows, params, tokens, windows),
        chunks=partial(_model_chunks, tap_windows, params, tokens, chunk_windows),
    )


def _model_chunks(
    tap_windows: TapWindows, params: Params, tokens: np.ndarray, batch: int
) -> Iterator[Taps]:
    """Tap the windows in order; the rows that fill up the last batch are dropped."""
    for rows, counts in full_batches(len(tokens), min(batch, len(tokens))):
        taps = tap_windows(params, jnp.asarray(tokens[rows]), int(rows[0]))
        num = int(counts.sum()) * tokens.shape[1]
        yield jax.tree.map(lambda x, n=num: np.asarray(x, np.float32)[:n], taps)


def _model_batches(
    tap_windows: TapWindows,
    params: Params,
    tokens: np.ndarray,
    windows: int,
    seed: int,
    of_gradients: bool,
) -> DeviceBatches:
    """Draw windows in random order and tap them on the device."""
    num = len(tokens)
    # Windows travel as activations and their indices as gradients, so that the order
    # is that of any other array.
    rows = Taps(jnp.asarray(tokens, jnp.int32), jnp.arange(num), jnp.ones(num))
    order = array_batches(rows, batch=windows, seed=seed)

    def take(data: Any, step: Array) -> Taps:
        params, order = data
        chosen = order(step)
        taps = tap_windows(params, chosen.acts, chosen.grads)
        taps = jax.tree.map(lambda x: x.astype(jnp.float32), taps)
        return grads_as_acts(taps) if of_gradients else taps

    return DeviceBatches(take, (params, order))


def _nonzero_weight(taps: Taps) -> Taps:
    """Select the tokens that count, in float32."""
    index = np.flatnonzero(np.asarray(taps.weights))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x[index], np.float32)), taps)


def load_moments(path: Path, dim: int, *, grads: bool = True) -> Moments:
    """Read the saved second moments of a site of width ``dim``."""

    def zero_moments() -> Moments:
        zeros = jnp.zeros((dim, dim))
        of_grads = (zeros[0], zeros) if grads else (None, None)
        return Moments(jnp.zeros(()), zeros[0], zeros, *of_grads)

    return load_tree(path, jax.eval_shape(zero_moments))


def count_massive(store: Store) -> int:
    """Count the tokens that do not count because their activation is massive.

    The first and the last token of a window, which never count, are not among them.
    """
    zeros = sum(
        int(np.sum(np.asarray(shard_taps(store, index).weights) == 0))
        for index in range(len(store.shards))
    )
    source = store.path / "store.json"
    length = field(store.metadata, "length", int, source, "job", low=1)
    windows = store.rows // length
    return zeros - 2 * windows


def open_collected(job: Job, site: str) -> Store:
    """Open the store of a site, after verifying its checksums.

    Raises:
      FileNotFoundError: if nothing was collected there.
      ValueError: if a shard is damaged; names it.
    """
    require_collected(job, site)
    store = open_store(store_path(job, site))
    verify_once(store)
    return store


def verify_once(store: Store) -> None:
    """Verify the checksums of a store, unless its files are as they were verified.

    A file beside the store says which sizes and times of change its shards had when
    they were verified.  Reading 1 GB for the checksums takes one to five seconds.

    Args:
      store: an open one.

    Raises:
      ValueError: if a shard is damaged; names it and says what to do.
    """
    marker = store.path.with_name(f"{store.path.name}.verified.json")
    shards = {}
    for shard in store.shards:
        status = (store.path / shard.file).stat()
        shards[shard.file] = [status.st_size, status.st_mtime_ns, shard.sha256]
    try:
        is_verified = read_json(marker, "job") == {"shards": shards}
    except (ValueError, FileNotFoundError):  # to be written again
        is_verified = False
    if is_verified:
        return
    try:
        verify_store(store.path)
    except ValueError as error:
        fault = str(error).partition("; ")[0]  # without its advice
        raise ValueError(
            f"job: the store must hold what was collected, got {fault}; delete the "
            f"folder {store.path} and run toyfeat collect again, which collects "
            "this site anew"
        ) from error
    write_whole(marker, json.dumps({"shards": shards}) + "\n")


def open_moments(
    job: Job, site: str, dim: int, compute: Callable[[], Moments], log: Callable
) -> Moments:
    """Read the moments of a site, or compute and keep them.

    Moments whose file is damaged are computed again: what they are computed from is
    verified or the model itself.

    Args:
      job: settings.
      site: name.
      dim: width of the site.
      compute: makes them, if there are none.
      log: called with a line if a file is damaged.

    Raises:
      ValueError: if the file holds something else than moments of this width.
    """
    path = moments_path(job, site)
    if path.exists():
        try:
            return load_moments(path, dim, grads=job.collect.readout != "none")
        except DamagedFileError as error:
            log(f"{error}: computed again")
    stats = compute()
    save_tree(path, stats)
    return stats
