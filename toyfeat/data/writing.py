"""Activations and gradients to disk, a whole shard at a time."""

import hashlib
import importlib
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data.store import (
    Shard,
    Store,
    checked_store,
    file_sha256,
    read_store,
    shard_bytes,
    shard_taps,
    split_blocks,
    store_json,
)
from toyfeat.types import Taps


def store_writer(
    path: str | Path,
    *,
    dim: int,
    readouts: int | None = None,
    dtype: str = "float32",
    rows_per_shard: int = 65536,
    metadata: dict[str, Any] | None = None,
) -> "StoreWriter":
    """A writer of a store of activations and gradients, new or to be continued.

    A shard is gathered in memory, written under another name, synced, renamed, and
    only then recorded in ``store.json``, itself replaced in one step: a process
    that is killed loses what it had gathered since, and nothing else.  Opened again,
    the writer goes on after the last whole shard, and what comes out is the same, bit
    by bit, as if it had never stopped.  Rows of weight 0 are stored like others, so
    that ``rows`` says how far a job has come.

    Args:
      path: a folder, made if it is not there.
      dim: width ``D`` of the site.
      readouts: ``K`` gradients per example, or ``None`` for activations alone.
      dtype: ``"float32"`` or ``"bfloat16"``, of activations and gradients.
      rows_per_shard: rows of a shard; so many are held in memory.
      metadata: JSON values: model, site, readout, text.

    Returns:
      :class:`StoreWriter`: ``append(taps)``, ``rows``, ``close()``; a context.

    Raises:
      ValueError: if a setting is impossible, or differs from those of the store that
        is there, or its short last shard is damaged.
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
    settings = dim, readouts, dtype, rows_per_shard, metadata or {}
    return StoreWriter(checked_store("store_writer", path, *settings))


class StoreWriter:
    """Gathers rows and writes a shard whenever there are enough."""

    def __init__(self, wanted: Store):
        wanted.path.mkdir(parents=True, exist_ok=True)
        self._release = weakref.finalize(self, os.close, _locked(wanted.path))
        try:
            self._open(wanted)
        except BaseException:
            self._release()
            raise

    def _open(self, wanted: Store) -> None:
        store, path = wanted, wanted.path
        if (path / "store.json").exists():
            store = read_store(path, "store_writer")
            _check_same(store, wanted)
        else:
            _write(store, "store.json", store_json(store))
        self._store, self._closed = store, False
        _remove_strangers(store)
        bytes_ = np.zeros(shard_bytes(store, store.rows_per_shard), np.uint8)
        self._raw, self._held, self._old = bytes_, 0, None
        self._buffer = split_blocks(store, store.rows_per_shard, bytes_)
        if store.shards and store.shards[-1].rows < store.rows_per_shard:
            self._take_back()

    def _take_back(self) -> None:
        """A short last shard is gathered on; its file stays until there is another."""
        last = self._store.shards[-1]
        file = self._store.path / last.file
        if file_sha256(file) != last.sha256:
            raise ValueError(
                f"store_writer: {file} is not what was written; delete it and its "
                "entry in store.json, then collect its rows again"
            )
        self._copy(shard_taps(self._store, len(self._store.shards) - 1))
        self._old = last
        self._store = self._store._replace(shards=self._store.shards[:-1])

    @property
    def rows(self) -> int:
        """Rows appended so far, those of earlier processes included."""
        return self._store.rows + self._held

    def append(self, taps: Taps) -> None:
        """Add rows, in order; any number of them.

        Args:
          taps: ``acts [N, D]``, ``grads [N, K, D]`` or ``None``, ``weights [N]``,
            rounded to the dtype of the store.

        Raises:
          ValueError: if shapes are not those of the store, or it is closed.
          TypeError: if they are not floating-point.
          OSError: if a shard cannot be written (a full disk); those before it are
            whole, and the writer is closed: open it again.
        """
        if self._closed:
            raise ValueError("append: the writer is closed; call store_writer again")
        taps = jax.tree.map(np.asarray, taps)
        _check_taps(self._store, taps)
        start, rows = 0, len(taps.weights)
        while start < rows:
            stop = min(rows, start + self._store.rows_per_shard - self._held)
            part = slice(start, stop)
            self._copy(jax.tree.map(lambda x, part=part: x[part], taps))
            start = stop
            if self._held == self._store.rows_per_shard:
                self._flush()

    def close(self) -> None:
        """Write the rows that fill no shard as a short one, and let go of the store.

        Raises:
          OSError: if they cannot be written.
        """
        if self._closed:
            return
        if self._held and (self._old is None or self._held > self._old.rows):
            self._flush()
        self._closed = True
        self._release()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(self, taps: Taps) -> None:
        here = slice(self._held, self._held + len(taps.weights))
        jax.tree.map(lambda room, x: _assign(room[here], x), self._buffer, taps)
        self._held = here.stop

    def _flush(self) -> None:
        store, rows, raw = self._store, self._held, self._raw
        name = f"shard-{len(store.shards):06d}-{rows}.bin"
        if rows < store.rows_per_shard:
            raw = np.zeros(shard_bytes(store, rows), np.uint8)
            short = split_blocks(store, rows, raw)
            jax.tree.map(lambda room, x: _assign(room, x[:rows]), short, self._buffer)
        shard = Shard(name, rows, hashlib.sha256(raw.data).hexdigest())
        new = store._replace(shards=(*store.shards, shard))
        try:
            _write(store, name, raw)
            _write(store, "store.json", store_json(new))
        except OSError:
            self._closed = True
            self._release()
            raise
        self._store, self._held = new, 0
        if self._old is not None:
            (store.path / self._old.file).unlink()
            self._old = None


def _write(store: Store, name: str, content: Any) -> None:
    """A file that is there whole or not at all."""
    draft = store.path / f"{name}.tmp"
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(store.path / name)
        _sync_folder(store.path)
    except OSError as error:
        free = shutil.disk_usage(store.path).free
        draft.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"store_writer: could not write {len(content)} bytes of {name} in "
            f"{store.path} ({error.strerror}; {free} bytes are free); the "
            f"{store.rows} rows of earlier shards are whole: make room and open the "
            "store again",
        ) from error


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _locked(path: Path) -> int:
    """A descriptor that keeps other writers out for as long as it is open."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # not a POSIX system: no lock
        return os.open(os.devnull, os.O_RDONLY)
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise BlockingIOError(
            f"store_writer: another writer has {path} open; close it first"
        ) from None
    except OSError:  # a file system without locks
        pass
    return folder


