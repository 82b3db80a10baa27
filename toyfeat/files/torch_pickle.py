"""Safe reader of the state dicts that ``torch.save`` writes, without torch.

Such a file is a zip archive of raw numbers and of one pickle that describes the
tensors.  A pickle can call any function, nest values until Python's own unpickler
crashes, and share them until looking at one never ends.  So the opcodes are run here:
those for dicts of tensors are known, and every other opcode or name is refused.
"""

import contextlib
import math
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toyfeat.files.archives import open_archive

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

# Opcodes by what they do; the number of operands is None where a mark has their start.
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
_LITERALS |= {"FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"}
_MEMOIZING = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_OPERANDS = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
_OPERANDS |= {"EMPTY_LIST": 0, "LIST": None, "APPEND": 1, "APPENDS": None}
_OPERANDS |= {"EMPTY_DICT": 0, "DICT": None, "SETITEM": 2, "SETITEMS": None}
_OPERANDS |= {"GLOBAL": 0, "STACK_GLOBAL": 2, "REDUCE": 2, "BUILD": 1}
_OPERANDS |= {"BINPERSID": 1, "PERSID": 0}

_MAX_PICKLE = 2**18  # bytes: 1300 tensors at 200 bytes; at most 2 s and 60 MB to run
_MAX_SHARES = 8  # tensors of one storage: tied weights, or one storage for a module
_MAX_DIMS = 64  # of an array, as in numpy
_MAX_NAME = 80  # characters of a name in a message: about a line
_MAX_REASON = 400  # characters of what is said about a file: a few lines


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


def _unpickle(data: bytes) -> Any:
    """Run the opcodes of a pickle that state dicts consist of.

    Nothing of the file is called, hashed, compared or formatted but strings and
    integers.  So nesting costs nothing, and memory and time are bounded by the bytes:
    an opcode of one byte adds one value at most.

    Raises:
      ValueError: if there is another opcode, or one that asks for something else.
    """
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[Any, Any] = {}
    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        try:
            if name == "STOP":
                if len(stack) != 1:
                    raise IndexError(len(stack))
                return stack[0]
            if name == "MARK":
                marks.append(len(stack))
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                stack.append(argument)
            elif name in _MEMOIZING:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _OPERANDS:
                count = _OPERANDS[name]
                start = marks.pop() if count is None else len(stack) - count
                if start < 0:
                    raise IndexError(start)
                operands = stack[start:]
                del stack[start:]
                _apply(name, argument, operands, stack)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"its pickle has {name}, which no tensor needs")
        except (IndexError, KeyError):
            raise ValueError(f"its pickle is damaged at byte {position}") from None
    raise ValueError("its pickle has no end")


def _apply(name: str, argument: Any, operands: list[Any], stack: list[Any]) -> None:
    """Apply an opcode to its operands, and push the result."""
    match name:
        case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "EMPTY_TUPLE":
            stack.append(tuple(operands))
        case "LIST" | "EMPTY_LIST":
            stack.append(operands)
        case "DICT" | "EMPTY_DICT":
            stack.append(_add_items({}, operands))
        case "SETITEM" | "SETITEMS":
            _add_items(stack[-1], operands)
        case "APPEND" | "APPENDS":
            if type(stack[-1]) is not list:
                raise ValueError("its pickle appends to what is no list")
            stack[-1].extend(operands)
        case "GLOBAL":
            module, _, member = argument.partition(" ")
            stack.append(_global(module, member))
        case "STACK_GLOBAL":
            stack.append(_global(*operands))
        case "REDUCE":
            stack.append(_call(*operands))
        case "BINPERSID":
            stack.append(_storage(*operands))
        case "BUILD":  # attributes, such as the versions of the state of a module
            if type(stack[-1]) is not dict:
                raise ValueError("its pickle sets attributes of what is no dict")
        case "PERSID":
            raise ValueError(
                "it asks for an object by name, and only storages are read"
            )


def _add_items(state: Any, operands: list[Any]) -> dict[str, Any]:
    """Add keys and values, which alternate, to a dict."""
    if type(state) is not dict or len(operands) % 2:
        raise ValueError("its pickle sets items of what is no dict")
    for key, value in zip(operands[::2], operands[1::2], strict=True):
        if type(key) is not str:
            key_text = key if type(key) is int else f"a {type(key).__name__}"
            raise ValueError(
                f"wanted a tensor under every name, got {type(value).__name__} under "
                f"{key_text}"
            )
        state[key] = value
    return state


