"""Gram matrices of many rows, block by block.

Short sums lose less in float32, a block is scaled or shifted while it is in
cache, and on CPUs, where the compiler knows no symmetric product, a wide matrix
is spared a quarter of the work by leaving out one corner.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from toyfeat.linalg.precise import HIGHEST
from toyfeat.types import Array

_BLOCK = 2048
_Sums = tuple[Array, Array, Array]


def scaled_gram(rows: Array, factor: Array) -> Array:
    """``(factor A)^T (factor A)``, ``[D, D]``."""
    return _over_blocks(rows, lambda block: block * factor)[0]


def shifted_gram(rows: Array, shift: Array) -> tuple[Array, Array]:
    """``C^T C`` and the column sums of ``C = A - shift``."""
    return _over_blocks(rows, lambda block: block - shift[None, :])


def _over_blocks(rows: Array, change: Callable[[Array], Array]) -> tuple[Array, Array]:
    num, dim = rows.shape
    half = dim // 2 if dim >= 512 else 0
    size = min(num, _BLOCK)
    whole = num // size * size if size else 0

    def add(total: _Sums, block: Array) -> tuple[_Sums, None]:
        block = change(block)
        left, right = block[:, :half], block[:, half:]
        parts = (_gram(left, block), _gram(right, right), jnp.sum(block, axis=0))
        return (total[0] + parts[0], total[1] + parts[1], total[2] + parts[2]), None

    shapes = ((half, dim), (dim - half, dim - half), (dim,))
    upper, lower, sums = (jnp.zeros(shape, rows.dtype) for shape in shapes)
    total = (upper, lower, sums)
    if whole:
        blocks = rows[:whole].reshape(-1, size, dim)
        total, _ = jax.lax.scan(add, total, blocks)
    if whole < num:
        total, _ = add(total, rows[whole:])
    upper, lower, sums = total
    left = jnp.concatenate([upper[:, half:].T, lower], axis=1)
    return jnp.concatenate([upper, left]), sums


def _gram(a: Array, b: Array) -> Array:
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=HIGHEST)
