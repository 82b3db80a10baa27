"""Check of the header of a GGUF file against the size of the file.

The ``gguf`` library believes the counts of a file and reads past its end, element by
element.  This walk over the header costs little, and ends where the file does.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_VERSIONS = (2, 3)
_COUNTS, _FIELDS = 8, 24  # bytes before the counts and before the metadata
_STRING, _ARRAY, _UINT32 = 8, 9, 4  # numbers of types of metadata
# Bytes of the other types: uint8, int8, uint16, int16, uint32, int32, float32, bool,
# uint64, int64, float64.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT = b"general.alignment"
_DEFAULT_ALIGNMENT = 32  # bytes, of the format
_MAX_RANK = 4  # GGML_MAX_DIMS

TypeSize = Callable[[int], tuple[int, int]]
"""``number of a type -> (entries of a block, bytes of a block)``."""


class _Tensor(NamedTuple):
    name: str
    size: int
    offset: int


def check_header(path: Path, type_size: TypeSize) -> None:
    """Check that all that a header announces fits into the file.

    Args:
      path: of the file.
      type_size: of the types of tensors; raises ``ValueError`` for an unknown one.

    Raises:
      ValueError: for counts, sizes and offsets that the file does not bear out, names
        that occur twice, or tensors of unknown types.
      struct.error: if the file ends inside its header.
    """
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        # Version and counts, the low byte first.
        magic, version = struct.unpack_from("<4sI", data)
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
        if version not in _VERSIONS:
            swapped = " (the high byte first)" if not version & 0xFFFF else ""
            raise ValueError(
                f"it is of version {version}{swapped}, known are {_VERSIONS}"
            )
        num_tensors, num_fields = struct.unpack_from("<QQ", data, _COUNTS)
        # Metadata, then tensors.
        alignment, offset = _walk_fields(data, _FIELDS, num_fields)
        tensors, offset = _walk_tensors(data, offset, num_tensors, type_size)
        start = _align(offset, alignment)
        _check_tensors(tensors, start, len(data), alignment)


def _walk_fields(data: mmap.mmap, offset: int, num: int) -> tuple[int, int]:
    """Walk over the metadata; return the alignment and the end."""
    alignment, names = _DEFAULT_ALIGNMENT, set()
    for _ in range(num):
        name, offset = _read_string(data, offset)
        if name in names:
            raise ValueError(f"its entry {name!r} occurs twice")
        names.add(name)
        (kind,) = struct.unpack_from("<I", data, offset)
        if name == _ALIGNMENT and kind == _UINT32:
            (alignment,) = struct.unpack_from("<I", data, offset + 4)
        offset = _skip_value(data, offset + 4, kind, name)
    if alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"its alignment must be a power of two, got {alignment}")
    return alignment, offset


def _skip_value(data: mmap.mmap, offset: int, kind: int, name: bytes) -> int:
    """Return the end of a value."""
    if kind == _STRING:
        return _read_string(data, offset)[1]
    num = 1
    if kind == _ARRAY:
        kind, num = struct.unpack_from("<IQ", data, offset)
        offset += 12
        if kind == _STRING:
            for _ in range(num):  # the walk raises where the file ends
                _, offset = _read_string(data, offset)
            return offset
    if kind not in _BYTES:
        raise ValueError(f"its entry {name!r} is of the unknown type {kind}")
    end = offset + num * _BYTES[kind]
    if end > len(data):
        raise ValueError(
            f"its entry {name!r} has {num} values, which is more than there are bytes"
        )
    return end


def _walk_tensors(
    data: mmap.mmap, offset: int, num: int, type_size: TypeSize
) -> tuple[list[_Tensor], int]:
    """Walk over the descriptions of tensors; return them and the end."""
    tensors, names = [], set()
    for _ in range(num):
        encoded, offset = _read_string(data, offset)
        name = encoded.decode("utf-8", "replace")
        if name in names:
            raise ValueError(f"its tensor {name!r} occurs twice")
        names.add(name)
        # Shape, the innermost size first.
        (rank,) = struct.unpack_from("<I", data, offset)
        if rank > _MAX_RANK:
            raise ValueError(f"its tensor {name!r} has {rank} dimensions")
        shape = struct.unpack_from(f"<{rank}Q", data, offset + 4)
        offset += 4 + 8 * rank
        # Type and place.
        kind, place = struct.unpack_from("<IQ", data, offset)
        offset += 12
        block, width = type_size(kind)
        if shape and shape[0] % block:
            raise ValueError(
                f"rows of its tensor {name!r} must be blocks of {block}, got {shape}"
            )
        num_bytes = math.prod(shape) // block * width  # Python's ints do not overflow
        tensors.append(_Tensor(name=name, size=num_bytes, offset=place))
    return tensors, offset


def _check_tensors(
    tensors: list[_Tensor], start: int, end: int, alignment: int
) -> None:
    """Raise unless the tensors follow each other and fill the file, as in ggml.

    A type or a size that is not true shows here: it moves all tensors behind.
    """
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            raise ValueError(
                f"its tensor {tensor.name!r} must begin at {expected}, behind the one "
                f"before, got {tensor.offset}"
            )
        if start + tensor.offset + tensor.size > end:
            raise ValueError(
                f"its tensor {tensor.name!r} ends at byte "
                f"{start + tensor.offset + tensor.size} of {end}"
            )
        expected = _align(tensor.offset + tensor.size, alignment)
    left = end - start - expected
    if left > 0:
        raise ValueError(f"its last {left} bytes belong to no tensor")


def _align(offset: int, alignment: int) -> int:
    """Round up to a multiple."""
    return -(-offset // alignment) * alignment


def _read_string(data: mmap.mmap, offset: int) -> tuple[bytes, int]:
    """Read a string; return it and its end."""
    (length,) = struct.unpack_from("<Q", data, offset)
    end = offset + 8 + length
    if end > len(data):
        raise ValueError(f"it ends inside a text of {length} bytes at byte {offset}")
    return data[offset + 8 : end], end
