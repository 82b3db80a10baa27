"""Activations and gradients of a language model, to disk."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data.store import Store, open_store, shard_taps
from toyfeat.data.writing import StoreWriter, store_writer
from toyfeat.moments import moments
from toyfeat.tap import readouts, rules, tap
from toyfeat.tap.readouts import Readout
from toyfeat.types import Array, Moments, Outputs, Params, Probed, Taps

ReadoutOf = Callable[[Array, Array], Readout]
"""``(tokens [B, T], index of the first window [], or of each [B]) -> Readout``."""


def readout_of(kind: str, *, draws: int = 1, seed: int = 0) -> ReadoutOf:
    """A readout of a language model, by name.

    Args:
      kind: ``"loss"``, :func:`toyfeat.readouts.next_token_loss`; ``"sampled"``,
        :func:`toyfeat.readouts.sampled_labels` with the same weights.
      draws: of ``"sampled"``; gives ``K``.
      seed: of the draws.

    Returns:
      :data:`ReadoutOf`; what is drawn for a window depends on its index and not on the
      batch it is in.

    Raises:
      ValueError: for another kind.
    """
    if kind == "loss":
        return lambda tokens, _: readouts.next_token_loss(tokens)
    if kind != "sampled":
        raise ValueError(f"readout: wanted 'loss' or 'sampled', got {kind!r}")

    def sampled(tokens: Array, index: Array) -> Readout:
        weights = readouts.next_token_loss(tokens).mask
        drawn = readouts.sampled_labels(jax.random.key(seed), num=draws, mask=weights)
        if not jnp.ndim(index):
            index = index + jnp.arange(len(tokens))
        return dataclasses.replace(
            drawn, rule=_sampled_by_window, labels=index, shared=drawn.key
        )

    return sampled


def _sampled_by_window(
    options: tuple[Any, ...], outputs: Outputs, chunk: rules.Chunk
) -> Outputs:
    """``rules.sampled`` with keys of the windows' indices, which are the labels."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(chunk.shared, chunk.labels)
    return rules.sampled(options, outputs, chunk._replace(keys=keys))


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
) -> dict[str, Store]:
    """Tap windows of tokens at several sites and store all of it.

    While one batch is written the next is computed.  Two batches are in memory and one
    shard a site.  The same call again goes on after the last whole shard.

    Args:
      probed: tokens to logits.
      params: its parameters.
      tokens: ``[num, T]`` int.
      sites: with positions ``[T]``.
      folder: a store for each site is made in it, named by :func:`site_folder`.
      readout: from :func:`readout_of`, or one's own.
      batch: windows at a time.
      dtype: of the stores.
      rows_per_shard: tokens of a shard.
      massive: tokens whose activation is longer than so many median ones of their
        window get weight 0: models keep such activations at tokens that say nothing,
        most often but not only the first, and second moments would be of them alone.
        ``inf`` keeps them.
      metadata: JSON values that say what this is of; a store of others is refused.
      report: called with the tokens done and all of them, after every batch.

    Returns:
      Site to :class:`Store`, rows window by window.

    Raises:
      ValueError: for tokens that are not ``[num, T]`` with ``T >= 2``, unknown sites,
        or a store that is there with other settings or metadata.
      OSError: if the disk is full; what is whole stays.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(
            f"collect: wanted tokens [num, T] with T >= 2, got shape {tokens.shape}"
        )
    if batch < 1:
        raise ValueError(f"collect: batch must be at least 1, got {batch}")
    length = tokens.shape[1]
    batch = min(batch, len(tokens))

    tap_of = partial(tapped, probed, tuple(sites), readout, float(massive))
    shapes = jax.eval_shape(tap_of, params, jnp.asarray(tokens[:batch]), 0)
    content = hashlib.sha256(np.ascontiguousarray(tokens, np.int32).data).hexdigest()
    about = {**(metadata or {}), "tokens": content, "length": length}
    about |= {"massive": str(float(massive))}
    options = {"dtype": dtype, "rows_per_shard": rows_per_shard}
    pending: Future[None] | None = None
    with ExitStack() as closing:  # all of them, even if one cannot be written
        writers = _writers(Path(folder), shapes, about, closing, **options)
        done = min(writer.rows for writer in writers.values()) // length
        with ThreadPoolExecutor(1) as disk:
            for first in range(done // batch * batch, len(tokens), batch):
                part = tokens[first : first + batch]
                full = np.resize(part, (batch, length))  # the last one, filled up
                taps = tap_of(params, jnp.asarray(full), first)
                if pending is not None:
                    pending.result()
                    report(first * length, tokens.size)
                rows = slice(first * length, (first + len(part)) * length)
                pending = disk.submit(_append, writers, taps, rows)
            if pending is not None:
                pending.result()
    report(tokens.size, tokens.size)
    return {site: open_store(Path(folder) / site_folder(site)) for site in shapes}


def _writers(
    folder: Path,
    shapes: Mapping[str, Taps],
    about: Mapping[str, Any],
    closing: ExitStack,
    **options: Any,
) -> dict[str, StoreWriter]:
    """Writers of every site; those of stores that are there are opened first.

    So what is refused is refused before anything new is begun.
    """

    def is_new(site: str) -> bool:
        return not (folder / site_folder(site) / "store.json").exists()

    writers = {}
    for site in sorted(shapes, key=is_new):
        taps = shapes[site]
        writers[site] = store_writer(
            folder / site_folder(site),
            dim=taps.acts.shape[1],
            readouts=None if taps.grads is None else taps.grads.shape[1],
            metadata={**about, "site": site},
            **options,
        )
        closing.enter_context(writers[site])
    return writers


def site_folder(site: str) -> str:
    """The name of a site's folder.

    Example:
      >>> site_folder("blocks_15/resid_post")
      'blocks_15-resid_post'
    """
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in site)


def chunks_of(store: Store, *, rows: int = 4096) -> Iterator[Taps]:
    """A store in order, as float32.

    Args:
      store: from :func:`collect`.
      rows: at a time; fewer at the end of a shard.

    Yields:
      Taps of host arrays.
    """
    for index in range(len(store.shards)):
        taps = shard_taps(store, index)
        for start in range(0, len(taps.weights), rows):
            part = slice(start, start + rows)
            yield jax.tree.map(lambda x, p=part: np.asarray(x[p], np.float32), taps)


def moments_of(chunks: Iterable[Taps], dim: int, *, grads: bool = True) -> Moments:
    """Second moments of everything in some taps.

    Args:
      chunks: of one site.
      dim: ``D``.
      grads: whether they have gradients.

    Returns:
      :class:`Moments`.
    """
    stats = moments(dim, grads=grads)
    update = jax.jit(stats.update)
    state = stats.init()
    for taps in chunks:
        state = update(state, jax.tree.map(jnp.asarray, taps))
    return stats.finish(state)


def store_moments(store: Store, *, rows: int = 4096) -> Moments:
    """:func:`moments_of` a store, ``rows`` at a time."""
    grads = store.readouts is not None
    return moments_of(chunks_of(store, rows=rows), store.dim, grads=grads)


def fingerprint(params: Params) -> str:
    """SHA-256 of all parameters, their paths and dtypes: which weights these are."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(np.asarray(leaf))
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(head.encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def tapped(
    probed: Probed,
    sites: tuple[str, ...],
    readout: ReadoutOf,
    massive: float,
    params: Params,
    tokens: Array,
    index: Array,
) -> dict[str, Taps]:
    """Compiled once for one model, and not for every call of :func:`collect`."""
    asked = readout(tokens, index)
    taps = tap(probed, params, tokens, sites=sites, readout=asked)
    length = tokens.shape[1]
    return {site: without_massive(one, length, massive) for site, one in taps.items()}


def without_massive(taps: Taps, length: int, most: float) -> Taps:
    """Weight 0 for activations longer than ``most`` median ones of their window.

    Args:
      taps: rows window by window.
      length: tokens of a window.
      most: a factor, ``inf`` for none.

    Returns:
      The taps with other weights.
    """
    acts = taps.acts.astype(jnp.float32).reshape(-1, length, taps.acts.shape[1])
    lengths = jnp.linalg.norm(acts, axis=2)
    median = jnp.median(lengths, axis=1, keepdims=True)
    kept = (lengths <= most * median).reshape(-1)
    return taps._replace(weights=taps.weights * kept.astype(taps.weights.dtype))


def _append(
    writers: Mapping[str, StoreWriter], taps: Mapping[str, Taps], rows: slice
) -> None:
    """Rows that a store does not have yet."""
    for site, writer in writers.items():
        part = slice(max(0, writer.rows - rows.start), rows.stop - rows.start)
        if part.start < part.stop:
            writer.append(jax.tree.map(lambda x, p=part: np.asarray(x)[p], taps[site]))
