"""Read safetensors files; the library is an optional dependency, loaded on use."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np


def library(who: str) -> Any:
    """Import ``safetensors.numpy``.

    Raises:
      ImportError: if safetensors is not installed; it names the extra to install.
    """
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError(
            f'{who}: safetensors is not installed: pip install "toyfeat[sae]"'
        ) from error


def tensors_of(path: Path, who: str) -> dict[str, np.ndarray]:
    """Read the tensors of a file.

    Returns:
      Arrays by name.

    Raises:
      ValueError: if the file is damaged or not a safetensors file.
      OSError: if the file cannot be read.
      ImportError: if safetensors is not installed.
    """
    safetensors = library(who)
    try:
        return safetensors.load_file(path)
    except OSError:
        raise
    except Exception as error:  # SafetensorError is an Exception and nothing more
        raise ValueError(
            f"{who}: {path} is not a whole safetensors file ({error}); fetch or save "
            "it again"
        ) from error
