"""Tall matrices as lists of row blocks, on one device or split over many.

A *tall* matrix ``[n, l]`` is a list of arrays ``[n_i, l]``.  Under ``shard_map``
every device holds its own rows.  ``axis`` names the mesh axis, and results without
the dimension ``n`` are summed over it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.linalg import dense
from toyfeat.linalg.orthonormal import choose, deviation, inverse_factor
from toyfeat.linalg.precision import Axis, across, dot, sum_over_devices
from toyfeat.types import Array

Tall = list[Array]
"""Row blocks ``[n_i, l]``."""

_CACHE_ROWS = 4096
"""Rows that stay in a CPU's cache.

See "Images of a Krylov space are read once" in docs/decisions/linalg.md.
"""

_ORTHONORMAL_ULPS = 64
"""Largest accepted error of an inner product of two columns, in ``eps``.

Larger than the limit for short rows, since sums of ``n`` products round more;
chosen by trial.
"""


def inner(x: Tall, y: Tall, axis: Axis) -> Array:
    """Inner products ``x^T y``, ``[l, m]``."""
    parts = [across(a, b) for a, b in zip(x, y, strict=True)]
    return sum_over_devices(sum(parts[1:], parts[0]), axis)


def combine_columns(columns: list[Tall], factor: Array) -> Tall:
    """Multiply ``[x_1, x_2, ...] @ factor``."""
    return [
        dot(jnp.concatenate(xs, axis=1), factor) for xs in zip(*columns, strict=True)
    ]


def combine_and_compare(
    columns: list[Tall], factor: Array, target: Tall, axis: Axis
) -> tuple[Tall, Array, Array]:
    """Multiply ``[x_1, x_2, ...] @ factor`` and sum what is needed of it.

    All in one pass over the rows: the first columns of the product are returned
    with their inner products, the last columns are only compared with ``target``.

    Args:
      columns: tall, ``L`` columns together.
      factor: ``[L, R + m]``.
      target: tall ``[n, m]``.
      axis: the mesh axis of the rows.

    Returns:
      The first ``R`` columns, tall; their inner products ``[R, R]``; the sum of
      the squared differences between the last ``m`` columns and ``target``.
    """
    # The first columns are returned, the others compared.
    rank = factor.shape[1] - target[0].shape[1]

    def process(rows: list[Array], factor: Array) -> tuple[Array, Array, Array]:
        product = dot(jnp.concatenate(rows[:-1], axis=1), factor)
        y, gap = product[:, :rank], rows[-1] - product[:, rank:]
        return y, across(y, y), jnp.sum(gap**2)

    parts = [
        jax.lax.platform_dependent(
            list(rows), factor, cpu=partial(_in_chunks, process), default=process
        )
        for rows in zip(*columns, target, strict=True)
    ]
    # Sums over blocks and devices.
    gram = jnp.stack([gram for _, gram, _ in parts]).sum(axis=0)
    gap = jnp.stack([gap for *_, gap in parts]).sum()
    return (
        [y for y, *_ in parts],
        sum_over_devices(gram, axis),
        sum_over_devices(gap, axis),
    )


def _in_chunks(
    process: Callable[..., tuple[Array, Array, Array]],
    rows: list[Array],
    factor: Array,
) -> tuple[Array, Array, Array]:
    """Run ``process`` on chunks of rows that stay in a CPU's cache."""
    num = len(rows[0])
    chunks = num // _CACHE_ROWS
    if chunks < 2:
        return process(rows, factor)

    def process_at(start: Array | int, size: int) -> tuple[Array, Array, Array]:
        return process(
            [jax.lax.dynamic_slice_in_dim(x, start, size) for x in rows], factor
        )

    def store(total: tuple, start: Array | int, chunk: tuple) -> tuple:
        y = jax.lax.dynamic_update_slice_in_dim(total[0], chunk[0], start, axis=0)
        return y, total[1] + chunk[1], total[2] + chunk[2]

    # Space for the rows that come out, and zeros for the sums.
    y, *sums = jax.eval_shape(process, [x[:1] for x in rows], factor)
    total = (
        jnp.zeros((num, y.shape[1]), y.dtype),
        *(jnp.zeros(x.shape, x.dtype) for x in sums),
    )
    # Full chunks in a loop, then the remaining rows.
    total = jax.lax.fori_loop(
        0,
        chunks,
        lambda i, total: store(
            total, i * _CACHE_ROWS, process_at(i * _CACHE_ROWS, _CACHE_ROWS)
        ),
        total,
    )
    end = chunks * _CACHE_ROWS
    return store(total, end, process_at(end, num - end)) if end < num else total


def orthonormal_columns(y: Tall, axis: Axis) -> tuple[Tall, Array, Array]:
    """QR of a tall matrix: two rounds of Cholesky QR, Householder if they fail.

    Args:
      y: ``[n, l]`` with ``n >= l``; best with columns that are nearly orthogonal,
        of any size.
      axis: the mesh axis of the rows.

    Returns:
      ``q`` tall with orthonormal columns, ``r`` ``[l, l]`` with ``y = q r``, and
      ``[]`` bool, whether Householder reflections had to be used.
    """
    # Two rounds of Cholesky QR, then the check.
    gram = inner(y, y, axis)
    first = inverse_factor(gram)
    q = combine_columns([y], first.T)
    second = inverse_factor(inner(q, q, axis))
    q = combine_columns([q], second.T)
    level = _ORTHONORMAL_ULPS * jnp.finfo(gram.dtype).eps
    bad = ~(deviation(inner(q, q, axis)) < level)

    def quick(y: Tall, q: Tall) -> tuple[Tall, Array]:
        return q, inner(q, y, axis)

    def careful(y: Tall, q: Tall) -> tuple[Tall, Array]:
        del q
        return householder(y, axis)

    q, r = choose(bad, careful, quick, y, q)
    return q, r, bad


def householder(y: Tall, axis: Axis) -> tuple[Tall, Array]:
    """Householder QR of a tall matrix, block by block (TSQR).

    Args:
      y: ``[n, l]``.
      axis: the mesh axis of the rows.

    Returns:
      ``q`` tall, and ``r`` ``[l, l]``.
    """
    # QR of every block, and the triangular factors of all devices together.
    factors = [dense.qr(block) for block in y]
    local = jnp.concatenate([r for _, r in factors])
    start = 0
    if axis is not None:
        start = jax.lax.axis_index(axis) * local.shape[0]
        local = jax.lax.all_gather(local, axis, tiled=True)
    # QR of the stacked factors; its rows turn each block's own q.
    top, r = dense.qr(local)
    blocks = []
    for q, _ in factors:
        part = jax.lax.dynamic_slice_in_dim(top, start, q.shape[1])
        blocks.append(dot(q, part))
        start = start + q.shape[1]
    return blocks, r
