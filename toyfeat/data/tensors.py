"""Safetensors files: the library, which is wanted for files only, and reading."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np


def library(who: str) -> Any:
    """``safetensors.numpy``.

    Raises:
      ImportError: without it, naming the extra.
    """
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError(
            f'{who}: safetensors is not installed: pip install "toyfeat[sae]"'
        ) from error


def tensors_of(path: Path, who: str) -> dict[str, np.ndarray]:
    """Name to array of a file.

    Raises:
      ValueError: if the file is not whole.
      OSError: if it cannot be read.
      ImportError: without the library.
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
