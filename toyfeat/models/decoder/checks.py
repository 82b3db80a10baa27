"""Checks of values that files and users give, and how messages show them."""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from toyfeat.checks import MAX_SIZE

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


def check_rotary_share(share: float) -> None:
    """Check the share of a head's entries that is rotated."""
    if not (is_positive(share) and share <= 1):
        raise ValueError(
            "neox: rotary_share must be a part of a head, above 0 and at most 1, got "
            f"{show_value(share)}; give another share"
        )


def check_rotary_dim(width: int, head_dim: int) -> None:
    """Check the number of rotated entries of a head, which turn in pairs."""
    if width % 2 or not 2 <= width <= head_dim:
        raise ValueError(
            f"decoder: rotary_dim must be even and in 2 .. head_dim {head_dim}, got "
            f"{width}; give another share or width of a head"
        )


def check_rotary_divisors(divisors: Any, pairs: int) -> None:
    """Check the divisors of the rates of rotation, one for each pair of entries."""
    fits = divisors is None or (
        isinstance(divisors, tuple)
        and len(divisors) == pairs
        and all(is_positive(divisor) for divisor in divisors)
    )
    if not fits:
        raise ValueError(
            f"decoder: rotary_divisors must be {pairs} positive numbers in a tuple, "
            f"half of rotary_dim, got {show_value(divisors)}; give as many"
        )


def check_factors(factors: Mapping[str, Any]) -> None:
    """Check factors and caps, which are positive or, if they can be left out, None."""
    optional = {name: x for name, x in factors.items() if x is not None}
    if not all(is_positive(x) for x in optional.values()):
        raise ValueError(
            f"decoder: factors must be positive, got {show_values(optional)}; give "
            "finite numbers, or leave them out"
        )


def check_window(window: Any, local_layers: Any, layers: int) -> None:
    """Check the window of local layers, and which ones these are."""
    if window is not None and not is_size(window):
        raise ValueError(
            f"decoder: window must be a number of positions, got {show_value(window)}; "
            "give None for no window"
        )
    is_fitting = isinstance(local_layers, tuple) and len(local_layers) >= layers
    if local_layers is not None and not (
        is_fitting and all(isinstance(is_local, bool) for is_local in local_layers)
    ):
        raise ValueError(
            f"decoder: local_layers must be {layers} or more bools in a tuple, got "
            f"{show_value(local_layers)}; say of each layer whether it has a window"
        )


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