def _check_same(store: Store, wanted: Store) -> None:
    for name in Store._fields[1:-1]:
        old, new = getattr(store, name), getattr(wanted, name)
        if old != new:
            raise ValueError(
                f"store_writer: {store.path} was begun with {name} = {old!r}, got "
                f"{new!r}; use the same settings or another folder"
            )


def _remove_strangers(store: Store) -> None:
    """What a killed process left: drafts, and shards it did not record."""
    known = {shard.file for shard in store.shards}
    for file in (*store.path.glob("shard-*.bin"), *store.path.glob("*.tmp")):
        if file.name not in known:
            file.unlink()


def _assign(room: np.ndarray, values: np.ndarray) -> None:
    room[...] = values


def _check_taps(store: Store, taps: Taps) -> None:
    rows = taps.acts.shape[0] if taps.acts.ndim else 0
    grads = None if store.readouts is None else (rows, store.readouts, store.dim)
    wanted = (rows, store.dim), grads, (rows,)
    if taps.targets is not None:
        raise ValueError(
            "append: a store holds one site; write targets to a store of their own"
        )
    found = tuple(None if x is None else x.shape for x in taps[:3])
    if found != wanted:
        raise ValueError(
            f"append: the store wants acts, grads, weights of shapes {wanted}, got "
            f"{found}"
        )
    for name, x in taps._asdict().items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"append: {name} must be floating-point, got {x.dtype}")
