"""Matrices too tall to move: lists of row blocks, split over devices if need be.

A *tall* matrix ``[n, l]`` is a list of arrays ``[n_i, l]``.  Under ``shard_map``
every device holds its own rows, and ``axis`` names the mesh axis over which what
has lost the dimension ``n`` is summed.
"""

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import choose, deviation, inverse_factor
from toyfeat.linalg.precise import HIGHEST
from toyfeat.types import Array

Tall = list[Array]
"""Row blocks ``[n_i, l]``."""

Axis = str | tuple[str, ...] | None
"""The mesh axis that rows are split over, or ``None`` on one device."""


def summed(x: Array, axis: Axis) -> Array:
    """Sum over the devices that share the rows."""
    return x if axis is None else jax.lax.psum(x, axis)


def inner(x: Tall, y: Tall, axis: Axis) -> Array:
    """``x^T y``, ``[l, m]``."""
    parts = [
        jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=HIGHEST)
        for a, b in zip(x, y, strict=True)
    ]
    return summed(sum(parts[1:], parts[0]), axis)


def times(columns: list[Tall], factor: Array) -> Tall:
    """``[x_1, x_2, ...] @ factor`` without joining the columns."""
    total: Tall = []
    start = 0
    for x in columns:
        part = factor[start : start + x[0].shape[1]]
        products = [jnp.matmul(block, part, precision=HIGHEST) for block in x]
        total = (
            [a + b for a, b in zip(total, products, strict=True)]
            if start
            else (products)
        )
        start += x[0].shape[1]
    return total


def orthonormal_columns(y: Tall, axis: Axis) -> tuple[Tall, Array, Array]:
    """QR of a tall matrix: two rounds of Cholesky, Householder if they fail.

    Args:
      y: ``[n, l]`` with ``n >= l``; best with columns that are nearly orthogonal,
        of any size.
      axis: the mesh axis of the rows.

    Returns:
      ``q`` tall with orthonormal columns, ``r`` ``[l, l]`` with ``y = q r``, and
      whether Householder's reflections had to be used.
    """
    gram = inner(y, y, axis)
    first = inverse_factor(gram)
    q = times([y], first.T)
    second = inverse_factor(inner(q, q, axis))
    q = times([q], second.T)
    bad = ~(deviation(inner(q, q, axis)) < 64 * jnp.finfo(gram.dtype).eps)

    def quick(y: Tall, q: Tall) -> tuple[Tall, Array]:
        return q, inner(q, y, axis)

    def careful(y: Tall, q: Tall) -> tuple[Tall, Array]:
        del q
        return householder(y, axis)

    q, r = choose(bad, careful, quick, y, q)
    return q, r, bad


def householder(y: Tall, axis: Axis) -> tuple[Tall, Array]:
    """Local QR, QR of the stacked factors, and the product of the two."""
    factors = [jnp.linalg.qr(block) for block in y]
    local = jnp.concatenate([r for _, r in factors])
    start = 0
    if axis is not None:
        start = jax.lax.axis_index(axis) * local.shape[0]
        local = jax.lax.all_gather(local, axis, tiled=True)
    top, r = jnp.linalg.qr(local)
    blocks = []
    for q, _ in factors:
        part = jax.lax.dynamic_slice_in_dim(top, start, q.shape[1])
        blocks.append(jnp.matmul(q, part, precision=HIGHEST))
        start = start + q.shape[1]
    return blocks, r
