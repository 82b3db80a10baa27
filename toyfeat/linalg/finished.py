"""Moments out of running sums: rounded, out of units, and checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.linalg.compensated import RowMoments, outer, ratio, to_float
from toyfeat.types import Array, ArrayLike, Moments

_ROUNDING = 4
"""Squares of the rounding of a mean up to which scatter counts as zero; see
:func:`toyfeat.pca`, which ignores variance below one."""


def moments_from_rows(who: str, acts: RowMoments, grads: RowMoments | None) -> Moments:
    """Round pairs of floats, take them out of units, and add back the gradients' mean.

    Args:
      who: the public function, for errors.
      acts: one row per example.
      grads: one row per example and readout, or ``None``.

    Returns:
      The moments; NaN where squares that are not zero leave the float's range.

    Raises:
      ValueError: outside of a trace, if they are not finite.
    """
    stats, sums = _round(acts, grads)
    if isinstance(stats.scatter, Tracer):
        return stats
    # One transfer for all checks.
    for name, values in jax.device_get(sums).items():
        _check_finite(who, name, acts.unit.dtype, *values)
    return stats


@jax.jit
def _round(
    acts: RowMoments, grads: RowMoments | None
) -> tuple[Moments, dict[str, tuple[Array, ...]]]:
    """Round and take out of units; returns the moments and what is checked of them."""
    # Activations out of units.
    weight, scatter = to_float(acts.weight), to_float(acts.scatter)
    mean = to_float(acts.mean)
    root = acts.unit * jnp.sqrt(acts.mass)
    rounding = (jnp.finfo(mean.dtype).eps * jnp.max(jnp.abs(mean))) ** 2 * weight
    scatter = _in_range(scatter, root, rounding)
    stats = Moments(weight * acts.mass, mean * acts.unit, scatter)
    sums = {"activations": _summary(acts, stats.weight, scatter)}
    if grads is None:
        return stats, sums
    # Per example, not per row: each example has a row per readout.
    share = grads.mass / acts.mass
    readouts = ratio(to_float(grads.weight), weight) * share
    centred = ratio(to_float(grads.scatter), weight) * share
    mean = to_float(grads.mean)
    second = centred + readouts * outer(mean)
    second = _in_range(second, grads.unit, jnp.zeros(()))
    sums["gradients"] = _summary(grads, stats.weight, second)
    stats = stats._replace(
        grad_mean=mean * grads.unit, grad_second=second, readouts=readouts
    )
    return stats, sums


def _in_range(squares: Array, root: Array, rounding: Array) -> Array:
    """Take squares out of units; NaN if they become too small for the float.

    Args:
      squares: ``[D, D]``, in units.
      root: ``[]``, the root of their unit.
      rounding: ``[]``, the level in units below which squares are rounding.
    """
    info = jnp.finfo(squares.dtype)
    out = squares * root * root
    # Entries smaller than the largest by the rounding must not be flushed either.
    top, size = jnp.max(jnp.diagonal(squares)), jnp.max(jnp.diagonal(out))
    least = float(info.tiny) / float(info.eps)
    vanished = (top > rounding.astype(top.dtype) * _ROUNDING) & (size < least)
    return jnp.where(vanished, jnp.full((), jnp.nan, out.dtype), out)


def _summary(rows: RowMoments, weight: ArrayLike, squares: Array) -> tuple[Array, ...]:
    """Summarize moments for checks.

    Returns:
      The weight; whether squares are finite; the largest in units; the unit.
    """
    top = jnp.max(jnp.abs(jnp.diagonal(rows.scatter.high, axis1=-2, axis2=-1)))
    return jnp.asarray(weight), jnp.isfinite(squares).all(), top, jnp.max(rows.unit)


def _check_finite(
    who: str, name: str, dtype: Any, weight: Any, finite: Any, top: Any, unit: Any
) -> None:
    """Raise if moments are not finite, and say why."""
    if not np.all(np.isfinite(weight)):
        raise ValueError(
            f"{who}: weights must be finite and not negative, got NaN, inf, a negative "
            "weight or a sum that overflows; set the weight of rows to leave out to 0"
        )
    if finite:
        return
    # Not finite in units: that came in.  Otherwise the unit leaves the range.
    if not np.isfinite(top):
        raise ValueError(
            f"{who}: {name} must be finite, got NaN or inf in a row of positive "
            "weight; toyfeat.check_taps finds such rows"
        )
    raise ValueError(
        f"{who}: the squares of the {name} must fit {dtype}, got {name} of "
        f"size {unit:.0e}; multiply them (or the readout, for gradients) by about "
        f"{1 / unit:.0e}, and divide the results by it"
    )
