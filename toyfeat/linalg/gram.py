"""Gram matrices of many rows, summed block by block.

Short sums lose less in float32, and a block is shifted and brought to units (a power
of two near its largest entry) while it is in cache.  XLA's CPU compiler has no
symmetric product.  So the columns are cut into panels, and each panel is multiplied
with itself and with those to its right only, which saves about a third of the work.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from toyfeat.linalg.precision import (
    Axis,
    across,
    largest_size,
    nonzero,
    power_of_two,
    sum_over_devices,
)
from toyfeat.types import Array

_BLOCK_ROWS = 2048
"""Rows of a block, to stay in cache; chosen by trial on CPUs."""

_PANEL_MULTIPLE = 16
"""Panel widths are multiples of it, which suits the CPU's product kernel."""

_PANELS, _PANELS_WIDE = 3, 5
"""Column panels of a matrix, and of a wide one.

"Gram matrices in three column panels, read in place" in docs/decisions/linalg.md has
the measurement for three; five were chosen by trial.
"""

_PANELS_FROM, _WIDE_FROM = 128, 2048
"""Widths from which panels, and more panels, pay off; chosen by trial."""


def normalized_gram(gram: Array, unit: Array, axis: Axis = None) -> tuple[Array, Array]:
    """Normalize a Gram matrix to a largest diagonal entry of 1.

    Args:
      gram: ``[D, D]``, in units; on each device that of its own rows.
      unit: ``[]``, a power of two; on each device its own.
      axis: the mesh axis over which Gram matrices are summed.

    Returns:
      ``[D, D]``, and the size ``[]``: the Gram matrix is the first times the square
      of the second.
    """
    # One unit, and one size, for all devices.
    common = _largest(unit, axis)
    gram = gram * (unit / common) ** 2
    top = nonzero(_largest(jnp.max(jnp.diagonal(gram)), axis))
    return sum_over_devices(gram / top, axis), jnp.sqrt(top) * common


def _largest(x: Array, axis: Axis) -> Array:
    """Maximum over devices."""
    return x if axis is None else jax.lax.pmax(x, axis)


@sequential_vmap
def unit_gram(rows: Array) -> tuple[Array, Array]:
    """Compute ``A^T A / unit^2``, ``[D, D]``, and the unit ``[]``."""
    gram, _, unit = _gram_and_sums(rows, lambda block: block)
    return gram, unit


def shifted_gram(
    rows: Array, shift: Array, start: Array | int, size: int
) -> tuple[Array, Array, Array]:
    """Compute ``C^T C`` and the column sums of some rows of ``C = A - shift``.

    Args:
      rows: ``[n, D]``.
      shift: ``[D]``.
      start: the first row that counts.
      size: how many rows count.

    Returns:
      ``[D, D]`` and ``[D]``, both of ``C / unit``, and the unit ``[]``.
    """
    return _gram_and_sums(rows, lambda block: block - shift[None, :], start, size)


def _gram_and_sums(
    rows: Array,
    change: Callable[[Array], Array],
    start: Array | int = 0,
    size: int | None = None,
) -> tuple[Array, Array, Array]:
    """Sum the Gram matrix and the columns of changed rows, in units.

    Blocks are read out of the full array, because a slice of it would be a copy.  The
    unit grows with the largest entry so far, which is found while a block is in cache.
    """
    size, dim = len(rows) if size is None else size, rows.shape[1]
    panels = _panels(dim)
    blocks, remainder = divmod(size, _BLOCK_ROWS)

    def add(state: tuple[list[Array], Array], block: Array) -> Any:
        # Bring the block, and what was summed so far, to the larger of two units.
        total, unit = state
        block = change(block)
        larger = jnp.maximum(unit, power_of_two(largest_size(block)))
        block, ratio = block / larger, unit / larger
        factors = [ratio**2] * len(panels) + [ratio]
        # The part of the Gram matrix right of each panel's first column.
        parts = [across(block[:, i:j], block[:, i:]) for i, j in panels]
        # Column sums, as a product with a column of ones.
        parts.append(across(jnp.ones((len(block), 1), block.dtype), block)[0])
        sums = zip(total, factors, parts, strict=True)
        return [x * factor + y for x, factor, y in sums], larger

    def block_at(index: Array | int, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, start + index * _BLOCK_ROWS, size)

    # Add full blocks in a loop, then the remaining rows.
    shapes = [(j - i, dim - i) for i, j in panels]
    total = [jnp.zeros(shape, rows.dtype) for shape in [*shapes, (dim,)]]
    state = (total, power_of_two(jnp.zeros((), rows.dtype)))
    if blocks:
        state = jax.lax.fori_loop(
            0, blocks, lambda i, state: add(state, block_at(i, _BLOCK_ROWS)), state
        )
    if remainder:
        state = add(state, block_at(blocks, remainder))

    # Write each panel and its mirror image.
    total, unit = state
    gram = jnp.zeros((dim, dim), rows.dtype)
    for (i, j), part in zip(panels, total, strict=False):
        gram = gram.at[i:, i:j].set(part.T).at[i:j, i:].set(part)
    return gram, total[-1], unit


def _panels(dim: int) -> list[tuple[int, int]]:
    """Cut ``dim`` columns into panels ``(start, stop)``."""
    if dim < _PANELS_FROM:
        return [(0, dim)]
    number = _PANELS if dim < _WIDE_FROM else _PANELS_WIDE
    width = dim // number // _PANEL_MULTIPLE * _PANEL_MULTIPLE
    return list(pairwise([*range(0, number * width, width), dim]))
