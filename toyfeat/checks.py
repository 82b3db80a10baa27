"""Checks of arguments, for all rooms: each returns what can be used, or raises.

Every message has three parts: which function wanted what, what came, what to do.
Types and shapes are always checked.  Values are looked at only where a function says
so, so that no check waits for a device.  A check that knows a type of a room stands
beside that type.
"""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MAX_SIZE = 2**31 - 1
"""Largest length of an axis: JAX counts with int32."""

_MAX_TEXT = 80  # characters of a value in a message, about one line
_PLAIN = bool | int | float | complex | str | bytes | np.generic | None
_T = TypeVar("_T")


def check_int(
    who: str,
    name: str,
    value: Any,
    *,
    least: int | None = 1,
    most: int | None = None,
    about: str = "",
    error: type[Exception] = TypeError,
) -> int:
    """Check an int that is known before jit, of Python, NumPy or JAX.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      least: smallest accepted value, or ``None``.
      most: largest accepted value, or ``None``.
      about: what the bounds are, for the message.
      error: raised for what is no int; a value out of range is a ``ValueError``.

    Returns:
      The number as a Python int.

    Raises:
      TypeError: if it is no int; a bool, a float and a traced number are none.
      ValueError: if it is out of range.
    """
    wanted = f"{who}: {name} must be an int{_int_range(least, most)}{about}"
    try:
        # NumPy's and JAX's bools are no index, Python's are.
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # traced numbers as well
        number = None
    if number is None:
        hint = "one that is known before jit" if isinstance(value, Tracer) else "an int"
        raise error(f"{wanted}, got {show(value)}; pass {hint}")
    if least is not None and number < least:
        raise ValueError(f"{wanted}, got {number}; pass a larger one")
    if most is not None and number > most:
        raise ValueError(f"{wanted}, got {number}; pass a smaller one")
    return number


def check_number(
    who: str,
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
) -> Any:
    """Check one real number; a traced one only by its type.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      least: smallest accepted value.
      above: what the value must be larger than.
      most: largest accepted value.
      finite: whether infinity is refused; NaN always is.

    Returns:
      The number as it came.

    Raises:
      TypeError: if it is no number, or an array of several; a bool is none.
      ValueError: if it is NaN, infinite or out of range.
    """
    kind = "a finite number" if finite else "a number"
    wanted = f"{who}: {name} must be {kind}{_number_range(least, above, most)}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_array(value):
        kinds = (jnp.integer, jnp.floating)  # neither bools nor complex numbers
        is_real = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        is_number = value.shape == () and is_real
    if not is_number:
        raise TypeError(f"{wanted}, got {show(value)}; pass a number")
    if isinstance(value, Tracer):
        return value
    try:
        number = float(value)
    except OverflowError:  # an int beyond float64
        number = math.inf if value > 0 else -math.inf
    in_range = least <= number <= most and (number > above or above == -math.inf)
    if not in_range or (finite and math.isinf(number)):
        plain = value.item() if is_array(value) else value
        raise ValueError(f"{wanted}, got {show(plain)}; pass another one")
    return value


def check_flag(who: str, name: str, value: Any) -> bool:
    """Check that an argument is true or false, and no other value that counts as it.

    Raises:
      TypeError: if it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{who}: {name} must be True or False, got {show(value)}; pass one of them"
        )
    return bool(value)


def check_choice(who: str, name: str, value: Any, choices: Iterable[str]) -> str:
    """Check that an argument is one of several names.

    Raises:
      ValueError: if it is something else.
    """
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f"{who}: {name} must be one of {', '.join(names)}, got {show(value)}; "
            "pass one of them"
        )
    return value


def check_function(
    who: str, name: str, value: Any, signature: str, *, hint: str = "pass one"
) -> Callable[..., Any]:
    """Check that an argument can be called.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      signature: what it is a function of, for the message.
      hint: what to do.

    Returns:
      The function.

    Raises:
      TypeError: if it cannot be called.
    """
    if not callable(value):
        raise TypeError(
            f"{who}: {name} must be a function {signature}, got {show(value)}; {hint}"
        )
    return value


def check_type(
    who: str, name: str, value: Any, kind: type[_T], *, hint: str = "pass one"
) -> _T:
    """Check that an argument is a record of its kind.

    Raises:
      TypeError: if it is something else.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{who}: {name} must be a {kind.__name__}, got {show(value)}; {hint}"
        )
    return value


