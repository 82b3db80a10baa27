"""Write the taps of windows of tokens to a store for every site."""

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data.format import Store
from toyfeat.data.merging import is_complete, merge_shares
from toyfeat.data.shares import Share
from toyfeat.data.writing import StoreWriter, store_writer
from toyfeat.processes import (
    check_same,
    gather,
    num_processes,
    process_index,
    together,
    versions,
)
from toyfeat.types import Array, Taps

_PLAIN_SITE = re.compile(r"\w+([./]\w+)*", re.ASCII)
_MAX_NAME = 200  # letters; file systems allow 255 bytes
_ADVICE = "give all of them the same job and the same versions"

TapBatch = Callable[[Array, int], dict[str, Taps]]
Report = Callable[[int, int], None]


def site_folder(site: str) -> str:
    """Name the folder of a site, another one for every site.

    Slashes become dashes.  A name with anything but letters, digits, underscores,
    slashes and inner dots gets a checksum behind it, which keeps ``a-b`` apart from
    ``a/b`` and ``..`` inside the folder.

    Example:
      >>> site_folder("blocks_15/resid_post")
      'blocks_15-resid_post'
      >>> site_folder("blocks/resid_post@15")
      'blocks-resid_post-15-7f5ab2b3'
    """
    # Only plain names keep apart what the dashes would join.
    name = re.sub(r"[^A-Za-z0-9_.]", "-", site)
    if _PLAIN_SITE.fullmatch(site) and len(site) <= _MAX_NAME:
        return name
    return f"{name[:_MAX_NAME]}-{hashlib.sha256(site.encode()).hexdigest()[:8]}"


def write_alone(
    tap_batch: TapBatch,
    tokens: np.ndarray,
    batch: int,
    stores: Mapping[str, Store],
    report: Report,
) -> None:
    """Write the stores in one process.

    Args:
      tap_batch: ``(tokens [batch, T], index of the first window) -> taps by site``.
      tokens: ``[num, T]``.
      batch: windows at a time.
      stores: site to the settings of its store.
      report: called with the rows done and all of them.
    """
    rows = slice(0, tokens.size)
    with ExitStack() as closing:  # all writers, even if one of them fails
        writers = _open_writers(stores, closing)
        _write_windows(tap_batch, tokens, batch, writers, rows, report)
    report(tokens.size, tokens.size)


def write_together(
    tap_batch: TapBatch,
    tokens: np.ndarray,
    batch: int,
    stores: Mapping[str, Store],
    report: Report,
) -> None:
    """Write the stores in all processes of a job, each its own shards.

    Arguments are those of :func:`write_alone`.

    Raises:
      ValueError: if the processes have different work, or a store was begun otherwise.
    """
    count, index, total = num_processes(), process_index(), tokens.size
    settings = {
        site: [*map(str, store[1:5]), store.metadata] for site, store in stores.items()
    }
    about = {"versions": versions(), "batch": batch, "stores": settings}
    check_same("collect", about, _ADVICE)
    # The first looks at what is there, before any writes.
    with together("collect"):
        if index == 0:
            for store in stores.values():
                is_complete(store, total, count)
    left = {s: x for s, x in stores.items() if not (x.path / "store.json").exists()}
    if not left:
        report(total, total)
        return
    share = Share(index, count, total)
    rows = share.rows(next(iter(left.values())).rows_per_shard)
    with ExitStack() as closing:
        with together("collect"):
            writers = _open_writers(left, closing, share)
        # A process that fails here ends, and does not wait for the others.
        _write_windows(tap_batch, tokens, batch, writers, rows, report)
    gather("written")  # all of them
    with together("collect"):
        if index == 0:
            for store in left.values():
                merge_shares(store, total, count)
    report(rows.stop - rows.start, rows.stop - rows.start)


def _open_writers(
    stores: Mapping[str, Store], closing: ExitStack, share: Share | None = None
) -> dict[str, StoreWriter]:
    """Open writers of every site, those of existing stores first.

    So a store with other settings is refused before any new one is begun.
    """

    def is_new(site: str) -> bool:
        return not (stores[site].path / "store.json").exists()

    writers = {}
    for site in sorted(stores, key=is_new):
        store = stores[site]
        options: dict[str, Any] = store._asdict()
        del options["path"], options["shards"]
        writers[site] = store_writer(store.path, **options, share=share)
        closing.enter_context(writers[site])
    return writers


def _write_windows(
    tap_batch: TapBatch,
    tokens: np.ndarray,
    batch: int,
    writers: Mapping[str, StoreWriter],
    rows: slice,
    report: Report,
) -> None:
    """Tap batches of windows, and write each while the next is computed.

    Batches are those of one process, whichever rows are written here: what a window
    gives may depend on its batch in the last bit.
    """
    length, total = tokens.shape[1], rows.stop - rows.start
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as disk:
        # Resume with the batch of the first window that some store does not have.
        done = rows.start + min(writer.rows for writer in writers.values())
        begin, end = done // length // batch * batch, -(-rows.stop // length)
        for first in range(begin, end if total else begin, batch):
            windows = tokens[first : first + batch]
            # The last batch is filled up, so that one program serves all batches.
            filled = np.resize(windows, (batch, length))
            taps = tap_batch(jnp.asarray(filled), first)
            # The device computes on its own while the last batch is being written.
            if pending is not None:
                pending.result()
                report(max(0, first * length - rows.start), total)
            part = slice(first * length, (first + len(windows)) * length)
            pending = disk.submit(_append, writers, taps, part, rows)
        if pending is not None:
            pending.result()


def _append(
    writers: Mapping[str, StoreWriter],
    taps: Mapping[str, Taps],
    batch: slice,
    rows: slice,
) -> None:
    """Append the rows of a batch that a store is to have and does not have yet."""
    for site, writer in writers.items():
        start = max(batch.start, rows.start + writer.rows) - batch.start
        stop = min(batch.stop, rows.stop) - batch.start
        if start < stop:
            part = slice(start, stop)
            writer.append(jax.tree.map(lambda x, p=part: np.asarray(x)[p], taps[site]))
