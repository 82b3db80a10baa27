"""Checks of values that files and users give, and how messages show them."""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_SIZE = 2**31 - 1
"""Largest size: XLA counts the entries of an axis with int32."""

_MAX_TEXT = 400  # characters, about five lines
_MAX_NUMBER = float(np.finfo(np.float32).max)


def is_size(value: Any) -> bool:
    """Check that a value is a positive int that a size can be."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and 1 <= value <= MAX_SIZE


def is_positive(value: Any) -> bool:
    """Check that a value is a positive number that float32 has."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= _MAX_NUMBER


def divide_heads(who: str, dim: int, heads: int) -> int:
    """Divide the stream among the heads; returns the width of a head."""
    if not is_size(dim) or not is_size(heads) or dim % heads:
        raise ValueError(
            f"{who}: heads must divide dim, got {show_value(heads)} and "
            f"{show_value(dim)}; give other sizes"
        )
    return dim // heads


def shorten(error: BaseException) -> str:
    """Show the message of a library, which may repeat a whole file."""
    text = str(error)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def show_value(value: Any) -> str:
    """Show a value of any size in a few words."""
    return reprlib.repr(value)


def show_values(values: Mapping[str, Any]) -> str:
    """Show names and values of any size."""
    pairs = [f"{name!r}: {show_value(value)}" for name, value in values.items()]
    return "{" + ", ".join(pairs) + "}"
