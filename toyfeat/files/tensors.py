"""Check tensors of files before they become parameters."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np


def finite_tensors(
    tensors: Mapping[str, np.ndarray], source: str | Path, who: str
) -> dict[str, np.ndarray]:
    """Convert tensors to float32 and check that all of their entries are finite.

    Args:
      tensors: by name, as they are in the file.
      source: the file, for messages.
      who: the function, for messages.

    Returns:
      The tensors, float32.

    Raises:
      ValueError: if one has no real floating-point numbers, or one that is not finite
        or beyond float32.

    Example:
      >>> finite_tensors({"b": np.array([0.0, np.nan])}, "a.npz", "load")
      Traceback (most recent call last):
      ValueError: load: tensor 'b' in a.npz must be finite, got nan at [1] (1 of 2 ...
    """
    arrays = {}
    for name, tensor in tensors.items():
        values = np.asarray(tensor)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"{who}: tensor {name!r} in {source} must have floating-point numbers, "
                f"got {values.dtype}; fetch or save it again"
            )
        with np.errstate(over="ignore"):  # becomes infinite, which is looked for next
            array = values.astype(np.float32, copy=False)
        finite = np.isfinite(array)
        if not finite.all():
            index = np.argwhere(~finite)[0]
            raise ValueError(
                f"{who}: tensor {name!r} in {source} must be finite, got "
                f"{array[tuple(index)]} at {index.tolist()} ({(~finite).sum()} of "
                f"{finite.size} entries are not); fetch or save it again"
            )
        arrays[name] = array
    return arrays
