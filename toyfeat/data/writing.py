"""Writer of a store: activations and gradients to disk, one shard at a time."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from toyfeat.data.checks import check_appended
from toyfeat.data.format import (
    RECORD,
    Shard,
    Store,
    empty_store,
    read_store,
    shard_bytes,
    split_blocks,
    store_json,
)
from toyfeat.data.shares import Share, check_count, check_no_shards
from toyfeat.data.store import check_shards, file_sha256, shard_taps
from toyfeat.files.paths import lock_folder
from toyfeat.types import Taps


def store_writer(
    path: str | Path,
    *,
    dim: int,
    readouts: int | None = None,
    dtype: str = "float32",
    rows_per_shard: int = 65536,
    metadata: dict[str, Any] | None = None,
    share: Share | None = None,
) -> "StoreWriter":
    """Open a store of activations and gradients for writing, or for appending.

    A shard is collected in memory, written and synced, and only then recorded in
    ``store.json``, which is replaced atomically.  So a process that is killed loses
    only the rows of the shard in memory.  A writer that opens the store again continues
    after the last complete shard, and the result is the same, bit for bit, as without
    the interruption.  Rows of weight 0 are stored like others, so that ``rows`` tells
    the progress of a job.

    Files that are not recorded are never deleted and never overwritten, except by bytes
    that they begin with: what a killed writer left is finished by the same rows.

    Args:
      path: the folder, created if it does not exist.
      dim: width ``D`` of the site.
      readouts: ``K`` gradients per example, or ``None`` for activations alone.
      dtype: ``"float32"`` or ``"bfloat16"``, of activations and gradients.
      rows_per_shard: rows of a full shard, which are held in memory.
      metadata: JSON values that describe model, site, readout and text.
      share: of one of several processes that write a store together; its rows alone
        are appended, and :func:`toyfeat.data.merging.merge_shares` joins all of them.

    Returns:
      :class:`StoreWriter`: ``append(taps)``, ``rows``, ``close()``; a context manager.

    Raises:
      ValueError: if a setting is not valid or differs from those of an existing
        store, if a shard of that store has the wrong size or its short last shard is
        damaged, or if there are shards and no ``store.json``.
      FileNotFoundError: if a shard that ``store.json`` records is missing.
      BlockingIOError: if another process is writing to the store.

    Example:
      >>> import tempfile
      >>> from toyfeat.data.store import open_store
      >>> taps = Taps(np.ones((5, 3)), np.ones((5, 1, 3)), np.ones(5))
      >>> settings = {"dim": 3, "readouts": 1, "rows_per_shard": 4}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with store_writer(folder, **settings) as writer:
      ...         writer.append(taps)
      ...     with store_writer(folder, **settings) as writer:
      ...         done = writer.rows
      ...         writer.append(taps)
      ...     done, [shard.rows for shard in open_store(folder).shards]
      (5, [4, 4, 2])
    """
    return StoreWriter(
        empty_store(
            "store_writer",
            path,
            dim=dim,
            readouts=readouts,
            dtype=dtype,
            rows_per_shard=rows_per_shard,
            metadata={} if metadata is None else metadata,
        ),
        share,
    )


class StoreWriter:
    """Writer of a store: collects rows and writes a shard whenever one is full."""

    def __init__(self, wanted: Store, share: Share | None = None):
        wanted.path.mkdir(parents=True, exist_ok=True)
        # The first of several processes holds the lock for all of them.
        self._release = _no_lock
        if share is None or share.index == 0:
            self._release = lock_folder(wanted.path, self, "store_writer")
        self._record, self._first_shard = RECORD, 0
        if share is not None:
            self._record = share.record
            self._first_shard = share.first_shard(wanted.rows_per_shard)
            wanted = share.mark(wanted)
        try:
            self._open(wanted)
        except BaseException:
            self._release()
            raise

    def _open(self, wanted: Store) -> None:
        """Create the store or continue the one in the folder, and allocate a shard."""
        store, path = wanted, wanted.path
        if os.path.lexists(path / self._record):  # also a link that leads nowhere
            store = read_store(path, "store_writer", self._record)
            check_settings(store, wanted)
            check_shards(store, "store_writer")
        else:
            if self._record == RECORD:
                check_count(path, 1, "store_writer")
                check_no_shards(path, "store_writer")
            replace_record(store, self._record)
        self._store, self._closed = store, False
        # The bytes of a full shard, and the arrays that they are views of.
        self._raw = np.zeros(shard_bytes(store, store.rows_per_shard), np.uint8)
        self._buffer = split_blocks(store, store.rows_per_shard, self._raw)
        self._num_buffered = 0
        self._short_shard: Shard | None = None
        if store.shards and store.shards[-1].rows < store.rows_per_shard:
            self._reload_short_shard()

    def _reload_short_shard(self) -> None:
        """Load a short last shard to append to it; its file stays until it is replaced.

        Raises:
          ValueError: if the file is damaged.
        """
        last = self._store.shards[-1]
        file = self._store.path / last.file
        if file_sha256(file) != last.sha256:
            raise ValueError(
                f"store_writer: {file} is not what was written; delete it and its "
                "entry in store.json, then collect its rows again"
            )
        self._copy(shard_taps(self._store, len(self._store.shards) - 1))
        self._short_shard = last
        self._store = self._store._replace(shards=self._store.shards[:-1])

    @property
    def rows(self) -> int:
        """Number of rows appended so far, those of earlier processes included."""
        return self._store.rows + self._num_buffered

    def append(self, taps: Taps) -> None:
        """Append any number of rows, in order.

        Args:
          taps: ``acts [N, D]``, ``grads [N, K, D]`` or ``None``, ``weights [N]``,
            rounded to the dtype of the store.

        Raises:
          ValueError: if shapes do not match the store, a weight is negative or not
            finite, a row of positive weight has values that the store cannot hold
            (NaN is one), or the writer is closed.
          TypeError: if arrays are not floating-point.
          OSError: if a shard cannot be written, as on a full disk.  Earlier shards
            are complete, and the writer is closed: open it again.
        """
        if self._closed:
            raise ValueError("append: the writer is closed; call store_writer again")
        taps = jax.tree.map(np.asarray, taps)
        check_appended(self._store, taps)
        # Fill the shard in memory, and write it whenever it is full.
        start, rows = 0, len(taps.weights)
        while start < rows:
            stop = min(rows, start + self._store.rows_per_shard - self._num_buffered)
            part = slice(start, stop)
            self._copy(jax.tree.map(lambda x, part=part: x[part], taps))
            start = stop
            if self._num_buffered == self._store.rows_per_shard:
                self._write_shard()

    def close(self) -> None:
        """Write the remaining rows as a short shard, and release the lock.

        Raises:
          OSError: if the shard cannot be written.
        """
        if self._closed:
            return
        short = self._short_shard  # already on disk, unless rows have been added
        if self._num_buffered and (short is None or self._num_buffered > short.rows):
            self._write_shard()
        self._closed = True
        self._release()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(self, taps: Taps) -> None:
        """Copy rows to the end of the buffer, which must have room for them."""
        part = slice(self._num_buffered, self._num_buffered + len(taps.weights))
        jax.tree.map(lambda block, x: _assign(block[part], x), self._buffer, taps)
        self._num_buffered = part.stop

    def _write_shard(self) -> None:
        """Write the buffered rows as a shard, then record it in ``store.json``."""
        store, rows, raw = self._store, self._num_buffered, self._raw
        name = f"shard-{self._first_shard + len(store.shards):06d}-{rows}.bin"
        if rows < store.rows_per_shard:  # a short shard has its blocks elsewhere
            raw = np.zeros(shard_bytes(store, rows), np.uint8)
            short = split_blocks(store, rows, raw)
            jax.tree.map(lambda block, x: _assign(block, x[:rows]), short, self._buffer)
        # The shard first, then its record: a kill in between loses only the record.
        try:
            file = _write_file(store, name, raw)
            shard = Shard(file.name, rows, hashlib.sha256(raw.data).hexdigest())
            new = store._replace(shards=(*store.shards, shard))
            replace_record(new, self._record)
        except OSError:
            self._closed = True
            self._release()
            raise
        self._store, self._num_buffered = new, 0
        # The shard that this one replaces is no longer recorded.  Its rows, whose
        # checksum was verified, begin the new one.
        if self._short_shard is not None:
            (store.path / self._short_shard.file).unlink()
            self._short_shard = None


def _write_file(store: Store, name: str, content: Any) -> Path:
    """Write a file of a store next to what is there, and sync it.

    Returns:
      The file, of another name if that one is taken by other bytes.

    Raises:
      OSError: if it cannot be written; the message names the free space.
    """
    # Bytes and then their name in the folder, so that both survive a loss of power.
    file = _free_file(store.path, name, content)
    try:
        with file.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        _sync_folder(store.path)
    except OSError as error:
        free = shutil.disk_usage(store.path).free
        file.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"store_writer: could not write {len(content)} bytes of {name} in "
            f"{store.path} ({error.strerror}; {free} bytes are free); the "
            f"{store.rows} rows of earlier shards are whole: make room and open the "
            "store again",
        ) from error
    return file


def replace_record(store: Store, record: str) -> None:
    """Replace the record of a store atomically."""
    draft = _write_file(store, f"{record}.tmp", store_json(store))
    draft.replace(store.path / record)
    _sync_folder(store.path)


def _free_file(folder: Path, name: str, content: Any) -> Path:
    """Find a name that is free, or whose file is a beginning of the content.

    A killed writer leaves such a beginning.  Other files, and links, are a stranger's.
    """
    file, number = folder / name, 0
    while os.path.lexists(file) and not _begins(file, content):
        number += 1
        stem, _, suffix = name.rpartition(".")
        file = folder / f"{stem}-{number}.{suffix}"
    return file


def _begins(file: Path, content: Any) -> bool:
    """Return whether a regular file holds the first bytes of a content."""
    if file.is_symlink() or not file.is_file() or file.stat().st_nlink > 1:
        return False
    size = file.stat().st_size
    return size <= len(content) and file.read_bytes() == bytes(content[:size])


def _sync_folder(path: Path) -> None:
    """Sync a folder, so that a renamed file survives a loss of power."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_settings(store: Store, wanted: Store) -> None:
    """Raise a ValueError if the settings of an existing store are not those wanted."""
    for name in Store._fields[1:-1]:
        old, new = getattr(store, name), getattr(wanted, name)
        if old != new:
            raise ValueError(
                f"store_writer: {store.path} was begun with {name} = {old!r}, got "
                f"{new!r}; use the same settings or another folder"
            )


def _no_lock() -> None:
    """Release the lock that another process holds."""


def _assign(block: np.ndarray, values: np.ndarray) -> None:
    """Copy values into a block, with its dtype."""
    # Rows of weight 0 may hold numbers that the dtype does not have.
    with np.errstate(over="ignore", invalid="ignore"):
        block[...] = values
