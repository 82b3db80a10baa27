"""Checks of arguments that several functions share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_int(
    who: str,
    name: str,
    value: Any,
    least: int,
    most: int | None = None,
    about: str = "",
) -> int:
    """Check a whole number.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      least: smallest accepted value.
      most: largest accepted value, if there is one.
      about: what the bounds are, for the message.

    Returns:
      The number as a Python int.

    Raises:
      TypeError: if it is not an int of Python or NumPy.  It decides shapes, so that a
        JAX array will not do, nor will a bool.
      ValueError: if it is out of range.
    """
    bounds = f"in {least} .. {most}" if most is not None else f"at least {least}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        whole = getattr(value, "shape", ()) == () and not isinstance(value, Tracer)
        hint = "int(...) of it" if whole else "a number that is known before jit"
        plain = isinstance(value, int | float | str)
        raise TypeError(
            f"{who}: {name} must be an int, {bounds}{about}, got "
            f"{repr(value) if plain else _describe(value)}; pass {hint}"
        )
    value = int(value)
    if value < least or (most is not None and value > most):
        raise ValueError(
            f"{who}: {name} must be {bounds}{about}, got {value}; pass one of these"
        )
    return value


def _describe(value: Any) -> str:
    """Type of a value, and its shape if it has one."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {shape}")


def check_state(who: str, state: Any, kind: type, width: int) -> Any:
    """Check that a state is one of an accumulator of this kind and width.

    Args:
      who: the public function.
      state: what came.
      kind: its type, with a pair ``mean``.
      width: of the rows.

    Returns:
      The state.

    Raises:
      TypeError: if it is of another kind.
      ValueError: if it is of another width.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"{who}: state must be that of init(), update() or merge() of the same "
            f"accumulator, got {_describe(state)}; start with init()"
        )
    if state.mean.high.shape[-1] != width:
        raise ValueError(
            f"{who}: state must be of width {width}, got that of an accumulator of "
            f"width {state.mean.high.shape[-1]}; keep one accumulator per site"
        )
    return state


def check_floats(who: str, name: str, value: Any, hint: str) -> None:
    """Check that a value is an array of real floats.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      hint: what to do where it is no array.

    Raises:
      TypeError: if it is no array, or of another dtype.
    """
    # Sparse matrices and the tensors of other libraries have dtypes of their own.
    array = isinstance(value, np.ndarray | jax.Array) or hasattr(value, "__array__")
    dtype = getattr(value, "dtype", None)
    if not array or not isinstance(dtype, np.dtype):
        raise TypeError(
            f"{who}: {name} must be an array, got {_describe(value)}; {hint}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{who}: {name} must be of a real floating dtype, got {dtype}; convert "
            f"with {name}.astype('float32')"
        )


def check_key(who: str, key: Any) -> None:
    """Check a random key.

    Args:
      who: the public function.
      key: what came.

    Raises:
      TypeError: if it is not one key, of ``jax.random.key`` or ``jax.random.PRNGKey``.
    """
    if isinstance(key, np.ndarray | jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
        if typed or (key.dtype == np.uint32 and key.ndim == 1):
            return
    raise TypeError(
        f"{who}: key must be one key, such as jax.random.key(0), got {_describe(key)}"
    )
