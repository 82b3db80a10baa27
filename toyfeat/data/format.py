"""Format of a store: its record, ``store.json``, and layout and size of a shard."""

import contextlib
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_choice, check_int
from toyfeat.files.json import field, read_json
from toyfeat.files.paths import inside
from toyfeat.types import Taps

RECORD = "store.json"
VERSION = 1  # of the format of store.json
ALIGN = 64  # bytes; JAX on a CPU uses host memory of this alignment without a copy
AGAIN = "restore the store from a copy, or collect it again in another folder"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_DTYPES = tuple(_ITEM_BYTES)
_SHARD_NAME = re.compile(r"shard-\d{6,9}-\d{1,10}(-\d{1,6})?\.bin")


class Shard(NamedTuple):
    """File of a store.

    Attributes:
      file: name in the folder.
      rows: number of examples; every shard but the last is full.
      sha256: checksum of the bytes.
    """

    file: str
    rows: int
    sha256: str


class Store(NamedTuple):
    """Folder of activations and gradients, none of which are in memory.

    ``store.json`` holds these fields.  A shard of ``n`` rows is ``acts [n, D]``,
    ``grads [n, K, D]`` (unless ``readouts`` is ``None``) and ``weights [n]`` (always
    float32), each little-endian, in C order and padded with zeros to a multiple of
    64 bytes.

    Attributes:
      path: the folder.
      dim: width ``D`` of the site.
      readouts: gradients ``K`` per example, or ``None`` without gradients.
      dtype: ``"float32"`` or ``"bfloat16"``, of ``acts`` and ``grads``.
      rows_per_shard: rows of a full shard.
      metadata: JSON values that describe model, site, readout and text.
      shards: completed shards.
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
        """Number of examples."""
        return sum(shard.rows for shard in self.shards)


def empty_store(
    who: str,
    path: str | Path,
    *,
    dim: int,
    readouts: int | None,
    dtype: str,
    rows_per_shard: int,
    metadata: dict[str, Any],
) -> Store:
    """Create the record of a store without shards, after checking its settings.

    Raises:
      ValueError: if a size or the dtype is not valid; ``who`` opens the message.
    """
    check_choice(who, "dtype", dtype, _DTYPES)
    if readouts is not None:
        readouts = check_int(who, "readouts", readouts)
    return Store(
        path=Path(path),
        dim=check_int(who, "dim", dim),
        readouts=readouts,
        dtype=dtype,
        rows_per_shard=check_int(who, "rows_per_shard", rows_per_shard),
        metadata=_json_copy(who, metadata),
        shards=(),
    )


def _json_copy(who: str, metadata: Any) -> dict[str, Any]:
    """Convert metadata to the values that will be read again.

    Raises:
      TypeError: if they are not a dict of JSON values.
    """
    copy: Any = None
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        copy = json.loads(json.dumps(metadata))
    if not isinstance(copy, dict):
        raise TypeError(
            f"{who}: metadata must be a dict of JSON values, got {metadata!r:.80}; "
            "convert arrays and sets to lists"
        )
    return copy


def read_store(path: str | Path, who: str, record: str = RECORD) -> Store:
    """Read the record of a store, without looking at the shards.

    Args:
      path: the folder.
      who: the function, for messages.
      record: name of the file, another one for what one of several processes wrote.

    Returns:
      :class:`Store`.

    Raises:
      FileNotFoundError: if there is no ``store.json``.
      ValueError: if it is damaged, of another format, or names files outside.
    """
    # The format first: other versions may have other fields.
    file = Path(path) / record
    saved = read_json(file, who, advice=AGAIN)
    if saved.get("format") != "toyfeat store" or saved.get("version") != VERSION:
        raise ValueError(
            f"{who}: wanted a toyfeat store of version {VERSION}, {file} says "
            f"{saved.get('format')!r:.80}, version {saved.get('version')!r:.80}; "
            f"{AGAIN}"
        )
    # Fields, each with its type and range, then how they fit each other.
    read = partial(field, saved, source=file, who=who)
    store = Store(
        path=Path(path),
        dim=read("dim", kind=int, low=1),
        readouts=read("readouts", kind=int, low=1, default=None),
        dtype=read("dtype", kind=str),
        rows_per_shard=read("rows_per_shard", kind=int, low=1),
        metadata=read("metadata", kind=dict),
        shards=tuple(
            _read_shard(entry, file, who) for entry in read("shards", kind=list)
        ),
    )
    if store.dtype not in _DTYPES:
        raise ValueError(
            f"{who}: dtype in {file} must be one of {_DTYPES}, got "
            f"{store.dtype!r:.80}; {AGAIN}"
        )
    _check_numbers(store, file, who)
    return store


def is_shard_name(name: str) -> bool:
    """Return whether a file name is one that a writer gives to shards."""
    return _SHARD_NAME.fullmatch(name) is not None


def _read_shard(entry: Any, file: Path, who: str) -> Shard:
    """Read the entry of a shard in ``store.json``."""
    if not isinstance(entry, dict):
        raise ValueError(
            f"{who}: shards in {file} must be objects, got {entry!r:.80}; {AGAIN}"
        )
    read = partial(field, entry, source=file, who=who)
    shard = Shard(
        file=read("file", kind=str),
        rows=read("rows", kind=int, low=1),
        sha256=read("sha256", kind=str),
    )
    if not is_shard_name(shard.file):
        raise ValueError(
            f"{who}: {file} names a shard {shard.file!r:.80}, wanted a name in its "
            f"folder such as shard-000000-8.bin; {AGAIN}"
        )
    return shard


def _check_numbers(store: Store, file: Path, who: str) -> None:
    """Raise a ValueError for shards that are not full, or that are listed twice."""
    # The place of a row follows from the shard's number only if all before are full.
    *full, _ = [shard.rows for shard in store.shards] or [0]
    fits = all(rows == store.rows_per_shard for rows in full)
    fits = fits and all(s.rows <= store.rows_per_shard for s in store.shards)
    if not fits or len({shard.file for shard in store.shards}) < len(store.shards):
        raise ValueError(
            f"{who}: shards in {file} must be different files of "
            f"{store.rows_per_shard} rows, the last one of no more; {AGAIN}"
        )


def store_json(store: Store) -> bytes:
    """Serialize a store as the contents of ``store.json``."""
    settings = {name: getattr(store, name) for name in Store._fields[1:-1]}
    shards = [shard._asdict() for shard in store.shards]
    head = {"format": "toyfeat store", "version": VERSION}
    text = json.dumps({**head, **settings, "shards": shards}, indent=1)
    return (text + "\n").encode()


def check_shards(store: Store, who: str) -> None:
    """Check that all shards of a store exist and have the right size.

    Raises:
      FileNotFoundError: if a shard is missing.
      ValueError: if a shard has the wrong size or is a link out of the folder.
    """
    for shard in store.shards:
        inside(store.path, shard.file, who)
        check_shard(store, shard, who)


def check_shard(store: Store, shard: Shard, who: str) -> None:
    """Check that a shard exists and has the right size.

    Cheap, so readers do it before every access: a process that reads a memory map
    beyond the end of a file that was cut short is ended by the system.

    Raises:
      FileNotFoundError: if the shard is missing.
      ValueError: if it has the wrong size.
    """
    file = os.path.join(store.path, shard.file)
    try:
        size = os.stat(file).st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{who}: shard {file} is missing; bring it back, or take its entry out of "
            "store.json and collect its rows again"
        ) from None
    wanted = shard_bytes(store, shard.rows)
    if size != wanted:
        raise ValueError(
            f"{who}: {file} must have {wanted} bytes for {shard.rows} rows, got "
            f"{size}; copy it again, or collect again without it"
        )


def shard_bytes(store: Store, rows: int) -> int:
    """Compute the size of a shard with a given number of rows."""
    return sum(_padded_size(block) for block in _block_sizes(store, rows))


def split_blocks(store: Store, rows: int, raw: np.ndarray) -> Taps:
    """View the bytes of a shard as its arrays."""
    # Blocks one after the other, each padded: views, so that nothing is read yet.
    dtype = np.dtype(jnp.dtype(store.dtype)).newbyteorder("<")
    sizes = _block_sizes(store, rows)
    starts = np.cumsum([0, *(_padded_size(size) for size in sizes)])
    acts, grads, weights = (
        raw[start : start + size] for start, size in zip(starts, sizes, strict=False)
    )
    shape = (rows, store.readouts or 0, store.dim)
    return Taps(
        acts.view(dtype).reshape(rows, store.dim),  # pyright: ignore[reportArgumentType]
        grads.view(dtype).reshape(shape) if store.readouts else None,  # pyright: ignore[reportArgumentType]
        weights.view("<f4"),  # pyright: ignore[reportArgumentType]
    )


def _block_sizes(store: Store, rows: int) -> tuple[int, int, int]:
    """Compute the sizes in bytes of ``acts``, ``grads`` and ``weights``."""
    acts = rows * store.dim * _ITEM_BYTES[store.dtype]
    return acts, acts * (store.readouts or 0), rows * 4


def _padded_size(size: int) -> int:
    """Round a size up to a multiple of ``ALIGN`` bytes."""
    return -(-size // ALIGN) * ALIGN
