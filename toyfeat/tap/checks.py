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
    return np.asarray(value.astype(jnp.promote_types(value.dtype, jnp.float32)))


def check_no_mixing(
    probed: Probed, params: Params, inputs: Inputs, *, key: Array | None = None
) -> None:
    """Raise if the examples of a batch influence each other.

    Per-example gradients come from one backward pass of a whole batch, which is
    right only if example ``i`` of the outputs depends on example ``i`` of the
    inputs alone.  Batch normalisation in training mode breaks this, as does any
    attention or routing across the batch.  One half of the batch is changed (its
    inputs are shuffled, noise is added at every site) and the other half must
    stay as it was; then the halves swap.

    Args:
      probed: the model.
      params: its parameters.
      inputs: at least two inputs.
      key: for the noise; a fixed key by default.

    Raises:
      ValueError: if the batch has fewer than two inputs, or if examples mix; the
        message names the first site, or the outputs.
      TypeError: inside jit.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as tf
      >>> centred = tf.from_split(lambda p, x: x - x.mean(0), lambda p, a: a)
      >>> check_no_mixing(centred, None, jnp.arange(6.0).reshape(3, 2))
      Traceback (most recent call last):
      ValueError: check_no_mixing: examples of a batch influence each other at site...
    """
    size = batch_size_of(inputs)
    if size < 2:
        raise ValueError(
            f"check_no_mixing: needs at least two inputs to compare, got {size}"
        )
    key = jax.random.key(0) if key is None else key
    half = size // 2
    for kept, changed in (
        (slice(half), slice(half, None)),
        (slice(half, None), slice(half)),
    ):
        _check_kept(probed, params, inputs, key, kept, changed)


def _check_kept(
    probed: Probed,
    params: Params,
    inputs: Inputs,
    key: Array,
    kept: slice,
    changed: slice,
) -> None:
    size = batch_size_of(inputs)
    rows = np.arange(size)
    rows[changed] = np.roll(np.arange(size), 1)[changed]
    outputs, acts = probed(params, inputs, {})
    noise = {}
    for site, act in acts.items():
        if act.shape[:1] == (size,):
            key, sub = jax.random.split(key)
            scale = jnp.max(jnp.abs(act)).astype(jnp.float32) + 1
            delta = scale * jax.random.normal(sub, act.shape)
            noise[site] = delta.at[kept].set(0).astype(act.dtype)
    other = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], inputs)
    outputs2, acts2 = probed(params, other, noise)
    for site in noise:  # a site without the batch axis cannot tell
        _check_rows(f"site {site!r}", acts[site], acts2[site], kept)
    leaves = zip(jax.tree.leaves(outputs), jax.tree.leaves(outputs2), strict=True)
    for before, after in leaves:
        if jnp.shape(before)[:1] != (size,):
            raise ValueError(
                f"check_no_mixing: the outputs must have leading batch axis {size}, "
                f"got shape {jnp.shape(before)}"
            )
        _check_rows("the outputs", before, after, kept)


def _check_rows(name: str, before: Any, after: Any, kept: slice) -> None:
    eps = float(jnp.finfo(before.dtype).eps) if is_float_array(before) else 0.0
    before = _concrete("check_no_mixing", before)[kept]
    after = _concrete("check_no_mixing", after)[kept]
    moved = np.abs(before - after)
    allowed = 1e3 * eps * max(np.max(np.abs(before), initial=0.0), np.finfo("f4").tiny)
    if not np.all((moved <= allowed) | (np.isnan(before) & np.isnan(after))):
        raise ValueError(
            "check_no_mixing: examples of a batch influence each other at "
            f"{name}: changing one half of the batch moved the other by up to "
            f"{np.nanmax(moved):.3g}; per-example gradients would be wrong. Switch "
            "batch statistics to evaluation mode, or map the model over examples"
        )
