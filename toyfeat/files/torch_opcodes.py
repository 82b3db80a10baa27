"""Opcodes of the pickles in torch's files, run without Python's own unpickler.

A pickle can call any function, nest values until that unpickler crashes, and share them
until looking at one never ends.  So those opcodes are known here that dicts of tensors
and plain values consist of, and every other opcode or name is refused.
"""

import pickletools
from collections import OrderedDict
from typing import Any, NamedTuple

DTYPES = {
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

MAX_KEY = 2**31  # of ints as keys, such as layers
_MAX_NAME = 80  # characters of a name in a message: about a line


class Storage(NamedTuple):
    """Storage that a tensor views.

    Attributes:
      kind: name of its class in torch, which gives the dtype.
      key: name of its member of the archive.
      size: number of elements.
    """

    kind: str
    key: str
    size: int


class View(NamedTuple):
    """Tensor as a strided view of a storage, as the pickle describes it (unchecked).

    Attributes:
      storage: a :class:`Storage`, if the file is sound.
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


def unpickle(data: bytes) -> Any:
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
        if type(key) is not str and not (type(key) is int and 0 <= key < MAX_KEY):
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
        return View
    if module == "torch" and name in DTYPES:
        return name
    raise ValueError(
        f"it asks for {shortened(f'{module}.{name}')}, and only plain tensors are read"
    )


def _call(function: Any, arguments: Any) -> Any:
    """Make the empty dict or the tensor that a pickle asks for."""
    if type(arguments) is tuple:
        if function is OrderedDict and not arguments:
            return {}
        if function is View and len(arguments) >= 6:
            storage, offset, shape, strides, _grad, _hooks, *extras = arguments
            return View(
                storage=storage,
                offset=offset,
                shape=shape,
                strides=strides,
                extras=tuple(extras),
            )
    raise ValueError("its pickle calls a function otherwise than torch.save does")


def _storage(pid: Any) -> Storage:
    """Resolve a persistent id to the description of a storage, or refuse it."""
    if type(pid) is tuple:
        match pid:
            case ("storage", str(kind), str(key), _, int(size)) if kind in DTYPES:
                return Storage(kind, key, size)
    raise ValueError("it asks for another object, and only storages are read")


def shortened(text: str, most: int = _MAX_NAME) -> str:
    """Cut a text of the file to what a message has room for."""
    return text if len(text) <= most else f"{text[:most]}..."
