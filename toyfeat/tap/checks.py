"""Checks of the values of taps, which run outside of jit."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.processes import to_host
from toyfeat.types import Taps

# Share of the gradients that are not 0 from which underflow is reported, if that many
# are near it: below that the second moments, sums of squares, lose next to nothing.
_UNDERFLOW_SHARE = 0.1

# Multiple of the smallest float16 up to which rounding is more than 1/16 of a value.
_COARSE_FLOAT16 = 8

# Multiple of the smallest normal number of other types up to which as many entries lie
# as below it, where a device has flushed them to 0: one octave.
_NEAR_UNDERFLOW = 2


def check_taps(taps: Taps | Mapping[str, Taps]) -> None:
    """Raise if taps hold NaN, infinite values or invalid weights.

    Gradients that are all 0, or many of which underflowed, are no error (a site that
    nothing reads has none) but hold nothing to analyse: a warning says so.

    Args:
      taps: taps of one site, or site name to taps.

    Raises:
      ValueError: if the activations or gradients of a site have entries that are
        not finite in examples of positive weight (says how many and where the
        first is), if a weight is negative or not finite, or if no example has
        weight, or shapes do not fit.
      TypeError: inside jit, where values are not known, and for what are no taps.

    Warns:
      UserWarning: if all gradients of a site are 0 in the examples that count, or
        many are as small as its dtype can tell.

    Example:
      >>> import jax.numpy as jnp
      >>> acts = jnp.array([[1.0, jnp.nan]])
      >>> check_taps({"mlp": Taps(acts, None, jnp.ones(1))})
      Traceback (most recent call last):
      ValueError: check_taps: site 'mlp' has 1 non-finite of 2 entries in acts, ...
    """
    by_site = {"": taps} if isinstance(taps, Taps) else taps
    if not isinstance(by_site, Mapping) or not by_site:
        raise TypeError(
            f"check_taps: taps must be Taps or a dict of them, got {taps!r:.80}; pass "
            "what ft.tap returned"
        )
    for name, site_taps in by_site.items():
        who = f"site {name!r}" if name else "the taps"
        if not isinstance(site_taps, Taps):
            raise TypeError(
                f"check_taps: {who} must be Taps, got {type(site_taps).__name__}; pass "
                "what ft.tap returned"
            )
        _check_site(who, site_taps)
        warn_of_lost_grads(f"check_taps: {who}", site_taps, stacklevel=3)


def _check_site(who: str, taps: Taps) -> None:
    """Check the shapes and weights of a site, then its activations and gradients."""
    _check_shapes(who, taps)
    weights = to_numpy("check_taps", taps.weights)
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
            f"{weights.size}; the readout's mask leaves out everything, change it"
        )
    for field in ("acts", "grads", "targets"):
        value = getattr(taps, field)
        if value is None:
            continue
        # Examples of weight 0 may hold anything.
        value = to_numpy("check_taps", value)
        bad = ~np.isfinite(value) & counted.reshape((-1, *(1,) * (value.ndim - 1)))
        if bad.any():
            first = np.argwhere(bad)[0]
            raise ValueError(
                f"check_taps: {who} has {int(bad.sum())} non-finite of {value.size} "
                f"entries in {field}, the first in example {first[0]}; look at its "
                "input, the readout's scale and the dtype"
            )


def _check_shapes(who: str, taps: Taps) -> None:
    """Raise unless the arrays of a site have the shapes of taps."""
    num, width = jnp.shape(taps.acts)[:1], jnp.shape(taps.acts)[1:]
    outputs = width if taps.targets is None else jnp.shape(taps.targets)[1:]
    fits = len(width) == 1 and len(outputs) == 1 and jnp.shape(taps.weights) == num
    if taps.targets is not None:
        fits = fits and jnp.shape(taps.targets)[:1] == num
    if taps.grads is not None:
        shape = jnp.shape(taps.grads)
        fits = fits and len(shape) == 3 and shape[:1] == num and shape[2:] == outputs
    if not fits:
        named = taps._asdict().items()
        got = ", ".join(f"{k} {list(jnp.shape(v))}" for k, v in named if v is not None)
        raise ValueError(
            f"check_taps: {who} must have acts [N, D], grads [N, K, D] and weights "
            f"[N], got {got}; flatten positions to examples as ft.tap does"
        )


def warn_of_lost_grads(who: str, taps: Taps, *, stacklevel: int) -> None:
    """Warn of gradients that are all 0, or many of which underflowed.

    Args:
      who: the function and what it looks at, which begin the message.
      taps: of a site; concrete.
      stacklevel: as of ``warnings.warn``, seen from the caller of this function.
    """
    if taps.grads is None or isinstance(taps.grads, Tracer):
        return
    # Magnitudes of the entries that are not 0 in examples that count.
    grads = to_host(taps.grads)[to_host(taps.weights) > 0]
    sizes = np.abs(grads[grads != 0].astype(np.float64))
    if not grads.size:
        return
    advice = "scale the readout up, or take gradients in float32 or bfloat16"
    if not sizes.size:
        narrow = grads.dtype.itemsize < np.dtype(np.float32).itemsize
        warnings.warn(
            f"{who} wants gradients, got {grads.size} that are all 0: nothing that is "
            "differentiated reads the site (behind a stop_gradient, a head of 0, "
            "another branch)"
            + (f", or all underflowed in {grads.dtype}; {advice}" if narrow else "")
            + "; take another site or readout",
            stacklevel=stacklevel + 1,
        )
        return
    # Entries of which few digits are left, or as many as were flushed to 0.
    info = jnp.finfo(grads.dtype)
    limit = _NEAR_UNDERFLOW * float(info.tiny)
    if info.dtype == np.float16:
        limit = _COARSE_FLOAT16 * float(info.smallest_subnormal)
    share = np.mean(sizes < limit)
    if share > _UNDERFLOW_SHARE:
        warnings.warn(
            f"{who} wants gradients of full precision, got {grads.dtype} of which "
            f"{share:.0%} of those but 0 are below {limit:.2g}, so that others "
            f"underflowed to 0; {advice}",
            stacklevel=stacklevel + 1,
        )


def to_numpy(who: str, value: Any) -> np.ndarray:
    """Convert a concrete array to float32 or float64 NumPy."""
    if isinstance(value, Tracer):
        raise TypeError(f"{who}: looks at values, so call it outside of jit and grad")
    value = to_host(jnp.asarray(value))
    return value.astype(np.float64 if value.dtype == np.float64 else np.float32)
