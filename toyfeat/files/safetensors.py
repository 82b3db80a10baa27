"""Read safetensors files; the library is an optional dependency, loaded on use."""

import importlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MAX_TEXT = 400  # characters of a message of the library, which may repeat a file
_FLOAT8 = {  # which the library does not give to numpy
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


class TensorFile(NamedTuple):
    """Tensors of a file, read one at a time.

    Attributes:
      shapes: shape of each tensor by name.
      read: function of a name that returns the array.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def library(who: str, *, extra: str = "sae") -> Any:
    """Import ``safetensors.numpy``.

    Args:
      who: function to name in errors.
      extra: the extra of this package to name in errors.

    Raises:
      ImportError: if safetensors is not installed; it names the extra to install.
    """
    try:
        importlib.import_module("safetensors")
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError(
            f'{who}: safetensors is not installed: pip install "toyfeat[{extra}]"'
        ) from error


def saver(who: str, *, extra: str = "sae") -> Callable[..., None]:
    """Return ``save(tensors, path, **options)``, for files that others can read.

    The library makes files for their owner alone; these have the mode of any new file.

    Args:
      who: function to name in errors.
      extra: the extra of this package to name in errors.

    Raises:
      ImportError: if safetensors is not installed; it names the extra to install.
    """
    save_file = library(who, extra=extra).save_file

    def save(tensors: Mapping[str, np.ndarray], path: Path, **options: Any) -> None:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, **options)
        path.chmod(mode)

    return save


def open_tensors(path: Path, who: str, *, extra: str = "sae") -> TensorFile:
    """Open a file, whose tensors are read when they are asked for.

    Args:
      path: of the file.
      who: function to name in errors.
      extra: the extra of this package to name in errors.

    Returns:
      :class:`TensorFile`; float8 is read too, as the types of ``ml_dtypes``.

    Raises:
      ValueError: if the file is damaged or not a safetensors file; when read, for
        tensors of a dtype that numpy does not have.
      OSError: if the file cannot be read.
      ImportError: if safetensors is not installed.
    """
    safe_open = library(who, extra=extra).safe_open
    with _damage_named(path, who):
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
        dtypes = {name: str(x.get_dtype()) for name, x in slices.items()}

    def read(name: str) -> np.ndarray:
        dtype = dtypes[name]
        if dtype in _FLOAT8:
            return _read_bytes(path, name).view(_FLOAT8[dtype]).reshape(shapes[name])
        try:
            return file.get_tensor(name)
        except Exception as error:
            raise ValueError(
                f"{who}: {path} stores {name} as {dtype}, which cannot be read; save "
                "it in a dtype of numpy"
            ) from error

    return TensorFile(shapes, read)


def tensors_of(path: Path, who: str) -> dict[str, np.ndarray]:
    """Read the tensors of a file.

    Returns:
      Arrays by name.

    Raises:
      ValueError: if the file is damaged, not a safetensors file, or has tensors of a
        dtype that numpy does not have.
      OSError: if the file cannot be read.
      ImportError: if safetensors is not installed.
    """
    file = open_tensors(path, who)
    return {name: file.read(name) for name in file.shapes}


def _read_bytes(path: Path, name: str) -> np.ndarray:
    """Read the bytes of a tensor of a file that the library has checked."""
    with path.open("rb") as file:
        # The length of the header, the header in JSON, the tensors.
        (length,) = struct.unpack("<Q", file.read(8))
        start, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        return np.frombuffer(bytearray(file.read(end - start)), np.uint8)


def metadata_of(path: Path, who: str, *, extra: str = "sae") -> dict[str, str]:
    """Read the metadata of a file, texts by name.

    Returns:
      The metadata, empty if there are none.

    Raises:
      ValueError: if the file is damaged or not a safetensors file.
      OSError: if the file cannot be read.
      ImportError: if safetensors is not installed.
    """
    safe_open = library(who, extra=extra).safe_open
    with _damage_named(path, who), safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


@contextmanager
def _damage_named(path: Path, who: str) -> Iterator[None]:
    """Turn what the library raises of a damaged file into an error that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # SafetensorError is an Exception and nothing more
        raise ValueError(
            f"{who}: {path} is not a whole safetensors file "
            f"({str(error)[:_MAX_TEXT]}); fetch or save it again"
        ) from error
