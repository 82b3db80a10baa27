"""Checks of taps and models that need concrete values and run outside of jit."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.tap.probes import infer_batch_size, is_float_array
from toyfeat.types import Array, Inputs, Params, Probed, Taps

# Relative change that counts as rounding: 100 epsilons in float32 and float64.  In a
# narrow dtype that would be most of the value (0.8 in bfloat16), so there it is 4
# epsilons and an offset for what was summed in float32 before it was rounded.
_ROUNDINGS = 1e2
_NARROW_ROUNDINGS = 4
_NARROW_OFFSET = 1e-4


def check_taps(taps: Taps | Mapping[str, Taps]) -> None:
    """Raise if taps hold NaN, infinite values or invalid weights.

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
    """Check the weights of a site, then its activations and gradients."""
    weights = _to_numpy("check_taps", taps.weights)
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
        # Examples of weight 0 may hold anything.
        value = _to_numpy("check_taps", value)
        bad = ~np.isfinite(value) & counted.reshape((-1, *(1,) * (value.ndim - 1)))
        if bad.any():
            first = np.argwhere(bad)[0]
            raise ValueError(
                f"check_taps: {who} has {int(bad.sum())} non-finite of {value.size} "
                f"entries in {field}, the first in example {first[0]}; look at its "
                "input, the readout's scale and the dtype"
            )


def _to_numpy(who: str, value: Any) -> np.ndarray:
    """Convert a concrete array to float32 or float64 NumPy."""
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
    attention or routing across the batch.  Some examples are changed (other inputs,
    noise at every site) while the others must keep their values, for splits of the
    batch that separate every pair of examples: ``2 log2(B)`` runs.

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
      >>> import toyfeat as ft
      >>> centred = ft.from_split(
      ...     lambda p, x: x - x.mean(0, keepdims=True), lambda p, a: a
      ... )
      >>> check_no_mixing(centred, None, jnp.arange(6.0).reshape(3, 2))
      Traceback (most recent call last):
      ValueError: check_no_mixing: examples of a batch influence each other at site...
    """
    size = infer_batch_size(inputs)
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
    no_noise = _noise(key, acts, np.zeros(size, bool))
    before = run(inputs, no_noise)
    # Two rows differ in some bit of their index, so every pair is told apart.
    for bit in range((size - 1).bit_length()):
        for value in (0, 1):
            fixed = ((np.arange(size) >> bit) & 1) == value
            # The other rows get the inputs of a neighbour, and noise at every site.
            rows = np.where(fixed, np.arange(size), np.roll(np.arange(size), 1))
            changed = jax.tree.map(lambda leaf, r=rows: leaf[r], inputs)
            after = run(changed, _noise(key, acts, ~fixed))
            _check_fixed_rows(before, after, fixed, no_noise)


def _noise(key: Array, acts: dict[str, Array], where: np.ndarray) -> dict[str, Array]:
    """Draw noise for every site with a batch axis, zero outside the rows ``where``."""
    noise = {}
    for index, (site, act) in enumerate(acts.items()):
        if act.shape[:1] == where.shape:
            finite = jnp.where(jnp.isfinite(act), jnp.abs(act), 0).astype(jnp.float32)
            draw = jax.random.normal(jax.random.fold_in(key, index), act.shape)
            rows = where.reshape((-1, *(1,) * (act.ndim - 1)))
            noise[site] = jnp.where(rows, (1 + finite.max()) * draw, 0.0)
    return noise


def _check_output_axes(outputs: Any, size: int) -> None:
    """Raise if an output does not have the leading batch axis."""
    for leaf in jax.tree.leaves(outputs):
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"check_no_mixing: the outputs must have leading batch axis {size}, "
                f"got shape {jnp.shape(leaf)}"
            )


def _check_fixed_rows(before: Any, after: Any, fixed: np.ndarray, sites: Any) -> None:
    """Raise if a site or an output changed in the rows whose inputs did not."""
    (outputs, acts), (outputs2, acts2) = before, after
    changes = {f"site {s!r}": _change(acts[s], acts2[s], fixed) for s in sites}
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(outputs2), strict=True)
    changes["the outputs"] = max(_change(a, b, fixed) for a, b in pairs)
    wrong = [name for name, change in changes.items() if change > 0]
    if wrong:
        raise ValueError(
            "check_no_mixing: examples of a batch influence each other at "
            f"{', '.join(wrong[:8])}: changing some examples moved others by up to "
            f"{max(changes.values()):.3g}; per-example gradients would be wrong. "
            "Switch batch statistics to evaluation mode, or map the model over examples"
        )


def _change(before: Array, after: Array, fixed: np.ndarray) -> float:
    """Return the largest change in the fixed rows that is no rounding, or 0."""
    eps = float(jnp.finfo(before.dtype).eps) if is_float_array(before) else 0.0
    a = _to_numpy("check_no_mixing", before)[fixed].astype(np.float64)
    b = _to_numpy("check_no_mixing", after)[fixed].astype(np.float64)
    # Equal entries do not differ, infinite ones and NaN included.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    change = np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))
    change = np.where(np.isnan(change), np.inf, change)
    # Rounding is relative to the largest finite entry.
    finite = np.abs(a[np.isfinite(a)])
    rounding = min(_ROUNDINGS * eps, _NARROW_ROUNDINGS * eps + _NARROW_OFFSET)
    allowed = rounding * np.max(finite, initial=0.0)
    return float(np.max(np.where(change > allowed, change, 0.0), initial=0.0))
