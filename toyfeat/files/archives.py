"""Read members of zip archives without unpacking more than the file has bytes."""

import io
import math
import zipfile
from typing import Any, BinaryIO

import numpy as np

_END, _END_LARGE, _LOCATOR = 22, 56, 20  # bytes of the records that end an archive
_MAX_DIRECTORY = 2**25  # bytes: 300,000 members, listed in 9 s and 700 MB


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip archive whose members are stored as they are.

    torch and this library write no other.  The members of such an archive are no larger
    than the file together, so whoever reads each of them once needs no other bound.

    Raises:
      ValueError: if members are compressed or overlap, or there are too many.
      zipfile.BadZipFile: if it is no zip archive.
    """
    if (listed := _directory_size(file)) > _MAX_DIRECTORY:
        raise ValueError(
            f"wanted at most {_MAX_DIRECTORY} bytes of the directory of its members, "
            f"got {listed}"
        )
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if packed := [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(
            f"wanted members that are stored without compression, got {packed[0]!r} "
            "compressed; unpack it and zip it again with 'zip -0'"
        )
    # Members that overlap have more bytes together than the file.
    total, size = sum(m.file_size for m in members), file.seek(0, io.SEEK_END)
    if total > size:
        raise ValueError(f"its members have {total} bytes, and it has only {size}")
    return archive


def _directory_size(file: BinaryIO) -> int:
    """Read the size of the directory of an archive, all of which zipfile will read."""
    file.seek(max(file.seek(0, io.SEEK_END) - _END - _LOCATOR - _END_LARGE, 0))
    tail = file.read()
    end, before = tail[-_END:], tail[:-_END]
    if not end.startswith(b"PK\x05\x06"):
        raise zipfile.BadZipFile("it does not end as archives do that have no comment")
    # A second record, found by a locator, has the sizes of a large archive.
    large = before[:-_LOCATOR][-_END_LARGE:]
    if before[-_LOCATOR:].startswith(b"PK\x06\x07") and large[:4] == b"PK\x06\x06":
        return int.from_bytes(large[40:48], "little")
    return int.from_bytes(end[12:16], "little")


def array_from_npy(data: bytes) -> np.ndarray:
    """Read an array in NumPy's format, after comparing its shape with its bytes.

    ``numpy.lib.format.read_array`` allocates what the header claims.

    Raises:
      ValueError: if the header is damaged, claims another size or holds objects.
    """
    stream, layout = io.BytesIO(data), np.lib.format
    version = layout.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"wanted version 1 or 2 of NumPy's format, got {version}")
    readers: Any = {
        (1, 0): layout.read_array_header_1_0,
        (2, 0): layout.read_array_header_2_0,
    }
    shape, _, dtype = readers[version](stream)
    claimed, got = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if claimed != got:
        raise ValueError(f"wanted {claimed} bytes of {dtype}{list(shape)}, got {got}")
    stream.seek(0)
    return layout.read_array(stream, allow_pickle=False)
