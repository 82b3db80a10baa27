"""Tensors from what ``torch.save`` wrote, without torch and without running it.

Such a file is a zip archive of raw numbers and of one pickle that says which tensor
is where.  A pickle may call anything; this one may name what tensors are made of.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Storage(NamedTuple):
    kind: str
    key: str
    size: int


class _View(NamedTuple):
    storage: Any
    offset: Any
    shape: Any
    strides: Any
    more: Any  # what only some tensors have, such as a sign to be turned


class _Unpickler(pickle.Unpickler):
    """Finds ordered dicts, tensors and storages, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A new one each time: a pickle may set attributes of what it is given.
            return lambda storage, offset, shape, strides, _grad, _hooks, *more: _View(
                storage, offset, shape, strides, more
            )
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only plain tensors are read"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), _, int(size)) if kind in _DTYPES:
                return _Storage(kind, key, size)
        raise pickle.UnpicklingError(f"it asks for {pid!r}, and only storages are read")


def state_dict(path: Path, who: str) -> dict[str, np.ndarray]:
    """The tensors of a state dict; those of bfloat16 become float32.

    Raises:
      ValueError: if the file is not a zip archive with a dict of plain tensors.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{who}: wanted a zip archive, which torch.save writes since torch 1.6, "
            f"{path} is none; load it with torch and save it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors(archive)
    except Exception as error:  # whatever a broken pickle or archive makes of it
        raise ValueError(
            f"{who}: {path} is not a state dict of plain tensors: {error}"
        ) from error


def _tensors(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    names = archive.namelist()
    roots = [n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"wanted one data.pkl in it, got {names[:9]}")
    (root,) = roots
    order = "little"
    if root + "byteorder" in names:
        order = archive.read(root + "byteorder").decode()
    with archive.open(root + "data.pkl") as stream:
        found = _Unpickler(stream, encoding="utf-8").load()
    if not isinstance(found, dict):
        raise ValueError(f"wanted a dict of tensors, got {type(found).__name__}")
    arrays = {}
    for name, view in dict.items(found):
        if not (isinstance(name, str) and isinstance(view, _View)):
            raise ValueError(
                f"wanted a tensor under every name, got {type(view).__name__} under "
                f"{name!r}"
            )
        arrays[name] = _array(name, view, archive, root, order)
    return arrays


def _array(
    name: str, view: _View, archive: zipfile.ZipFile, root: str, order: str
) -> np.ndarray:
    storage, offset, shape, strides, more = view
    numbers = (offset, *shape, *strides)
    sound = (
        isinstance(storage, _Storage) and len(shape) == len(strides) and not any(more)
    )
    if not sound or any(type(x) is not int or x < 0 for x in numbers):
        raise ValueError(f"the tensor {name!r} has no sound description, but {view}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count > storage.size or (count and last >= storage.size):
        raise ValueError(f"the tensor {name!r} is larger than its storage: {view}")
    wide = storage.kind == "BFloat16Storage"
    dtype = np.dtype("uint16" if wide else _DTYPES[storage.kind])
    if not count:
        return np.zeros(shape, np.float32 if wide else dtype)
    raw = archive.read(f"{root}data/{storage.key}")
    if len(raw) != storage.size * dtype.itemsize:
        raise ValueError(
            f"the tensor {name!r} has {len(raw)} bytes for {storage.size} numbers"
        )
    ordered = dtype.newbyteorder("<" if order == "little" else ">")
    values = np.frombuffer(raw, ordered)[offset:]
    steps = [dtype.itemsize * s for s in strides]
    values = np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False)
    values = np.array(values, dtype, order="C")
    if wide:  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values
