"""Full-precision products, safe scales, and the limit of squared numbers."""

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


def norm(x: Array) -> Array:
    """Euclidean norm of nonnegative numbers, safe from over- and underflow."""
    size = nonzero(jnp.max(x, initial=0))
    return jnp.sqrt(jnp.sum((x / size) ** 2)) * size
