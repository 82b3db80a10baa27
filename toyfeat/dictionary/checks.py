"""Checks of the settings of dictionaries, losses, controllers and trainers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_MAX_SIZE = 2**31 - 1  # JAX counts axes in int32


def check_number(
    who: str,
    name: str,
    value: Any,
    least: float = -math.inf,
    *,
    above: float = -math.inf,
) -> None:
    """Check a setting that is one finite real number, and no array of several.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      least: smallest accepted value.
      above: what the value must be larger than.

    Raises:
      TypeError: if it is no number; a bool is none.
      ValueError: if it is not finite or out of range.
    """
    bounds = f" of at least {least:g}" if least > -math.inf else ""
    bounds = f" above {above:g}" if above > -math.inf else bounds
    wanted = f"{who}: {name} must be a finite number{bounds}, got {value!r:.80}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        kinds = jnp.integer, jnp.floating
        number = value.shape == ()
        number = number and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    if not number:
        raise TypeError(f"{wanted}; pass a float")
    if isinstance(value, Tracer):
        return
    if not (least <= float(value) < math.inf and float(value) > above):
        raise ValueError(f"{wanted}; pass another one")


def check_size(who: str, name: str, value: Any, most: int | None = None) -> None:
    """Check a size: an int of Python or NumPy, at least 1.

    Args:
      who: the public function.
      name: of its argument.
      value: what came.
      most: the number of latents, if the size cannot be larger.

    Raises:
      ValueError: if it is something else; a bool is no int.
    """
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    largest = _MAX_SIZE if most is None else most
    if not number or not 1 <= value <= largest:
        bounds = "of at least 1" if most is None else f"in 1 .. latents = {most}"
        if number and value > _MAX_SIZE:
            bounds = f"in 1 .. {_MAX_SIZE}, what arrays may have"
        raise ValueError(
            f"{who}: {name} must be an int {bounds}, got {value!r:.80}; pass one"
        )


def check_flag(who: str, name: str, value: Any) -> None:
    """Check a setting that is true or false.

    Raises:
      TypeError: if it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{who}: {name} must be True or False, got {value!r:.80}; pass one of them"
        )
