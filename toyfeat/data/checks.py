"""Checks of arrays that batches are made of, and that a store takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_array, check_type
from toyfeat.data.format import Store
from toyfeat.types import Array, Taps


def check_taps(taps: Taps) -> Taps:
    """Convert taps to arrays of JAX, after checking shapes and concrete values.

    Raises:
      TypeError: if they are no taps.
      ValueError: if their shapes do not fit, a weight is negative or not finite, or a
        row of a positive weight is not finite.
    """
    hint = "wrap activations [N, D] as Taps(acts, None, jnp.ones(len(acts)))"
    check_type("array_batches", "taps", taps, Taps, hint=hint)
    fields: Any = [None if x is None else _as_array(x) for x in taps[:4]]
    arrays = Taps(*fields)
    shapes = {n: x.shape for n, x in arrays._asdict().items() if x is not None}
    # Rows of other ranks and of integers, such as tokens, are drawn like others.
    fits = "acts" in shapes and len(shapes.get("weights", ())) == 1
    if not fits or len({shape[:1] for shape in shapes.values()}) > 1:
        raise ValueError(
            "array_batches: arrays must have one length, acts [N, D], grads [N, K, D] "
            f"or None, weights [N], got {shapes}; reshape them to rows"
        )
    _check_values(arrays)
    return arrays


def _check_values(taps: Taps) -> None:
    """Raise for weights that are none, and for NaN in rows of a positive weight."""
    leaves = jax.tree.leaves(taps)
    if any(isinstance(x, Tracer) for x in leaves):
        return
    least, wrong = _least_weight_and_wrong_rows(taps)
    if not 0 <= float(least) < math.inf:
        raise ValueError(
            f"array_batches: weights must be finite and at least 0, got {least}; give "
            "rows that are to be left out a weight of 0"
        )
    if int(wrong):
        raise ValueError(
            f"array_batches: rows must be finite, got {wrong} of {len(taps.weights)} "
            "with NaN or inf; give them a weight of 0"
        )


@jax.jit
def _least_weight_and_wrong_rows(taps: Taps) -> tuple[Array, Array]:
    """Smallest weight (NaN or inf if there is one), and how many rows are not finite.

    Rows of weight 0 do not count.
    """
    weights = taps.weights
    ends = jnp.min(weights), jnp.max(weights)
    least = jnp.where(jnp.isfinite(ends[1]), ends[0], ends[1])
    finite = jnp.ones(len(weights), bool)
    for x in (taps.acts, taps.grads, taps.targets):
        if x is not None and jnp.issubdtype(x.dtype, jnp.inexact):
            finite &= jnp.isfinite(x).all(tuple(range(1, x.ndim)))
    return least, jnp.sum(~finite & (weights > 0))


def _as_array(x: Any) -> Array:
    """Convert to an array of JAX, which knows no foreign byte order."""
    if isinstance(x, np.ndarray) and not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    return jnp.asarray(x)


def check_appended(store: Store, taps: Taps) -> None:
    """Raise an error for taps whose shapes or dtypes do not fit the store."""
    rows = taps.acts.shape[0] if taps.acts.ndim else 0
    grads = None if store.readouts is None else (rows, store.readouts, store.dim)
    wanted = (rows, store.dim), grads, (rows,)
    if taps.targets is not None:
        raise ValueError(
            "append: a store holds one site; write targets to a store of their own"
        )
    shapes = tuple(None if x is None else x.shape for x in taps[:3])
    if shapes != wanted:
        raise ValueError(
            f"append: the store wants acts, grads, weights of shapes {wanted}, got "
            f"{shapes}"
        )
    for name, x in taps._asdict().items():
        if x is not None:
            check_array("append", name, x, hint="convert it", floats=True)
    # Values that the store can hold; rows of weight 0 may hold anything.
    largest = float(jnp.finfo(store.dtype).max)
    _check_range("weights", taps.weights, 0.0, float(np.finfo(np.float32).max))
    for name, x in (("acts", taps.acts), ("grads", taps.grads)):
        if x is not None and not _is_in_range(x, -largest, largest):
            _check_range(name, x[taps.weights > 0], -largest, largest)


def _check_range(name: str, x: Array | np.ndarray, low: float, high: float) -> None:
    """Raise a ValueError unless the numbers to append are in a range."""
    if not _is_in_range(x, low, high):
        raise ValueError(
            f"append: {name} must be finite numbers in {low:.3g} .. {high:.3g}, which "
            f"the store holds, got {x.min()} .. {x.max()}; leave out the rows that are "
            "not, or give them weight 0"
        )


def _is_in_range(x: Array | np.ndarray, low: float, high: float) -> bool:
    """Return whether all numbers are in a range; NaN is in none."""
    return not x.size or bool(low <= float(x.min()) and float(x.max()) <= high)
