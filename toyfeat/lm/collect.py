"""Collect activations and gradients of a language model on disk."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int
from toyfeat.data.format import empty_store
from toyfeat.data.store import Store, check_shard, open_store, shard_taps
from toyfeat.lm.label_gradients import HeadReadout, bind_readout
from toyfeat.lm.windows import site_folder, write_alone, write_together
from toyfeat.moments import moments
from toyfeat.tap import random_rules, readouts, rules, tap
from toyfeat.tap.readouts import Readout
from toyfeat.types import Array, Moments, Outputs, Params, Probed, Taps

ReadoutOf = Callable[[Array, Array], Readout] | HeadReadout | None
"""``(tokens [B, T], index of the first window [], or of each [B]) -> Readout``, or a
:class:`HeadReadout`, which needs the parameters of a decoder too; ``None`` for
activations alone."""


def make_readout(
    kind: str, *, draws: int = 1, seed: int = 0, temperature: float = 1.0
) -> ReadoutOf:
    """Make a readout of a language model, by name.

    Args:
      kind: ``"loss"``, :func:`toyfeat.readouts.next_token_loss`; ``"sampled"``,
        :func:`toyfeat.readouts.sampled_labels` with the same weights; ``"labels"`` or
        ``"signs"``, :class:`HeadReadout`, which is faster and for decoders alone;
        ``"none"``, activations alone, for which nothing behind the sites is run.
      draws: of all but ``"loss"`` and ``"none"``; gives ``K``.
      seed: of the draws.
      temperature: of ``"labels"`` and ``"signs"``.

    Returns:
      :data:`ReadoutOf`; what is drawn for a window depends on its index and not on the
      batch it is in.  Programs are compiled for the object: make it once.

    Raises:
      ValueError: for another kind.
    """
    if kind == "none":
        return None
    if kind == "loss":
        return lambda tokens, _: readouts.next_token_loss(tokens)
    if kind in ("labels", "signs"):
        return HeadReadout(draws, kind, temperature, seed)  # type: ignore[arg-type]
    if kind != "sampled":
        raise ValueError(
            "readout: must be 'loss', 'sampled', 'labels', 'signs' or 'none', got "
            f"{kind!r}; choose one of these"
        )

    def sampled(tokens: Array, index: Array) -> Readout:
        weights = readouts.next_token_loss(tokens).mask
        # The index of a window takes the place of labels, and the key is shared.
        readout = readouts.sampled_labels(jax.random.key(seed), num=draws, mask=weights)
        if not jnp.ndim(index):
            index = index + jnp.arange(len(tokens))
        return dataclasses.replace(
            readout, rule=_sampled_by_window, labels=index, shared=readout.key
        )

    return sampled


def _sampled_by_window(
    options: tuple[Any, ...], outputs: Outputs, chunk: rules.Chunk
) -> Outputs:
    """Draw labels with a key for each window, folded from its index (the labels)."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(chunk.shared, chunk.labels)
    return random_rules.sampled_labels(options, outputs, chunk._replace(keys=keys))


def collect(
    probed: Probed,
    params: Params,
    tokens: np.ndarray,
    sites: Sequence[str],
    folder: str | Path,
    *,
    readout: ReadoutOf,
    batch: int = 8,
    dtype: str = "float32",
    rows_per_shard: int = 8192,
    massive: float = 10.0,
    metadata: Mapping[str, Any] | None = None,
    report: Callable[[int, int], None] = lambda done, rows: None,
    several: bool = False,
) -> dict[str, Store]:
    """Tap windows of tokens at several sites and store all of it.

    While a batch is written the next is computed.  Two batches are in memory and one
    shard a site.  The same call again resumes after the last complete shard.

    Args:
      probed: tokens to logits.
      params: parameters of the model.
      tokens: ``[num, T]`` int.
      sites: with positions ``[T]``.
      folder: a store for each site is made in it, named by :func:`site_folder`.
      readout: from :func:`make_readout`, or another :data:`ReadoutOf`.
      batch: windows at a time.
      dtype: of the stores.
      rows_per_shard: tokens of a shard.
      massive: tokens whose activation is longer than this multiple of the median one
        of their window get weight 0.  Models keep such activations at tokens without
        meaning, most often but not only the first, and they would dominate second
        moments (docs/decisions/language.md, "Massive activations are found by their
        length").  ``inf`` keeps all weights.
      metadata: JSON values that describe the model and the text; a store with other
        values is refused.
      report: called with the tokens done and all of them, after every batch; of
        several processes with those of its own.
      several: whether all processes of this job collect together, in a folder that they
        share.  Each writes shards of its own, and the stores are those that one process
        makes, bit for bit.

    Returns:
      Site to :class:`Store`, rows window by window.

    Raises:
      ValueError: for tokens that are not ``[num, T]`` with ``T >= 2``, unknown sites,
        a store that exists with other settings or metadata, one that another number
        of processes began, or processes with different work.
      OSError: if the disk is full; complete shards stay.
    """
    # The shapes of the taps, and a record of what they are of.
    tokens = _check_tokens(np.asarray(tokens), batch)
    batch = min(batch, len(tokens))
    tap_batch = partial(tap_windows, probed, tuple(sites), readout, float(massive))
    shapes = jax.eval_shape(tap_batch, params, jnp.asarray(tokens[:batch]), 0)
    content = hashlib.sha256(np.ascontiguousarray(tokens, np.int32).data).hexdigest()
    provenance = {
        **(metadata or {}),
        "tokens": content,
        "length": tokens.shape[1],
        "massive": str(float(massive)),
    }
    # Taps of all windows, or of those of this process, appended to the stores.
    stores = {
        site: empty_store(
            "store_writer",
            Path(folder) / site_folder(site),
            dim=taps.acts.shape[1],
            readouts=None if taps.grads is None else taps.grads.shape[1],
            dtype=dtype,
            rows_per_shard=rows_per_shard,
            metadata={**provenance, "site": site},
        )
        for site, taps in shapes.items()
    }
    write = write_together if several else write_alone
    write(partial(tap_batch, params), tokens, batch, stores, report)
    return {site: open_store(store.path) for site, store in stores.items()}


