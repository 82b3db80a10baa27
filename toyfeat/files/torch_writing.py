"""Writer of dicts of tensors in the format of ``torch.save``, without torch."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.files.atomic import open_draft
from toyfeat.files.torch_opcodes import DTYPES

_ROOT = "archive/"
_STORAGES = {np.dtype(name): kind for kind, name in DTYPES.items() if name[0] != "b"}
_PROTOCOL = b"\x80\x02"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
_NO_HOOKS = b"ccollections\nOrderedDict\n)R"
# The part of a pickle before and behind what it holds, by Python's type.
_CONSTANTS = {None: b"N", True: b"\x88", False: b"\x89"}


def save_dict(path: Path, state: Mapping[Any, Any], who: str) -> None:
    """Write a dict of dicts of arrays and plain values, as ``torch.save`` does.

    ``torch.load(path, weights_only=True)`` reads it, and so does
    :func:`toyfeat.files.torch_pickle.saved_dict`.  The file appears when all of it is
    written.

    Args:
      path: of the file.
      state: arrays of numbers of NumPy, ints, floats, texts, flags, ``None``, lists of
        these, and dicts of all by texts or ints.
      who: the function, for messages.

    Raises:
      TypeError: if there is a value of another type; nothing is written then.
      OSError: if the file cannot be written.
    """
    arrays: list[np.ndarray] = []
    pickle = _PROTOCOL + _encode(state, arrays, who) + b"."
    with (
        open_draft(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(_ROOT + "data.pkl", pickle)
        archive.writestr(_ROOT + "byteorder", "little")
        for number, array in enumerate(arrays):
            little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
            archive.writestr(f"{_ROOT}data/{number}", little.tobytes())
        archive.writestr(_ROOT + "version", "3\n")


def _encode(value: Any, arrays: list[np.ndarray], who: str) -> bytes:
    """Encode a value as opcodes; arrays are appended and referred to."""
    match value:
        case None | bool():
            return _CONSTANTS[value]
        case int():
            return _encode_int(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case list() | tuple():
            items = b"".join(_encode(item, arrays, who) for item in value)
            return b"](" + items + b"e"
        case Mapping():
            pairs = b"".join(
                _encode(key, arrays, who) + _encode(item, arrays, who)
                for key, item in value.items()
            )
            return b"}(" + pairs + b"u"
        case np.ndarray() if value.dtype in _STORAGES:
            arrays.append(value)
            return _encode_tensor(value, len(arrays) - 1)
    raise TypeError(
        f"{who}: a file of torch holds arrays, numbers, texts, flags, lists and dicts, "
        f"got {type(value).__name__}; convert it"
    )


def _encode_int(value: int) -> bytes:
    """Encode an int of any size."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


def _encode_tensor(array: np.ndarray, number: int) -> bytes:
    """Encode the call that makes a tensor of the storage of that number."""
    kind = _STORAGES[array.dtype]
    strides = [
        step // array.itemsize for step in np.empty_like(array, order="C").strides
    ]
    # ("storage", class, key, device, size), a persistent id.
    storage = (
        b"("
        + _encode("storage", [], "")
        + f"ctorch\n{kind}\n".encode()
        + _encode(str(number), [], "")
        + _encode("cpu", [], "")
        + _encode_int(array.size)
        + b"tQ"
    )
    # Storage, offset, shape, strides, requires_grad, hooks.
    shape, steps = (
        b"(" + b"".join(map(_encode_int, sizes)) + b"t"
        for sizes in (array.shape, strides)
    )
    arguments = storage + _encode_int(0) + shape + steps + b"\x89" + _NO_HOOKS
    return _REBUILD + b"(" + arguments + b"tR"
