"""Gram matrices of many rows, block by block.

Short sums lose less in float32, a block is scaled or shifted while it is in
cache, and on CPUs, where the compiler knows no symmetric product, a third of the
work is spared: of three column panels each is multiplied with itself and those to
its right only.
"""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from toyfeat.linalg.orthonormal import choose
from toyfeat.linalg.precise import across, nonzero
from toyfeat.linalg.tall import Axis, summed
from toyfeat.types import Array

_BLOCK = 2048


def safe_gram(
    matrix: Array, gram: Callable[[Array, Array], Array], axis: Axis = None
) -> tuple[Array, Array]:
    """A Gram matrix in units of the size of the entries, and that size.

    The entries are scaled before they are squared only if squares would over- or
    underflow, which the diagonal shows.

    Args:
      matrix: what it is made of.
      gram: ``(matrix, factor) -> [D, D]``, of the matrix times a number.
      axis: the mesh axis over which Gram matrices are summed.
    """
    plain = gram(matrix, jnp.ones((), matrix.dtype))
    top = _largest(jnp.diagonal(plain), axis)
    info = jnp.finfo(matrix.dtype)
    fine = (top > float(info.tiny) ** (2 / 3)) & (top < float(info.max) ** (3 / 4))

    def careful(matrix: Array, plain: Array, top: Array) -> tuple[Array, Array]:
        del plain, top
        size = nonzero(_largest(jnp.abs(matrix), axis))
        return gram(matrix, 1 / size), size

    def quick(matrix: Array, plain: Array, top: Array) -> tuple[Array, Array]:
        del matrix
        return plain / top, jnp.sqrt(top)

    scaled, size = choose(~fine, careful, quick, matrix, plain, top)
    return summed(scaled, axis), size


def _largest(x: Array, axis: Axis) -> Array:
    largest = jnp.max(x)
    return largest if axis is None else jax.lax.pmax(largest, axis)


@sequential_vmap
def scaled_gram(rows: Array, factor: Array) -> Array:
    """``(factor A)^T (factor A)``, ``[D, D]``."""
    return _over_blocks(rows, lambda block: block * factor)[0]


def shifted_gram(
    rows: Array, shift: Array, start: Array | int, size: int
) -> tuple[Array, Array]:
    """``C^T C`` and the column sums of some rows of ``C = A - shift``."""
    return _over_blocks(rows, lambda block: block - shift[None, :], start, size)


def _over_blocks(
    rows: Array,
    change: Callable[[Array], Array],
    start: Array | int = 0,
    size: int | None = None,
) -> tuple[Array, Array]:
    """Read blocks out of the whole array: a slice of it would be a copy."""
    size, dim = len(rows) if size is None else size, rows.shape[1]
    panels = _panels(dim)
    whole, rest = divmod(size, _BLOCK)

    def add(total: list[Array], block: Array) -> list[Array]:
        block = change(block)
        parts = [across(block[:, i:j], block[:, i:]) for i, j in panels]
        parts.append(across(jnp.ones((len(block), 1), block.dtype), block)[0])
        return [x + y for x, y in zip(total, parts, strict=True)]

    def block_at(index: Array | int, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, start + index * _BLOCK, size)

    shapes = [(j - i, dim - i) for i, j in panels]
    total = [jnp.zeros(shape, rows.dtype) for shape in [*shapes, (dim,)]]
    if whole:
        total = jax.lax.fori_loop(
            0, whole, lambda i, total: add(total, block_at(i, _BLOCK)), total
        )
    if rest:
        total = add(total, block_at(whole, rest))
    gram = jnp.zeros((dim, dim), rows.dtype)
    for (i, j), part in zip(panels, total, strict=False):
        gram = gram.at[i:, i:j].set(part.T).at[i:j, i:].set(part)
    return gram, total[-1]


def _panels(dim: int) -> list[tuple[int, int]]:
    """Column panels, of multiples of 16: as measured, three, and five if wide."""
    if dim < 128:
        return [(0, dim)]
    number = 3 if dim < 2048 else 5
    width = dim // number // 16 * 16
    return list(pairwise([*range(0, number * width, width), dim]))
