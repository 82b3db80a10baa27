"""Safe reader of the dicts that ``torch.save`` writes, without torch.

Such a file is a zip archive of raw numbers and of one pickle that describes the
tensors, which :mod:`toyfeat.files.torch_opcodes` runs.
"""

import contextlib
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toyfeat.files.archives import open_archive
from toyfeat.files.torch_opcodes import DTYPES, Storage, View, shortened, unpickle

_MAX_PICKLE = 2**18  # bytes: 1300 tensors at 200 bytes; at most 2 s and 60 MB to run
_MAX_SHARES = 8  # tensors of one storage: tied weights, or one storage for a module
_MAX_DIMS = 64  # of an array, as in numpy
_MAX_REASON = 400  # characters of what is said about a file: a few lines
_MAX_DEPTH = 3  # dicts inside of each other, as in a lens with metadata
_MAX_LEAVES = 2**14  # tensors and values of a dict of dicts

Key = tuple[str | int, ...]
"""Keys of a value in a dict of dicts, the outer one first."""


class SavedDict(NamedTuple):
    """Contents of a dict of dicts of tensors and plain values.

    Attributes:
      tensors: by their keys.
      values: numbers, texts and flags, and lists of them, by their keys.
    """

    tensors: dict[Key, np.ndarray]
    values: dict[Key, Any]


def state_dict(path: Path, who: str) -> dict[str, np.ndarray]:
    """Read the tensors of a state dict; bfloat16 becomes float32.

    Returns:
      Arrays by name.

    Raises:
      ValueError: if the file is not a zip archive with a dict of plain tensors.
    """
    contents = _read_archive(path, who, depth=1)
    return {str(name): array for (name,), array in contents.tensors.items()}


def saved_dict(path: Path, who: str) -> SavedDict:
    """Read a dict of dicts of tensors and plain values, of three levels at most.

    Keys are texts or ints.  Nothing of the file is run.

    Returns:
      :class:`SavedDict`; bfloat16 becomes float32.

    Raises:
      ValueError: if the file is not a zip archive with such a dict, or is too large.
    """
    return _read_archive(path, who, depth=_MAX_DEPTH)


def _read_archive(path: Path, who: str, *, depth: int) -> SavedDict:
    """Open an archive and read what is in it."""
    is_archive = True
    with contextlib.suppress(zipfile.BadZipFile):  # one that is damaged, see below
        is_archive = zipfile.is_zipfile(path)
    if not is_archive:
        raise ValueError(
            f"{who}: wanted a zip archive, which torch.save writes since torch 1.6, "
            f"{path} is none; load it with torch and save it again"
        )
    try:
        with open(path, "rb") as file, open_archive(file) as archive:
            return _read_contents(archive, depth)
    except Exception as error:  # whatever a broken archive makes of it
        reason = shortened(str(error), _MAX_REASON)
        raise ValueError(
            f"{who}: {path} is not a state dict of plain tensors: {reason}; fetch it "
            "again, or load it with torch and save its state_dict()"
        ) from error


def _read_contents(archive: zipfile.ZipFile, depth: int) -> SavedDict:
    """Read the pickle of an archive and every tensor that it describes."""
    # The members lie in a folder that is named after the file.
    names = archive.namelist()
    roots = [n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"wanted one data.pkl in it, got {names[:9]}")
    (root,) = roots
    order = "little"
    if root + "byteorder" in names:
        order = archive.read(root + "byteorder").decode()
    if order not in ("little", "big"):
        raise ValueError(f"wanted the byte order little or big, got {shortened(order)}")
    # Unpickle the descriptions of the tensors, and check all of them.
    size = archive.getinfo(root + "data.pkl").file_size
    if size > _MAX_PICKLE:
        raise ValueError(f"wanted at most {_MAX_PICKLE} bytes of data.pkl, got {size}")
    state = unpickle(archive.read(root + "data.pkl"))
    if not isinstance(state, dict):
        raise ValueError(f"wanted a dict of tensors, got {type(state).__name__}")
    views, values = _leaves(state, depth)
    return SavedDict(_read_views(archive, root, order, views), values)