def _check_tokens(tokens: np.ndarray, batch: int) -> np.ndarray:
    """Raise unless there are windows to collect in batches."""
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(
            f"collect: wanted tokens [num, T] with T >= 2, got shape {tokens.shape}"
        )
    check_int("collect", "batch", batch)
    return tokens


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def tap_windows(
    probed: Probed,
    sites: tuple[str, ...],
    readout: ReadoutOf,
    massive: float,
    params: Params,
    tokens: Array,
    index: Array,
) -> dict[str, Taps]:
    """Tap a batch of windows, compiled once for a model.

    Args:
      probed: tokens to logits.
      sites: with positions ``[T]``.
      readout: from :func:`make_readout`.
      massive: as of :func:`collect`.
      params: parameters of the model.
      tokens: ``[B, T]``.
      index: of the first window ``[]``, or of each ``[B]``.

    Returns:
      Site to taps, rows window by window.  The first and the last token of a window
      have weight 0, with gradients and without.
    """
    if readout is None:
        # Under jit what is behind the last site is left out.
        taps = tap(probed, params, tokens, sites=sites, readout=None)
        counts = jnp.asarray(readouts.next_token_loss(tokens).mask).reshape(-1)
        taps = {
            site: x._replace(weights=x.weights * counts.astype(x.weights.dtype))
            for site, x in taps.items()
        }
        return _without_massive(taps, tokens.shape[1], massive)
    probed, at_batch = bind_readout(probed, readout, params, tokens, index)
    taps = tap(probed, params, tokens, sites=sites, readout=at_batch)
    return _without_massive(taps, tokens.shape[1], massive)


def _without_massive(
    taps: Mapping[str, Taps], length: int, factor: float
) -> dict[str, Taps]:
    """Set the weights of massive activations to 0, at every site."""
    return {site: exclude_massive(x, length, factor) for site, x in taps.items()}


def exclude_massive(taps: Taps, length: int, factor: float) -> Taps:
    """Set the weights of massive activations to 0.

    Args:
      taps: rows window by window.
      length: tokens of a window.
      factor: multiple of the median length in a window from which on an activation is
        massive, ``inf`` for none.

    Returns:
      The taps with other weights.
    """
    # An infinite multiple of a median of 0 is NaN, which no length is below.
    if math.isinf(factor):
        return taps
    acts = taps.acts.astype(jnp.float32).reshape(-1, length, taps.acts.shape[1])
    norms = jnp.linalg.norm(acts, axis=2)
    median = jnp.median(norms, axis=1, keepdims=True)
    counts = (norms <= factor * median).reshape(-1)
    return taps._replace(weights=taps.weights * counts.astype(taps.weights.dtype))


def read_chunks(store: Store, *, rows: int = 4096) -> Iterator[Taps]:
    """Read a store in order, as float32.

    Args:
      store: from :func:`collect`.
      rows: at a time; fewer at the end of a shard.

    Yields:
      Taps of host arrays.
    """
    for index in range(len(store.shards)):
        taps = shard_taps(store, index)
        for start in range(0, len(taps.weights), rows):
            check_shard(store, store.shards[index], "read_chunks")
            part = slice(start, start + rows)
            yield jax.tree.map(lambda x, p=part: np.asarray(x[p], np.float32), taps)


def accumulate_moments(chunks: Iterable[Taps]) -> Moments:
    """Accumulate second moments over chunks of the taps of a site, at least one."""
    chunks = iter(chunks)
    first = next(chunks)  # all chunks have its width, and gradients if it has some
    stats = moments(first.acts.shape[1], grads=first.grads is not None)
    update = jax.jit(stats.update)
    state = stats.init()
    for taps in chain([first], chunks):
        state = update(state, jax.tree.map(jnp.asarray, taps))
    return stats.finish(state)


def store_moments(store: Store, *, rows: int = 4096) -> Moments:
    """Second moments of a store, read ``rows`` at a time."""
    return accumulate_moments(read_chunks(store, rows=rows))


def fingerprint(params: Params) -> str:
    """SHA-256 of all parameters, with their paths, dtypes and shapes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(np.asarray(leaf))
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(head.encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
