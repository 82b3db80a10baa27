"""Products in full precision, and sizes that neither over- nor underflow."""

import jax
import jax.numpy as jnp

from toyfeat.types import Array

HIGHEST = jax.lax.Precision.HIGHEST


def dot(a: Array, b: Array) -> Array:
    """``a @ b`` without the shortcuts of accelerators."""
    return jnp.matmul(a, b, precision=HIGHEST)


def across(a: Array, b: Array) -> Array:
    """``a^T b`` without transposing: both are contracted over their rows."""
    dims = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=HIGHEST)


def nonzero(x: Array) -> Array:
    """``x``, or 1 where it is 0."""
    return jnp.where(x == 0, jnp.ones_like(x), x)


def norm(x: Array) -> Array:
    """Euclidean norm of numbers that are not negative."""
    size = nonzero(jnp.max(x, initial=0))
    return jnp.sqrt(jnp.sum((x / size) ** 2)) * size
