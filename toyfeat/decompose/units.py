"""Statistics in units of their size, and what comes of them checked."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_int
from toyfeat.linalg.precision import largest_size, nonzero, power_of_two
from toyfeat.linalg.svd import SVD
from toyfeat.moments import SketchedMoments
from toyfeat.types import Array, Basis, Moments

Stats = Moments | SketchedMoments

NO_GRADS = (
    "the moments hold no gradients; tap with a readout and fold with "
    "moments(dim, grads=True)"
)


class Units(NamedTuple):
    """Powers of two near the sizes of activations and of gradients.

    Attributes:
      acts: ``[]``.
      grads: ``[]``.
    """

    acts: Array
    grads: Array


def in_units(stats: Stats) -> tuple[Stats, Units]:
    """Divide activations and gradients by powers of two near their size, exactly.

    Sizes are roots of mean squares.  Constant activations, whose centred squares are
    rounding, have the size of that rounding.
    """
    if isinstance(stats, SketchedMoments):
        return _sketch_in_units(stats)
    mean, weight = jnp.asarray(stats.mean), nonzero(jnp.asarray(stats.weight))
    rounding = jnp.finfo(mean.dtype).eps * largest_size(mean)
    # Activations: the scatter is a sum of squares, the mean of the first power.
    scatter = jnp.asarray(stats.scatter)
    size = _root_size(scatter) / jnp.sqrt(weight)
    acts, grads = power_of_two(jnp.maximum(size, rounding)), jnp.ones((), mean.dtype)
    # Gradients: their second moment is a mean of squares already.
    if stats.grad_second is not None:
        second = jnp.asarray(stats.grad_second)
        grads = power_of_two(_root_size(second))
        stats = stats._replace(grad_second=_divide_square(second, grads))
        if stats.grad_mean is not None:
            stats = stats._replace(grad_mean=jnp.asarray(stats.grad_mean) / grads)
    scaled = stats._replace(mean=mean / acts, scatter=_divide_square(scatter, acts))
    return scaled, Units(acts, grads)


def _sketch_in_units(stats: SketchedMoments) -> tuple[SketchedMoments, Units]:
    """Divide the singular values of sketches, which are roots of sums of squares."""
    mean, weight = jnp.asarray(stats.mean), nonzero(jnp.asarray(stats.weight))
    rounding = jnp.finfo(mean.dtype).eps * largest_size(mean)
    size = largest_size(stats.acts.s) / jnp.sqrt(weight)
    acts, grads = power_of_two(jnp.maximum(size, rounding)), jnp.ones((), mean.dtype)
    if stats.grads is not None:
        grads = power_of_two(largest_size(stats.grads.s) / jnp.sqrt(weight))
        stats = stats._replace(grads=_divide_svd(stats.grads, grads))
    scaled = stats._replace(acts=_divide_svd(stats.acts, acts), mean=mean / acts)
    return scaled, Units(acts, grads)


def _divide_square(squares: Array, unit: Array) -> Array:
    """Divide squares by that of a unit, which may itself not be a float.

    The barrier keeps a compiler from dividing once, by the square.
    """
    return jax.lax.optimization_barrier(squares / unit) / unit


def _root_size(squares: Array) -> Array:
    """Root of the largest diagonal entry of a matrix of squares."""
    return jnp.sqrt(largest_size(jnp.diagonal(squares)))


def _divide_svd(svd: SVD, unit: Array) -> SVD:
    """Singular values, and the residual, over a unit."""
    info = replace(svd.info, residual=jnp.asarray(svd.info.residual) / unit)
    return svd._replace(s=jnp.asarray(svd.s) / unit, info=info)


class Checked(NamedTuple):
    """A basis and what is checked of it outside of a trace.

    Attributes:
      basis: out of units.
      first: ``[]``, the largest entry of its spectrum in units.
      units: of the statistics.
      finite: ``[]`` bool, whether the statistics are.
    """

    basis: Basis
    first: Array
    units: Units
    finite: Array


def out_of_units(stats: Stats, basis: Basis, units: Units, root: Array) -> Checked:
    """Multiply the spectrum of a basis by its unit.

    Args:
      stats: the statistics as they came.
      basis: with a spectrum in units.
      units: of the statistics.
      root: of the spectrum's unit.

    Returns:
      The basis, for :func:`checked_basis`.
    """
    # The spectrum is a square.
    diagnostics = basis.diagnostics
    scaled = basis._replace(
        spectrum=basis.spectrum * root * root,
        diagnostics=diagnostics._replace(
            total=diagnostics.total * root * root,
            cut=diagnostics.cut * root * root,
        ),
    )
    parts = [jnp.isfinite(x).all() for x in jax.tree.leaves(_arrays(stats))]
    finite = jnp.stack(parts).all()
    return Checked(scaled, basis.spectrum[0], units, finite)


def checked_basis(who: str, checked: Checked) -> Basis:
    """Check a basis and return it.

    Args:
      who: the public function.
      checked: from :func:`out_of_units`.

    Returns:
      The basis.

    Raises:
      ValueError: outside of a trace, if the statistics are not finite, or if the
        spectrum leaves the float's range.
    """
    basis = checked.basis
    if isinstance(basis.spectrum, Tracer) or isinstance(basis.readers, Tracer):
        return basis
    # One transfer for all checks.
    first, out, acts, grads, finite = map(
        float,
        jax.device_get(
            [checked.first, basis.spectrum[0], *checked.units, checked.finite]
        ),
    )
    if not finite:
        raise ValueError(
            f"{who}: stats must be finite, got NaN or inf; toyfeat.check_taps finds "
            "the examples that brought them"
        )
    tiny = float(jnp.finfo(basis.spectrum.dtype).tiny)
    if first > 0 and not tiny <= out < np.inf:
        raise ValueError(
            f"{who}: the spectrum must fit {basis.spectrum.dtype}, got activations of "
            f"size {acts:.0e} and gradients of size {grads:.0e}; multiply them by "
            "constants first, and divide the results by these"
        )
    return basis


def _arrays(stats: Stats) -> Any:
    """Arrays of statistics whose NaN would be that of a basis."""
    if isinstance(stats, SketchedMoments):
        grads = None if stats.grads is None else stats.grads.s
        return (stats.weight, stats.mean, stats.acts.s, grads)
    return stats


def check_rank(who: str, stats: Stats, rank: int) -> int:
    """Check that the rank is in range."""
    about = ", the width of the site (or of its sketch)"
    return check_int(who, "rank", rank, most=width(stats), about=about)


def check_stats(who: str, stats: Any, *, grads: bool = False) -> None:
    """Check the type and the shapes of statistics, and that they hold gradients."""
    if not isinstance(stats, Moments | SketchedMoments):
        raise TypeError(
            f"{who}: stats must be Moments, got {type(stats).__name__}; "
            "toyfeat.moments_of(taps) computes them"
        )
    # Matrices of the width of the mean.
    sketched = isinstance(stats, SketchedMoments)
    mean = jnp.shape(stats.mean)
    squares = [] if sketched else [stats.scatter, stats.grad_second]
    shapes = [jnp.shape(x) for x in squares if x is not None]
    if len(mean) != 1 or any(shape != mean * 2 for shape in shapes):
        raise ValueError(
            f"{who}: stats must hold a mean [D] and matrices [D, D] of one site, got "
            f"shapes {[mean, *shapes]}; use jax.vmap for a batch of statistics"
        )
    if grads and (stats.grads if sketched else stats.grad_second) is None:
        raise ValueError(f"{who}: {NO_GRADS}")


def width(stats: Stats) -> int:
    """Largest possible number of directions."""
    if isinstance(stats, SketchedMoments):
        return len(stats.acts.s)
    return len(jnp.asarray(stats.mean))
