"""Activations and gradients on disk: what the files are, opening and checking."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.types import Taps

VERSION = 1
ALIGN = 64
_DTYPES = ("float32", "bfloat16")


class Shard(NamedTuple):
    """A file of a store.

    Attributes:
      file: its name in the folder.
      rows: examples in it; every shard but the last is full.
      sha256: of its bytes.
    """

    file: str
    rows: int
    sha256: str


class Store(NamedTuple):
    """A folder of activations and gradients, with nothing of them in memory.

    ``store.json`` holds these fields.  A shard of ``n`` rows is ``acts [n, D]``,
    ``grads [n, K, D]`` (if there are any) and ``weights [n]`` (always float32), each
    little-endian, in C order and followed by zeros up to a multiple of 64 bytes.

    Attributes:
      path: the folder.
      dim: ``D``, the width of the site.
      readouts: ``K``, or ``None`` without gradients.
      dtype: ``"float32"`` or ``"bfloat16"``, of ``acts`` and ``grads``.
      rows_per_shard: rows of a full shard.
      metadata: JSON values: model, site, readout, text.
      shards: its whole shards.
    """

    path: Path
    dim: int
    readouts: int | None
    dtype: str
    rows_per_shard: int
    metadata: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """How many examples there are."""
        return sum(shard.rows for shard in self.shards)


def store_size(
    rows: int,
    *,
    dim: int,
    readouts: int | None = None,
    dtype: str = "float32",
    rows_per_shard: int = 65536,
) -> int:
    """Bytes that the shards of a store will take.

    Args:
      rows: examples to be stored.
      dim: width of the site.
      readouts: gradients per example, or ``None``.
      dtype: ``"float32"`` or ``"bfloat16"``.
      rows_per_shard: rows of a full shard.

    Returns:
      The sum of the sizes of the files, without ``store.json`` (about 150 bytes a
      shard).

    Raises:
      ValueError: if a size or the dtype is not possible.

    Example:
      >>> store_size(10**9, dim=512, readouts=1, dtype="bfloat16") / 2**40
      1.866...
    """
    if rows < 0:
        raise ValueError(f"store_size: rows must not be negative, got {rows}")
    store = checked_store("store_size", "", dim, readouts, dtype, rows_per_shard, {})
    full, left = divmod(rows, rows_per_shard)
    return full * shard_bytes(store, rows_per_shard) + shard_bytes(store, left)


def open_store(path: str | Path) -> Store:
    """The store in a folder, all of its files there and of the right size.

    Contents are not read: :func:`verify_store` does that.

    Args:
      path: the folder that :func:`store_writer` wrote.

    Returns:
      :class:`Store`.

    Raises:
      FileNotFoundError: if ``store.json`` or a shard is missing.
      ValueError: if the format is another one, or a shard has the wrong size.
    """
    store = read_store(path, "open_store")
    for shard in store.shards:
        file = store.path / shard.file
        if not file.exists():
            raise FileNotFoundError(f"open_store: shard {file} is missing")
        wanted, size = shard_bytes(store, shard.rows), file.stat().st_size
        if size != wanted:
            raise ValueError(
                f"open_store: {file} must have {wanted} bytes for {shard.rows} rows, "
                f"got {size}; copy it again, or collect again without it"
            )
    return store


def verify_store(path: str | Path) -> None:
    """Check every byte of a store against its checksums.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: if ``store.json`` or a shard is missing.
      ValueError: if shards are not what was written; names them.
    """
    store = open_store(path)
    bad = [s.file for s in store.shards if file_sha256(store.path / s.file) != s.sha256]
    if bad:
        raise ValueError(
            f"verify_store: {len(bad)} of {len(store.shards)} shards of {store.path} "
            f"are not what was written: {', '.join(bad)}"
        )


def shard_taps(store: Store, index: int) -> Taps:
    """A shard as arrays of numpy over its memory map, read-only.

    Args:
      store: from :func:`open_store`.
      index: which shard.

    Returns:
      :class:`Taps` of ``acts [n, D]``, ``grads [n, K, D]`` or ``None``, ``weights
      [n]``.
    """
    shard = store.shards[index]
    mapped = np.memmap(store.path / shard.file, np.uint8, mode="r")
    return split_blocks(store, shard.rows, mapped)


def checked_store(
    who: str,
    path: str | Path,
    dim: int,
    readouts: int | None,
    dtype: str,
    rows_per_shard: int,
    metadata: dict[str, Any],
) -> Store:
    """An empty store with these settings, or an error that says what is wrong."""
    sizes = {"dim": dim, "readouts": readouts, "rows_per_shard": rows_per_shard}
    for name, size in sizes.items():
        if size is None and name == "readouts":
            continue
        if not (isinstance(size, int) and size > 0):
            raise ValueError(f"{who}: {name} must be an int above 0, got {size!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"{who}: dtype must be one of {_DTYPES}, got {dtype!r}")
    plain = json.loads(json.dumps(metadata))
    return Store(Path(path), dim, readouts, dtype, rows_per_shard, plain, ())


def read_store(path: str | Path, who: str) -> Store:
    """What ``store.json`` says, without a look at the shards."""
    file = Path(path) / "store.json"
    if not file.exists():
        raise FileNotFoundError(f"{who}: there is no {file}")
    saved = json.loads(file.read_text(encoding="utf-8"))
    if saved.get("format") != "toyfeat store" or saved.get("version") != VERSION:
        raise ValueError(
            f"{who}: wanted a toyfeat store of version {VERSION}, {file} says "
            f"{saved.get('format')!r}, version {saved.get('version')!r}"
        )
    settings = {name: saved[name] for name in Store._fields[1:-1]}
    shards = tuple(Shard(**shard) for shard in saved["shards"])
    return Store(Path(path), **settings, shards=shards)


def store_json(store: Store) -> bytes:
    """The contents of ``store.json``."""
    settings = {name: getattr(store, name) for name in Store._fields[1:-1]}
    shards = [shard._asdict() for shard in store.shards]
    head = {"format": "toyfeat store", "version": VERSION}
    text = json.dumps({**head, **settings, "shards": shards}, indent=1)
    return (text + "\n").encode()


def shard_bytes(store: Store, rows: int) -> int:
    """Size of a shard of so many rows."""
    return sum(_padded(block) for block in _blocks(store, rows))


def split_blocks(store: Store, rows: int, raw: np.ndarray) -> Taps:
    """The arrays of a shard as views of its bytes."""
    width = np.dtype(jnp.dtype(store.dtype)).newbyteorder("<")
    sizes = _blocks(store, rows)
    starts = np.cumsum([0, *(_padded(size) for size in sizes)])
    acts, grads, weights = (
        raw[start : start + size] for start, size in zip(starts, sizes, strict=False)
    )
    shape = (rows, store.readouts or 0, store.dim)
    return Taps(
        acts.view(width).reshape(rows, store.dim),  # pyright: ignore[reportArgumentType]
        grads.view(width).reshape(shape) if store.readouts else None,  # pyright: ignore[reportArgumentType]
        weights.view("<f4"),  # pyright: ignore[reportArgumentType]
    )


def file_sha256(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(store: Store, rows: int) -> tuple[int, int, int]:
    """Bytes of ``acts``, ``grads`` and ``weights``."""
    acts = rows * store.dim * np.dtype(jnp.dtype(store.dtype)).itemsize
    return acts, acts * (store.readouts or 0), rows * 4


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