def check_key(who: str, key: Any) -> jax.Array:
    """Check that an argument is one key, of ``jax.random.key`` or ``PRNGKey``.

    Raises:
      TypeError: if it is something else, or several keys.
    """
    if is_array(key):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
        if typed or (key.dtype == np.uint32 and key.ndim == 1):
            return key
    raise TypeError(
        f"{who}: key must be one random key, got {show(key)}; make it with "
        "jax.random.key(0)"
    )


def check_array(
    who: str, name: str, value: Any, *, hint: str, floats: bool = False
) -> Any:
    """Check that an argument is an array of real numbers, and convert nothing.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      hint: what to do where it is no array.
      floats: whether only floating-point numbers are accepted.

    Returns:
      The array.

    Raises:
      TypeError: if it is no array, or of another dtype.
    """
    # Sparse matrices and the tensors of other libraries have dtypes of their own.
    has_values = is_array(value) or hasattr(value, "__array__")
    dtype = getattr(value, "dtype", None)
    if not has_values or not isinstance(dtype, np.dtype):
        raise TypeError(f"{who}: {name} must be an array, got {show(value)}; {hint}")
    _check_real(who, name, dtype)
    if floats and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{who}: {name} must be floating-point, got {dtype}; convert with "
            f"{name}.astype('float32')"
        )
    return value


def as_array(who: str, name: str, value: Any) -> Any:
    """Convert to a numeric array: one of JAX stays, others become NumPy's.

    Raises:
      TypeError: if it does not hold numbers; bools are.
    """
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)):
        raise TypeError(
            f"{who}: {name} must be an array of numbers, got {show(value)}; pass one"
        )
    return array


def as_integers(who: str, name: str, value: Any) -> jax.Array:
    """Convert to an array of integers of JAX.

    Raises:
      TypeError: if it does not hold integers.
    """
    array = as_array(who, name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{who}: {name} must be integers, got {array.dtype}; pass integers"
        )
    return jnp.asarray(array)


def as_floats(who: str, name: str, value: Any) -> jax.Array:
    """Convert real numbers to a floating-point array of JAX.

    Raises:
      TypeError: if it does not hold real numbers.
    """
    array = jnp.asarray(as_real(who, name, value))
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return array if is_float else array.astype(jnp.result_type(float))


def as_host_floats(who: str, name: str, value: Any) -> np.ndarray:
    """Convert real numbers to a float64 array of the host; waits for their device.

    Raises:
      TypeError: if it does not hold real numbers that are known.
    """
    array = as_real(who, name, value)
    if isinstance(array, Tracer):
        raise TypeError(
            f"{who}: {name} must be known values, got a traced array; call it outside "
            "of jit"
        )
    return np.asarray(array, np.float64)


def as_real(who: str, name: str, value: Any) -> Any:
    """Convert to an array of real numbers, see :func:`as_array`.

    Raises:
      TypeError: if it does not hold numbers, or complex ones.
    """
    array = as_array(who, name, value)
    _check_real(who, name, array.dtype)
    return array


def is_array(value: Any) -> TypeGuard[jax.Array]:
    """Return whether a value is an array or a scalar of NumPy or JAX."""
    return isinstance(value, np.generic | np.ndarray | jax.Array)


def show(value: Any) -> str:
    """Show plain values in a line, an array by dtype and shape, others by type."""
    parts = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(part, _PLAIN) for part in parts):
        return f"{value!r:.{_MAX_TEXT}}"
    kind = type(value).__name__
    if not is_array(value):
        shape = getattr(value, "shape", None)
        return kind if not isinstance(shape, tuple) else f"{kind} of shape {shape}"
    traced = "traced " if isinstance(value, Tracer) else ""
    return f"{traced}{value.dtype} array of shape {value.shape}"


def _check_real(who: str, name: str, dtype: Any) -> None:
    """Raise a TypeError for a complex dtype."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{who}: {name} must be real, got {dtype}; pass real and imaginary parts "
            "as rows of their own"
        )


def _int_range(least: int | None, most: int | None) -> str:
    """Range of an int, for a message."""
    if most is not None:
        return f" of at most {most}" if least is None else f" in {least} .. {most}"
    return "" if least is None else f" of at least {least}"


def _number_range(least: float, above: float, most: float) -> str:
    """Range of a number, for a message."""
    if most < math.inf:
        low = f"({above:g}" if above > -math.inf else f"[{least:g}"
        return f" in {low}, {most:g}]"
    if above > -math.inf:
        return f" above {above:g}"
    return f" of at least {least:g}" if least > -math.inf else ""
