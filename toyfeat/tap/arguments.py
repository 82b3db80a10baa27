"""Checks of arguments that several functions share; each returns what can be used.

Shapes and types are always checked.  Values are looked at only where they lie on the
host, so that no check waits for a device.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.types import Array


def check_count(who: str, name: str, value: Any, *, least: int | None = 1) -> int:
    """Return an integer argument, or raise unless it is at least ``least``."""
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_
    try:
        count = None if is_bool else operator.index(value)
    except (TypeError, ValueError):
        count = None
    if count is None:
        raise TypeError(f"{who}: {name} must be an int, got {value!r:.80}; give one")
    if least is not None and count < least:
        raise ValueError(
            f"{who}: {name} must be at least {least}, got {count}; give a larger one"
        )
    return count


def check_function(who: str, name: str, value: Any, signature: str) -> None:
    """Raise unless an argument can be called."""
    if not callable(value):
        raise TypeError(
            f"{who}: {name} must be a function {signature}, got "
            f"{type(value).__name__}; define one"
        )


def check_select(who: str, select: Any) -> None:
    """Raise unless a selection of outputs is ``None`` or a function."""
    if select is not None:
        check_function(who, "select", select, "of the outputs (or None)")


def check_key(who: str, key: Any) -> None:
    """Raise unless an argument is one random key, of either kind."""
    dtype, shape = getattr(key, "dtype", None), jnp.shape(key) if _is_array(key) else ()
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == np.uint32 and len(shape) == 1
    if not raw and (not typed or shape):
        got = f"shape {shape}" if typed else repr(key)
        raise TypeError(
            f"{who}: key must be a random key, got {got}; make one with "
            "jax.random.key(0)"
        )


def check_mask(who: str, mask: Any) -> Any:
    """Return a mask as an array, or raise unless it holds weights.

    Values are looked at unless it lies on a device: :func:`toyfeat.check_taps` does.
    """
    if mask is None:
        return None
    mask = as_array(who, "mask", mask)
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(
            f"{who}: mask must be real weights, got {mask.dtype}; give one number >= 0 "
            "per example"
        )
    if isinstance(mask, np.ndarray) and not np.all(np.isfinite(mask) & (mask >= 0)):
        raise ValueError(
            f"{who}: mask must be finite weights >= 0, got {mask.min()}; "
            "0 leaves an example out"
        )
    return mask


def as_array(who: str, name: str, value: Any) -> Any:
    """Return a numeric array, of JAX as it is, of NumPy otherwise."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)):
        raise TypeError(
            f"{who}: {name} must be an array of numbers, got {value!r:.80}; give one"
        )
    return array


def as_integers(who: str, name: str, value: Any) -> Array:
    """Return an integer array, or raise."""
    array = as_array(who, name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{who}: {name} must be integers, got {jnp.asarray(array).dtype}; give ids"
        )
    return jnp.asarray(array)


def check_type(who: str, name: str, value: Any, kind: type) -> None:
    """Raise unless an argument is a record of its kind."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{who}: {name} must be a {kind.__name__}, got {type(value).__name__}; "
            "pass one"
        )


def as_floats(who: str, name: str, value: Any) -> np.ndarray:
    """Return numbers as a float64 array of the host, or raise."""
    array = as_array(who, name, value)
    if isinstance(array, Tracer):
        raise TypeError(
            f"{who}: {name} must be known values, got a traced array; call it outside "
            "of jit"
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"{who}: {name} must be real, got {array.dtype}; take its parts"
        )
    return np.asarray(array, np.float64)


def as_float_array(who: str, name: str, value: Any) -> Array:
    """Return numbers as a floating-point array of JAX, or raise."""
    array = jnp.asarray(as_array(who, name, value))
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"{who}: {name} must be real, got {array.dtype}; take its parts"
        )
    return array.astype(jnp.result_type(float))


def _is_array(value: Any) -> bool:
    """Return whether a value has a shape and a dtype."""
    return hasattr(value, "dtype") and hasattr(value, "shape")
