"""Matrices too tall to move: lists of row blocks, split over devices if need be.

A *tall* matrix ``[n, l]`` is a list of arrays ``[n_i, l]``.  Under ``shard_map``
every device holds its own rows, and ``axis`` names the mesh axis over which what
has lost the dimension ``n`` is summed.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import choose, deviation, inverse_factor
from toyfeat.linalg.precise import across, dot
from toyfeat.types import Array

Tall = list[Array]
"""Row blocks ``[n_i, l]``."""

_CHUNK = 4096

Axis = str | tuple[str, ...] | None
"""The mesh axis that rows are split over, or ``None`` on one device."""


def summed(x: Array, axis: Axis) -> Array:
    """Sum over the devices that share the rows."""
    return x if axis is None else jax.lax.psum(x, axis)


def inner(x: Tall, y: Tall, axis: Axis) -> Array:
    """``x^T y``, ``[l, m]``."""
    parts = [across(a, b) for a, b in zip(x, y, strict=True)]
    return summed(sum(parts[1:], parts[0]), axis)


def times(columns: list[Tall], factor: Array) -> Tall:
    """``[x_1, x_2, ...] @ factor``."""
    return [
        dot(jnp.concatenate(xs, axis=1), factor) for xs in zip(*columns, strict=True)
    ]


def combined(
    columns: list[Tall], factor: Array, seen: Tall, axis: Axis
) -> tuple[Tall, Array, Array]:
    """``[x_1, x_2, ...] @ factor``, and what is wanted of it, in one pass.

    Args:
      columns: tall, ``L`` columns together.
      factor: ``[L, R + m]``.
      seen: tall ``[n, m]``, what the last columns are compared with.
      axis: the mesh axis of the rows.

    Returns:
      The first ``R`` columns, tall; their inner products ``[R, R]``; the sum of
      the squares of what the others differ by from ``seen``.
    """
    rank = factor.shape[1] - seen[0].shape[1]

    def part(rows: list[Array], factor: Array) -> tuple[Array, Array, Array]:
        out = dot(jnp.concatenate(rows[:-1], axis=1), factor)
        y, gap = out[:, :rank], rows[-1] - out[:, rank:]
        return y, across(y, y), jnp.sum(gap**2)

    parts = [
        jax.lax.platform_dependent(
            list(rows), factor, cpu=partial(_in_chunks, part), default=part
        )
        for rows in zip(*columns, seen, strict=True)
    ]
    gram = jnp.stack([gram for _, gram, _ in parts]).sum(axis=0)
    gap = jnp.stack([gap for *_, gap in parts]).sum()
    return [y for y, *_ in parts], summed(gram, axis), summed(gap, axis)


def _in_chunks(
    part: Callable[..., tuple[Array, Array, Array]], rows: list[Array], factor: Array
) -> tuple[Array, Array, Array]:
    """Go through rows in chunks that stay in a CPU's cache; half the time."""
    num = len(rows[0])
    count = num // _CHUNK
    if count < 2:
        return part(rows, factor)

    def of(start: Array | int, size: int) -> tuple[Array, Array, Array]:
        return part(
            [jax.lax.dynamic_slice_in_dim(x, start, size) for x in rows], factor
        )

    def put(done: tuple, start: Array | int, more: tuple) -> tuple:
        y = jax.lax.dynamic_update_slice_in_dim(done[0], more[0], start, axis=0)
        return y, done[1] + more[1], done[2] + more[2]

    y, *sums = jax.eval_shape(part, [x[:1] for x in rows], factor)
    done = (
        jnp.zeros((num, y.shape[1]), y.dtype),
        *(jnp.zeros(x.shape, x.dtype) for x in sums),
    )
    done = jax.lax.fori_loop(
        0,
        count,
        lambda i, done: put(done, i * _CHUNK, of(i * _CHUNK, _CHUNK)),
        done,
    )
    rest = count * _CHUNK
    return put(done, rest, of(rest, num - rest)) if rest < num else done


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
        blocks.append(dot(q, part))
        start = start + q.shape[1]
    return blocks, r
