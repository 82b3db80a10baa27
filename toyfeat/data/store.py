"""Store of activations and gradients on disk: opening and verification."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np

from toyfeat.checks import check_int
from toyfeat.data.format import (
    AGAIN,
    ALIGN,
    Shard,
    Store,
    check_shard,
    check_shards,
    empty_store,
    read_store,
    shard_bytes,
    split_blocks,
)
from toyfeat.types import Taps

__all__ = [
    "ALIGN",
    "Shard",
    "Store",
    "check_shard",
    "check_shards",
    "file_sha256",
    "open_store",
    "shard_taps",
    "store_size",
    "verify_store",
]

_READERS = 8  # threads that compute checksums; a disk gives no more bytes for more


def store_size(
    rows: int,
    *,
    dim: int,
    readouts: int | None = None,
    dtype: str = "float32",
    rows_per_shard: int = 65536,
) -> int:
    """Compute the disk space that a store will need.

    Args:
      rows: number of examples.
      dim: width of the site.
      readouts: gradients per example, or ``None``.
      dtype: ``"float32"`` or ``"bfloat16"``.
      rows_per_shard: rows of a full shard.

    Returns:
      Bytes of all shards, without ``store.json`` (about 150 bytes per shard).

    Raises:
      ValueError: if a size or the dtype is not valid.

    Example:
      >>> store_size(10**9, dim=512, readouts=1, dtype="bfloat16") / 2**40
      1.866...
    """
    rows = check_int("store_size", "rows", rows, least=0)
    store = empty_store(
        "store_size",
        "",
        dim=dim,
        readouts=readouts,
        dtype=dtype,
        rows_per_shard=rows_per_shard,
        metadata={},
    )
    size = store.rows_per_shard
    # All shards but the last are full.
    full, remainder = divmod(rows, size)
    return full * shard_bytes(store, size) + shard_bytes(store, remainder)


def open_store(path: str | Path) -> Store:
    """Open a store, and check that all its files exist and have the right size.

    The contents are not read: :func:`verify_store` does that.

    Args:
      path: the folder that :func:`store_writer` wrote.

    Returns:
      :class:`Store`.

    Raises:
      FileNotFoundError: if ``store.json`` or a shard is missing.
      ValueError: if the format is not known, or a shard has the wrong size.
    """
    store = read_store(path, "open_store")
    check_shards(store, "open_store")
    return store


def verify_store(path: str | Path) -> None:
    """Verify all bytes of a store against its checksums.

    Shards are read in parallel.  What was read before in this process is not read
    again, unless the size or a time of the file changed.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: if ``store.json`` or a shard is missing.
      ValueError: if shards are damaged; it names them.
    """
    store = open_store(path)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _READERS)) as pool:
        intact = list(pool.map(partial(_is_intact, store.path), store.shards))
    damaged = [s.file for s, ok in zip(store.shards, intact, strict=True) if not ok]
    if damaged:
        raise ValueError(
            f"verify_store: {len(damaged)} of {len(store.shards)} shards of "
            f"{store.path} are not what was written: {', '.join(damaged)}; {AGAIN}"
        )


def _is_intact(folder: Path, shard: Shard) -> bool:
    """Return whether a shard has its checksum."""
    # A file with the same inode, size and times has the same bytes as before.
    stat = (folder / shard.file).stat()
    version = stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return _sha256_of(folder / shard.file, version) == shard.sha256


@cache
def _sha256_of(file: Path, version: tuple[int, ...]) -> str:
    """Compute the checksum of a version of a file once in a process."""
    del version
    return file_sha256(file)


def shard_taps(store: Store, index: int) -> Taps:
    """Open a shard as read-only numpy arrays over a memory map.

    Args:
      store: from :func:`open_store`.
      index: number of the shard.

    Returns:
      :class:`Taps` of ``acts [n, D]``, ``grads [n, K, D]`` or ``None``, ``weights
      [n]``.

    Raises:
      FileNotFoundError: if the file is missing.
      ValueError: if it has the wrong size.
    """
    shard = store.shards[index]
    check_shard(store, shard, "shard_taps")
    mapped = np.memmap(store.path / shard.file, np.uint8, mode="r")
    return split_blocks(store, shard.rows, mapped)


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
