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
    return check_rounded(who, round_rows(acts, grads))


def check_rounded(
    who: str, rounded: tuple[Moments, dict[str, tuple[ArrayLike, ...]]]
) -> Moments:
    """Check moments by what :func:`round_rows` returns of them.

    Raises:
      ValueError: outside of a trace, if they are not finite.
    """
    stats, sums = rounded
    if isinstance(stats.scatter, Tracer):
        return stats
    # One transfer for all checks.
    for name, values in jax.device_get(sums).items():
        _check_finite(who, name, stats.mean.dtype, *values)
    return stats


@jax.jit
def round_rows(
    acts: RowMoments, grads: RowMoments | None
) -> tuple[Moments, dict[str, tuple[ArrayLike, ...]]]:
    """Round and take out of units; returns the moments and what is checked of them."""
    # Activations, and their scatter in units.
    weight, scatter = to_float(acts.weight), to_float(acts.scatter)
    mean = to_float(acts.mean)
    root = acts.unit * jnp.sqrt(acts.mass)
    stats = Moments(weight * acts.mass, mean * acts.unit, scatter)
    looked_at = [jnp.abs(mean), *_diagonals(scatter, root, acts)]
    # Gradients, per example, not per row: each example has a row per readout.
    if grads is not None:
        share = grads.mass / acts.mass
        readouts = ratio(to_float(grads.weight), weight) * share
        centred = ratio(to_float(grads.scatter), weight) * share
        slope = to_float(grads.mean)
        second = centred + readouts * outer(slope)
        looked_at += _diagonals(second, grads.unit, grads)
    # One reduction of each kind: a first call is as long as there are kernels.
    size, *sizes = jnp.max(jnp.stack(looked_at), axis=1)
    rounding = (jnp.finfo(mean.dtype).eps * size) ** 2 * weight
    squares = [_in_range(scatter, root, rounding, *sizes[:2])]
    if grads is not None:
        squares += [_in_range(second, grads.unit, jnp.zeros(()), *sizes[3:5])]
    finite = [jnp.isfinite(x).all() for x in squares]
    stats = stats._replace(scatter=squares[0])
    sums = {"activations": (stats.weight, finite[0], sizes[2], acts.unit)}
    if grads is None:
        return stats, sums
    sums["gradients"] = (stats.weight, finite[1], sizes[5], grads.unit)
    stats = stats._replace(
        grad_mean=slope * grads.unit, grad_second=squares[1], readouts=readouts
    )
    return stats, sums


def _diagonals(squares: Array, root: Array, rows: RowMoments) -> list[Array]:
    """Diagonals ``[D]`` of squares, of squares out of units, of the sums themselves."""
    diagonal = _diagonal(squares)
    return [diagonal, diagonal * root * root, jnp.abs(_diagonal(rows.scatter.high))]


def _diagonal(matrix: Array) -> Array:
    """Diagonal as a slice, which takes no kernel of its own as a gather does."""
    return matrix.reshape(-1)[:: matrix.shape[-1] + 1]


def _in_range(
    squares: Array, root: Array, rounding: Array, top: Array, size: Array
) -> Array:
    """Take squares out of units; NaN if they become too small for the float.

    Args:
      squares: ``[D, D]``, in units.
      root: ``[]``, the root of their unit.
      rounding: ``[]``, the level in units below which squares are rounding.
      top: ``[]``, the largest of the diagonal in units.
      size: ``[]``, that out of units.
    """
    info = jnp.finfo(squares.dtype)
    out = squares * root * root
    # Entries smaller than the largest by the rounding must not be flushed either.
    least = float(info.tiny) / float(info.eps)
    vanished = (top > rounding.astype(top.dtype) * _ROUNDING) & (size < least)
    return jnp.where(vanished, jnp.full((), jnp.nan, out.dtype), out)


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
