"""Safe reader of the state dicts that ``torch.save`` writes, without torch.

Such a file is a zip archive of raw numbers and of one pickle that describes the
tensors.  A pickle can call any function; this unpickler knows only ordered dicts,
tensors and storages, and refuses every other name.
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
    """Storage that a tensor views.

    Attributes:
      kind: name of its class in torch, which gives the dtype.
      key: name of its member of the archive.
      size: number of elements.
    """

    kind: str
    key: str
    size: int


class _View(NamedTuple):
    """Tensor as a strided view of a storage, as the pickle describes it (unchecked).

    Attributes:
      storage: a :class:`_Storage`, if the file is sound.
      offset: first element, counted in elements like the strides.
      shape: sizes of the dimensions.
      strides: steps of the dimensions.
      extras: further arguments, which only special tensors have (such as a lazy
        negation) and which are not supported.
    """

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    extras: Any


class _Unpickler(pickle.Unpickler):
    """Unpickler of ordered dicts, tensors and storages, which refuses other names."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global name to a harmless stand-in, or refuse it."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A new function each time: a pickle may set attributes of what it gets.
            return lambda storage, offset, shape, strides, _grad, _hooks, *extras: (
                _View(
                    storage=storage,
                    offset=offset,
                    shape=shape,
                    strides=strides,
                    extras=extras,
                )
            )
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only plain tensors are read"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Resolve a persistent id to the description of a storage, or refuse it."""
        match pid:
            case ("storage", str(kind), str(key), _, int(size)) if kind in _DTYPES:
                return _Storage(kind, key, size)
        raise pickle.UnpicklingError(f"it asks for {pid!r}, and only storages are read")


def state_dict(path: Path, who: str) -> dict[str, np.ndarray]:
    """Read the tensors of a state dict; bfloat16 becomes float32.

    Returns:
      Arrays by name.

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
            return _read_tensors(archive)
    except Exception as error:  # whatever a broken pickle or archive makes of it
        raise ValueError(
            f"{who}: {path} is not a state dict of plain tensors: {error}"
        ) from error


def _read_tensors(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
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
    with archive.open(root + "data.pkl") as stream:
        state = _Unpickler(stream, encoding="utf-8").load()
    if not isinstance(state, dict):
        raise ValueError(f"wanted a dict of tensors, got {type(state).__name__}")
    arrays = {}
    for name, view in dict.items(state):  # a pickle may set state.items
        if not (isinstance(name, str) and isinstance(view, _View)):
            raise ValueError(
                f"wanted a tensor under every name, got {type(view).__name__} under "
                f"{name!r}"
            )
        arrays[name] = _read_array(name, view, archive, root, order)
    return arrays


def _read_array(
    name: str, view: _View, archive: zipfile.ZipFile, root: str, order: str
) -> np.ndarray:
    """Read the array of a view, after checking that it lies within its storage."""
    # Check the description, all of which comes from the file.
    storage, offset, shape, strides, extras = view
    numbers = (offset, *shape, *strides)
    sound = (
        isinstance(storage, _Storage) and len(shape) == len(strides) and not any(extras)
    )
    if not sound or any(type(x) is not int or x < 0 for x in numbers):
        raise ValueError(f"the tensor {name!r} has no sound description, but {view}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count > storage.size or (count and last >= storage.size):
        raise ValueError(f"the tensor {name!r} is larger than its storage: {view}")
    # numpy has no bfloat16: its bits are read as integers.
    bfloat16 = storage.kind == "BFloat16Storage"
    dtype = np.dtype("uint16" if bfloat16 else _DTYPES[storage.kind])
    if not count:
        return np.zeros(shape, np.float32 if bfloat16 else dtype)
    # Read the storage and check its size.
    raw = archive.read(f"{root}data/{storage.key}")
    if len(raw) != storage.size * dtype.itemsize:
        raise ValueError(
            f"the tensor {name!r} has {len(raw)} bytes for {storage.size} numbers"
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
