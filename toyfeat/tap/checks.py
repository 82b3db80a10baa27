"""Checks on values; they need concrete arrays and run outside of jit."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.tap.probes import batch_size_of, is_float_array
from toyfeat.types import Array, Inputs, Params, Probed, Taps


def check_taps(taps: Taps | Mapping[str, Taps]) -> None:
    """Raise if taps hold values that no statistic survives.

    Args:
      taps: taps of one site, or site name to taps.

    Raises:
      ValueError: if the activations or gradients of a site have entries that are
        not finite in examples of positive weight (says how many and where the
        first is), if a weight is negative or not finite, or if no example has
        weight.
      TypeError: inside jit, where values are not known.

    Example:
      >>> import jax.numpy as jnp
      >>> acts = jnp.array([[1.0, jnp.nan]])
      >>> check_taps({"mlp": Taps(acts, None, jnp.ones(1))})
      Traceback (most recent call last):
      ValueError: check_taps: site 'mlp' has 1 non-finite of 2 entries in acts, ...
    """
    by_site = {"": taps} if isinstance(taps, Taps) else taps
    for name, site_taps in by_site.items():
        _check_site(f"site {name!r}" if name else "the taps", site_taps)


def _check_site(who: str, taps: Taps) -> None:
    weights = _concrete("check_taps", taps.weights)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError(
            f"check_taps: {who} must have finite weights >= 0, got "
            f"{weights[~(weights >= 0) | ~np.isfinite(weights)][:3]}; mend the "
            "readout's mask"
        )
    counted = weights > 0
    if not counted.any():
        raise ValueError(
            f"check_taps: {who} has no example of positive weight among "
            f"{weights.size}; the readout's mask leaves out everything"
        )
    for field in ("acts", "grads"):
        value = getattr(taps, field)
        if value is None:
            continue
        value = _concrete("check_taps", value)
        bad = ~np.isfinite(value) & counted.reshape((-1, *(1,) * (value.ndim - 1)))
        if bad.any():
            first = np.argwhere(bad)[0]
            raise ValueError(
                f"check_taps: {who} has {int(bad.sum())} non-finite of {value.size} "
                f"entries in {field}, the first in example {first[0]}; look at its "
                "input, the readout's scale and the dtype"
            )


def _concrete(who: str, value: Any) -> np.ndarray:
    if isinstance(value, Tracer):
        raise TypeError(f"{who}: looks at values, so call it outside of jit and grad")
    value = jnp.asarray(value)
    return np.asarray(value, np.float64 if value.dtype == np.float64 else np.float32)


def check_no_mixing(
    probed: Probed, params: Params, inputs: Inputs, *, key: Array | None = None
) -> None:
    """Raise if the examples of a batch influence each other.

    Per-example gradients come from one backward pass of a whole batch, which is
    right only if example ``i`` of the outputs depends on example ``i`` of the
    inputs alone.  Batch normalisation in training mode breaks this, as does any
    attention or routing across the batch.  Some examples are changed (other
    inputs, noise at every site) and the others must stay as they were, with
    splits that tell every pair of examples apart: ``2 log2(B)`` runs.

    Args:
      probed: the model.
      params: its parameters.
      inputs: at least two inputs.
      key: for the noise; a fixed key by default.

    Raises:
      ValueError: if the batch has fewer than two inputs, or if examples mix; the
        message names the sites, or the outputs.
      TypeError: inside jit.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as tf
      >>> centred = tf.from_split(
      ...     lambda p, x: x - x.mean(0, keepdims=True), lambda p, a: a
      ... )
      >>> check_no_mixing(centred, None, jnp.arange(6.0).reshape(3, 2))
      Traceback (most recent call last):
      ValueError: check_no_mixing: examples of a batch influence each other at site...
    """
    size = batch_size_of(inputs)
    if size < 2:
        raise ValueError(
            f"check_no_mixing: needs at least two inputs to compare, got {size}"
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, inputs))):
        raise TypeError("check_no_mixing: looks at values, so call it outside of jit")
    key = jax.random.key(0) if key is None else key
    run = jax.jit(lambda x, noise: probed(params, x, noise))
    inputs = jax.tree.map(jnp.asarray, inputs)
    outputs, acts = probed(params, inputs, {})  # not compiled: sites stay in order
    _check_output_axes(outputs, size)
    quiet = _noise(key, acts, np.zeros(size, bool))
    before = run(inputs, quiet)
    # Two rows differ in some bit of their index, so every pair is told apart.
    for bit in range((size - 1).bit_length()):
        for value in (0, 1):
            kept = ((np.arange(size) >> bit) & 1) == value
            rows = np.where(kept, np.arange(size), np.roll(np.arange(size), 1))
            other = jax.tree.map(lambda leaf, r=rows: leaf[r], inputs)
            after = run(other, _noise(key, acts, ~kept))
            _check_kept(before, after, kept, quiet)


def _noise(key: Array, acts: dict[str, Array], where: np.ndarray) -> dict[str, Array]:
    """Noise at every site with a batch axis, in the rows ``where`` only."""
    noise = {}
    for index, (site, act) in enumerate(acts.items()):
        if act.shape[:1] == where.shape:
            finite = jnp.where(jnp.isfinite(act), jnp.abs(act), 0).astype(jnp.float32)
            draw = jax.random.normal(jax.random.fold_in(key, index), act.shape)
            rows = where.reshape((-1, *(1,) * (act.ndim - 1)))
            noise[site] = jnp.where(rows, (1 + finite.max()) * draw, 0.0)
    return noise


def _check_output_axes(outputs: Any, size: int) -> None:
    for leaf in jax.tree.leaves(outputs):
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"check_no_mixing: the outputs must have leading batch axis {size}, "
                f"got shape {jnp.shape(leaf)}"
            )


def _check_kept(before: Any, after: Any, kept: np.ndarray, sites: Any) -> None:
    (outputs, acts), (outputs2, acts2) = before, after
    moved = {f"site {s!r}": _moved(acts[s], acts2[s], kept) for s in sites}
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(outputs2), strict=True)
    moved["the outputs"] = max(_moved(a, b, kept) for a, b in pairs)
    wrong = [name for name, by in moved.items() if by > 0]
    if wrong:
        raise ValueError(
            "check_no_mixing: examples of a batch influence each other at "
            f"{', '.join(wrong[:8])}: changing some examples moved others by up to "
            f"{max(moved.values()):.3g}; per-example gradients would be wrong. Switch "
            "batch statistics to evaluation mode, or map the model over examples"
        )


def _moved(before: Array, after: Array, kept: np.ndarray) -> float:
    """Largest change in the kept rows beyond rounding; 0 if there is none."""
    eps = float(jnp.finfo(before.dtype).eps) if is_float_array(before) else 0.0
    a = _concrete("check_no_mixing", before)[kept].astype(np.float64)
    b = _concrete("check_no_mixing", after)[kept].astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.abs(a[np.isfinite(a)])
    change = np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))
    change = np.where(np.isnan(change), np.inf, change)
    allowed = min(1e2 * eps, 4 * eps + 1e-4) * np.max(finite, initial=0.0)
    return float(np.max(np.where(change > allowed, change, 0.0), initial=0.0))
