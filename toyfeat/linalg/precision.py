"""Full-precision products, safe scales, and the limit of squared numbers.

Sums and products here work in *units*: a power of two near the largest entry is taken
out first and put back last.  Both steps are exact, so that results at any size in range
(see :mod:`toyfeat.linalg`) are those of the same data at 1, and ordinary results have
the same bits as without.
"""

import jax
import jax.numpy as jnp

from toyfeat.types import Array

Axis = str | tuple[str, ...] | None
"""The mesh axis that rows are split over, or ``None`` on one device."""


def sum_over_devices(x: Array, axis: Axis) -> Array:
    """Sum over the devices that share the rows."""
    return x if axis is None else jax.lax.psum(x, axis)


HIGHEST = jax.lax.Precision.HIGHEST

GRAM_CUTOFF = 4e-5
"""Share of the first eigenvalue below which a Gram matrix is not trusted.

An eigenvalue of a float32 Gram matrix is wrong by about ``u = 6e-8`` of the first,
so a singular value at a share ``r`` of the first is wrong by ``u / (2 r)`` of it.
The root of this cutoff, 6.3e-3, is where that error reaches 5e-6.  See "The Gram
matrix up to a smaller side of ten block widths" in docs/decisions/linalg.md.
"""

_MARGIN = 8
"""Distance of a unit from the ends of the float's range.

Numbers in such a unit are at most ``2 * _MARGIN``, and the inverse of the unit is at
least ``tiny * _MARGIN / 4``, hence a normal number.
"""


def dot(a: Array, b: Array) -> Array:
    """Multiply ``a @ b`` in full precision on every platform."""
    return jnp.matmul(a, b, precision=HIGHEST)


def across(a: Array, b: Array) -> Array:
    """Multiply ``a^T b`` by contracting rows, without a transposed copy."""
    dims = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=HIGHEST)


def nonzero(x: Array) -> Array:
    """Replace zeros by ones, to divide by the result."""
    return jnp.where(x == 0, jnp.ones_like(x), x)


def power_of_two(x: Array) -> Array:
    """Round sizes to powers of two, whose inverse is a normal number as well.

    Args:
      x: not negative.  Sizes near the ends of the range are moved inwards.

    Returns:
      Powers of two, constant for derivatives; 1 where ``x`` is not finite, so that
      data in such units stay not finite.
    """
    info = jnp.finfo(x.dtype)
    inside = jnp.clip(x, float(info.tiny) * _MARGIN, float(info.max) / _MARGIN)
    unit = jax.lax.reduce_precision(inside, info.nexp, 0)
    return jax.lax.stop_gradient(jnp.where(x < jnp.inf, unit, jnp.ones_like(unit)))


def power_of_four(x: Array) -> Array:
    """Round sizes to powers of four, which have exact roots (see power_of_two)."""
    return power_of_two(jnp.sqrt(power_of_two(x))) ** 2


def largest_size(x: Array) -> Array:
    """Largest entry by magnitude; 0 for an empty array."""
    return jnp.max(jnp.abs(x), initial=0)


def split_scale(scale: Array) -> tuple[Array, Array, Array]:
    """Split a scale into three factors, two of them powers of two.

    A product of huge or tiny numbers stays in range if it is divided by the second
    factor before it is summed, and by the third after it.

    Args:
      scale: positive.

    Returns:
      A number near 1, and two powers of two of about the same size.
    """
    # The nearest power of two, and the two halves of its exponent.
    unit = power_of_two(scale)
    inner = power_of_two(jnp.sqrt(unit))
    return scale / unit, inner, unit / inner


def norm(x: Array) -> Array:
    """Euclidean norm of nonnegative numbers, safe from over- and underflow."""
    size = nonzero(jnp.max(x, initial=0))
    return jnp.sqrt(jnp.sum((x / size) ** 2)) * size
