"""Gram matrices of many rows, summed block by block.

Short sums lose less in float32, and a block is scaled or shifted while it is in
cache.  XLA's CPU compiler has no symmetric product.  So the columns are cut into
panels, and each panel is multiplied with itself and with those to its right only,
which saves about a third of the work.
"""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from toyfeat.linalg.orthonormal import choose
from toyfeat.linalg.precision import Axis, across, nonzero, sum_over_devices
from toyfeat.types import Array

_BLOCK_ROWS = 2048
"""Rows of a block, to stay in cache; chosen by trial on CPUs."""

_SAFE_LOW, _SAFE_HIGH = 2 / 3, 3 / 4
"""Powers of the smallest and largest float between which squares are safe.

If the largest diagonal entry lies between ``tiny ** _SAFE_LOW`` and
``max ** _SAFE_HIGH``, no sum overflowed, and what underflowed is far below the
rounding of the result.
"""

_PANEL_MULTIPLE = 16
"""Panel widths are multiples of it, which suits the CPU's product kernel."""

_PANELS, _PANELS_WIDE = 3, 5
"""Column panels of a matrix, and of a wide one.

"Gram matrices in three column panels, read in place" in docs/decisions/linalg.md has
the measurement for three; five were chosen by trial.
"""

_PANELS_FROM, _WIDE_FROM = 128, 2048
"""Widths from which panels, and more panels, pay off; chosen by trial."""


def safe_gram(
    matrix: Array, gram: Callable[[Array, Array], Array], axis: Axis = None
) -> tuple[Array, Array]:
    """Compute a Gram matrix in units of the largest entry, and that unit.

    Entries are scaled before they are squared only if squares would over- or
    underflow, which the diagonal shows.

    Args:
      matrix: the matrix, in the layout that ``gram`` takes.
      gram: ``(matrix, factor) -> [D, D]``, of the matrix times a number.
      axis: the mesh axis over which Gram matrices are summed.

    Returns:
      ``[D, D]``, and the unit ``[]``: the Gram matrix is the first times the square
      of the second.
    """
    # Square without scaling, and look whether that was safe.
    plain = gram(matrix, jnp.ones((), matrix.dtype))
    top = _largest(jnp.diagonal(plain), axis)
    info = jnp.finfo(matrix.dtype)
    safe = (top > float(info.tiny) ** _SAFE_LOW) & (top < float(info.max) ** _SAFE_HIGH)

    def careful(matrix: Array, plain: Array, top: Array) -> tuple[Array, Array]:
        del plain, top
        size = nonzero(_largest(jnp.abs(matrix), axis))
        return gram(matrix, 1 / size), size

    def quick(matrix: Array, plain: Array, top: Array) -> tuple[Array, Array]:
        del matrix
        return plain / top, jnp.sqrt(top)

    scaled, size = choose(~safe, careful, quick, matrix, plain, top)
    return sum_over_devices(scaled, axis), size


def _largest(x: Array, axis: Axis) -> Array:
    """Maximum over entries and devices."""
    largest = jnp.max(x)
    return largest if axis is None else jax.lax.pmax(largest, axis)


@sequential_vmap
def scaled_gram(rows: Array, factor: Array) -> Array:
    """Compute ``(factor A)^T (factor A)``, ``[D, D]``."""
    return _gram_and_sums(rows, lambda block: block * factor)[0]


def shifted_gram(
    rows: Array, shift: Array, start: Array | int, size: int
) -> tuple[Array, Array]:
    """Compute ``C^T C`` and the column sums of some rows of ``C = A - shift``.

    Args:
      rows: ``[n, D]``.
      shift: ``[D]``.
      start: the first row that counts.
      size: how many rows count.

    Returns:
      ``[D, D]`` and ``[D]``.
    """
    return _gram_and_sums(rows, lambda block: block - shift[None, :], start, size)


def _gram_and_sums(
    rows: Array,
    change: Callable[[Array], Array],
    start: Array | int = 0,
    size: int | None = None,
) -> tuple[Array, Array]:
    """Sum the Gram matrix and the columns of changed rows.

    Blocks are read out of the full array, because a slice of it would be a copy.
    """
    size, dim = len(rows) if size is None else size, rows.shape[1]
    panels = _panels(dim)
    blocks, remainder = divmod(size, _BLOCK_ROWS)

    def add(total: list[Array], block: Array) -> list[Array]:
        # The part of the Gram matrix right of each panel's first column.
        block = change(block)
        parts = [across(block[:, i:j], block[:, i:]) for i, j in panels]
        # Column sums, as a product with a column of ones.
        parts.append(across(jnp.ones((len(block), 1), block.dtype), block)[0])
        return [x + y for x, y in zip(total, parts, strict=True)]

    def block_at(index: Array | int, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, start + index * _BLOCK_ROWS, size)

    # Add full blocks in a loop, then the remaining rows.
    shapes = [(j - i, dim - i) for i, j in panels]
    total = [jnp.zeros(shape, rows.dtype) for shape in [*shapes, (dim,)]]
    if blocks:
        total = jax.lax.fori_loop(
            0, blocks, lambda i, total: add(total, block_at(i, _BLOCK_ROWS)), total
        )
    if remainder:
        total = add(total, block_at(blocks, remainder))

    # Write each panel and its mirror image.
    gram = jnp.zeros((dim, dim), rows.dtype)
    for (i, j), part in zip(panels, total, strict=False):
        gram = gram.at[i:, i:j].set(part.T).at[i:j, i:].set(part)
    return gram, total[-1]


def _panels(dim: int) -> list[tuple[int, int]]:
    """Cut ``dim`` columns into panels ``(start, stop)``."""
    if dim < _PANELS_FROM:
        return [(0, dim)]
    number = _PANELS if dim < _WIDE_FROM else _PANELS_WIDE
    width = dim // number // _PANEL_MULTIPLE * _PANEL_MULTIPLE
    return list(pairwise([*range(0, number * width, width), dim]))