def _global(module: Any, name: Any) -> Any:
    """Resolve a global name to a harmless stand-in, or refuse it."""
    names = (module, name)
    if type(module) is not str or type(name) is not str:
        raise ValueError("its pickle has a global name that is no text")
    if names == ("collections", "OrderedDict"):
        return OrderedDict
    if names == ("torch._utils", "_rebuild_tensor_v2"):
        return _View
    if module == "torch" and name in _DTYPES:
        return name
    raise ValueError(
        f"it asks for {_shortened(f'{module}.{name}')}, and only plain tensors are read"
    )


def _call(function: Any, arguments: Any) -> Any:
    """Make the empty dict or the tensor that a pickle asks for."""
    if type(arguments) is tuple:
        if function is OrderedDict and not arguments:
            return {}
        if function is _View and len(arguments) >= 6:
            storage, offset, shape, strides, _grad, _hooks, *extras = arguments
            return _View(
                storage=storage,
                offset=offset,
                shape=shape,
                strides=strides,
                extras=tuple(extras),
            )
    raise ValueError("its pickle calls a function otherwise than torch.save does")


def _storage(pid: Any) -> _Storage:
    """Resolve a persistent id to the description of a storage, or refuse it."""
    if type(pid) is tuple:
        match pid:
            case ("storage", str(kind), str(key), _, int(size)) if kind in _DTYPES:
                return _Storage(kind, key, size)
    raise ValueError("it asks for another object, and only storages are read")


def _shortened(text: str, most: int = _MAX_NAME) -> str:
    """Cut a text of the file to what a message has room for."""
    return text if len(text) <= most else f"{text[:most]}..."


def state_dict(path: Path, who: str) -> dict[str, np.ndarray]:
    """Read the tensors of a state dict; bfloat16 becomes float32.

    Returns:
      Arrays by name.

    Raises:
      ValueError: if the file is not a zip archive with a dict of plain tensors.
    """
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
            return _read_tensors(archive)
    except Exception as error:  # whatever a broken archive makes of it
        reason = _shortened(str(error), _MAX_REASON)
        raise ValueError(
            f"{who}: {path} is not a state dict of plain tensors: {reason}; fetch it "
            "again, or load it with torch and save its state_dict()"
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
    if order not in ("little", "big"):
        raise ValueError(
            f"wanted the byte order little or big, got {_shortened(order)}"
        )
    # Unpickle the descriptions of the tensors, and check all of them.
    size = archive.getinfo(root + "data.pkl").file_size
    if size > _MAX_PICKLE:
        raise ValueError(f"wanted at most {_MAX_PICKLE} bytes of data.pkl, got {size}")
    state = _unpickle(archive.read(root + "data.pkl"))
    if not isinstance(state, dict):
        raise ValueError(f"wanted a dict of tensors, got {type(state).__name__}")
    counts = {name: _checked_count(name, view) for name, view in state.items()}
    # Views may share a storage, but not make much of little.
    shares: dict[str, int] = {}
    for name, view in state.items():
        key, size = view.storage.key, view.storage.size
        shares[key] = shares.get(key, 0) + counts[name]
        if shares[key] > _MAX_SHARES * size:
            raise ValueError(
                f"its tensors have {shares[key]} numbers of one storage, which has "
                f"only {size}"
            )
    # Read every storage once, and keep it until the last of its tensors is copied.
    last_use = {view.storage.key: name for name, view in state.items()}
    arrays, storages = {}, {}
    for name, view in state.items():
        key = view.storage.key
        if counts[name] and key not in storages:
            storages[key] = archive.read(f"{root}data/{key}")
        arrays[name] = _copied_array(name, view, storages.get(key, b""), order)
        if last_use[key] == name:
            storages.pop(key, None)
    return arrays


def _checked_count(name: str, view: Any) -> int:
    """Count the elements of a view, after checking that it lies within its storage."""
    label = repr(_shortened(name))
    if not isinstance(view, _View):
        raise ValueError(
            f"wanted a tensor under every name, got {type(view).__name__} under {label}"
        )
    storage, offset, shape, strides, extras = view
    # Check the description, all of which comes from the file.
    sound = (
        isinstance(storage, _Storage)
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


def _copied_array(name: str, view: _View, raw: bytes, order: str) -> np.ndarray:
    """Copy the array of a view out of the bytes of its storage."""
    storage, offset, shape, strides, _ = view
    # numpy has no bfloat16: its bits are read as integers.
    bfloat16 = storage.kind == "BFloat16Storage"
    dtype = np.dtype("uint16" if bfloat16 else _DTYPES[storage.kind])
    if not math.prod(shape):
        return np.zeros(shape, np.float32 if bfloat16 else dtype)
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