def _leaves(state: dict[Any, Any], depth: int) -> tuple[dict[Key, Any], dict[Key, Any]]:
    """Walk through a dict of dicts down to views and plain values.

    A dict of depth 1 has tensors alone, which is checked with them.
    """
    views, values = {}, {}
    queue: list[tuple[Key, dict[Any, Any]]] = [((), state)]
    visited = 0
    for keys, inner in queue:
        for key, value in inner.items():
            at = (*keys, key)
            # Dicts that share each other would never end.
            visited += depth > 1
            if visited > _MAX_LEAVES:
                raise ValueError(f"wanted at most {_MAX_LEAVES} tensors and values")
            if type(value) is dict and len(at) < depth:
                queue.append((at, value))
            elif depth == 1 or isinstance(value, View):
                views[at] = value
            elif _is_plain(value):
                values[at] = value
            else:
                raise ValueError(
                    "wanted tensors, numbers, texts and flags in it, got "
                    f"{type(value).__name__} under {_label(at)}"
                )
    return views, values


def _is_plain(value: Any) -> bool:
    """Tell whether a value is plain, or a list of plain values."""
    values = value if type(value) in (list, tuple) else (value,)
    return all(type(x) in (bool, int, float, str, type(None)) for x in values)


def _label(key: Key) -> str:
    """Name a tensor in messages."""
    if len(key) == 1 and type(key[0]) is int:
        return str(key[0])
    return repr(shortened("/".join(map(str, key))))


def _read_views(
    archive: zipfile.ZipFile, root: str, order: str, views: dict[Key, Any]
) -> dict[Key, np.ndarray]:
    """Read the tensors that views describe, after checking all of them."""
    counts = {name: _checked_count(name, view) for name, view in views.items()}
    # Views may share a storage, but not make much of little.
    shares: dict[str, int] = {}
    for name, view in views.items():
        key, size = view.storage.key, view.storage.size
        shares[key] = shares.get(key, 0) + counts[name]
        if shares[key] > _MAX_SHARES * size:
            raise ValueError(
                f"its tensors have {shares[key]} numbers of one storage, which has "
                f"only {size}"
            )
    # Read every storage once, and keep it until the last of its tensors is copied.
    last_use = {view.storage.key: name for name, view in views.items()}
    arrays, storages = {}, {}
    for name, view in views.items():
        key = view.storage.key
        if counts[name] and key not in storages:
            storages[key] = archive.read(f"{root}data/{key}")
        arrays[name] = _copied_array(name, view, storages.get(key, b""), order)
        if last_use[key] == name:
            storages.pop(key, None)
    return arrays


def _checked_count(name: Key, view: Any) -> int:
    """Count the elements of a view, after checking that it lies within its storage."""
    label = _label(name)
    if not isinstance(view, View) or type(name[0]) is int:
        raise ValueError(
            f"wanted a tensor under every name, got {type(view).__name__} under {label}"
        )
    storage, offset, shape, strides, extras = view
    # Check the description, all of which comes from the file.
    sound = (
        isinstance(storage, Storage)
        and type(shape) is type(strides) is tuple
        and len(shape) == len(strides) <= _MAX_DIMS
        and all(type(x) is int and x >= 0 for x in (offset, *shape, *strides))
        and not any(type(extra) is not dict or extra for extra in extras)
    )
    if not sound:
        raise ValueError(f"the tensor {label} has no sound description")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count > storage.size or (count and last >= storage.size):
        raise ValueError(
            f"the tensor {label} is larger than its storage of {storage.size} numbers: "
            f"offset {offset}, shape {shape}, strides {strides}"
        )
    return count


def _copied_array(name: Key, view: View, raw: bytes, order: str) -> np.ndarray:
    """Copy the array of a view out of the bytes of its storage."""
    storage, offset, shape, strides, _ = view
    # numpy has no bfloat16: its bits are read as integers.
    bfloat16 = storage.kind == "BFloat16Storage"
    dtype = np.dtype("uint16" if bfloat16 else DTYPES[storage.kind])
    if not math.prod(shape):
        return np.zeros(shape, np.float32 if bfloat16 else dtype)
    if len(raw) != storage.size * dtype.itemsize:
        raise ValueError(
            f"the tensor {_label(name)} has {len(raw)} bytes for {storage.size} numbers"
        )
    # View the elements with the byte order of the file, and copy them in C order.
    ordered = dtype.newbyteorder("<" if order == "little" else ">")
    values = np.frombuffer(raw, ordered)[offset:]
    byte_strides = [dtype.itemsize * s for s in strides]
    values = np.lib.stride_tricks.as_strided(
        values, shape, byte_strides, writeable=False
    )
    values = np.array(values, dtype, order="C")
    if bfloat16:  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values
