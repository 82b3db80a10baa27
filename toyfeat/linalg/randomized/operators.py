"""Matrices as operators: in memory, given by products, or in row blocks."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from toyfeat.linalg.gram import normalized_gram, unit_gram
from toyfeat.linalg.orthonormal import choose
from toyfeat.linalg.precision import (
    HIGHEST,
    Axis,
    largest_size,
    power_of_two,
    split_scale,
    sum_over_devices,
)
from toyfeat.linalg.randomized.tall import Tall
from toyfeat.types import Array

Sketch = Literal["float32", "tensorfloat32", "bfloat16"]
"""Precision of the passes that only find a subspace."""

_KERNEL_WIDTH = 32
"""Widths for which XLA's CPU product kernel is fast are multiples of it.

Just below a multiple a product takes up to 1.6 times as long as one padded with
zeros (no script of that measurement is kept).
"""

_TRANSPOSE_ABOVE = 64
"""Width above which the transposed product is faster by a sixth.

That is for widths just above a multiple of the kernel's (no script of that
measurement is kept).
"""


class Operator(NamedTuple):
    """Products of a matrix ``[n, dim]``, the face that all algorithms use.

    Attributes:
      forward: ``(z [l, dim], scale []) -> A z^T / scale``, tall.
      backward: ``(y, scale) -> y^T A / scale``, ``y`` tall, ``[l, dim]``, summed over
        devices.
      gram: ``() -> (A^T A / size^2, size)``, ``size`` being that of the entries.
      materialize: ``() -> A``, tall.
      shape: ``(n, dim)``, over all devices.
      dtype: of everything.
      axis: the mesh axis of the rows.
      matrix: the array behind the products, if it is one array.
      rebuild: makes the same operator of another such array.
    """

    forward: Callable[[Array, Array], Tall]
    backward: Callable[[Tall, Array], Array]
    gram: Callable[[], tuple[Array, Array]]
    materialize: Callable[[], Tall]
    shape: tuple[int, int]
    dtype: Any
    axis: Axis = None
    matrix: Array | None = None
    rebuild: Callable[[Array], "Operator"] | None = None


def from_array(
    matrix: Array, rows: int, axis: Axis = None, sketch: Sketch = "float32"
) -> Operator:
    """Operator of a matrix in memory.

    Args:
      matrix: ``[n, dim]``, on each device its own rows.
      rows: ``n`` over all devices.
      axis: the mesh axis of the rows.
      sketch: the precision of the products.

    Returns:
      The operator; the small side of its products is stored as ``[l, dim]``.
    """

    # Vectors are divided by one factor of the scale, products by the other.
    def forward(z: Array, scale: Array) -> Tall:
        near_one, inner, outer = split_scale(scale)
        return [_wide_product(matrix, z / near_one / inner, sketch) / outer]

    def backward(y: Tall, scale: Array) -> Array:
        near_one, inner, outer = split_scale(scale)
        w = _product(y[0] / inner, matrix, 0, 0, sketch) / outer
        return sum_over_devices(w, axis) / near_one

    def gram() -> tuple[Array, Array]:
        squares, unit = unit_gram(matrix)
        return normalized_gram(squares, unit, axis)

    return Operator(
        forward=forward,
        backward=backward,
        gram=gram,
        materialize=lambda: [matrix],
        shape=(rows, matrix.shape[1]),
        dtype=matrix.dtype,
        axis=axis,
        matrix=matrix,
        rebuild=lambda m: from_array(m, rows, axis, sketch),
    )


def from_wide_array(matrix: Array, sketch: Sketch = "float32") -> Operator:
    """Operator of the transpose of a wide matrix, without transposing it.

    The barriers keep the products in the orientation in which they are fast:
    the compiler would fold a transposition into them.

    Args:
      matrix: ``[dim, n]``.
      sketch: the precision of the products.

    Returns:
      The operator of ``[n, dim]``.
    """

    # The barriers stand before the outer factor of the scale, a transposed product.
    def forward(z: Array, scale: Array) -> Tall:
        near_one, inner, outer = split_scale(scale)
        y = _product(z / near_one / inner, matrix, 1, 0, sketch)
        return [jax.lax.optimization_barrier(y).T / outer]

    def backward(y: Tall, scale: Array) -> Array:
        near_one, inner, outer = split_scale(scale)
        w = _product(matrix, y[0] / inner, 1, 0, sketch)
        return jax.lax.optimization_barrier(w).T / outer / near_one

    # Inner products of the stored rows, which are the operator's columns.
    def outer_gram() -> tuple[Array, Array]:
        unit = power_of_two(largest_size(matrix))
        scaled = matrix / unit
        return normalized_gram(_product(scaled, scaled, 1, 1, "float32"), unit)

    return Operator(
        forward=forward,
        backward=backward,
        gram=outer_gram,
        materialize=lambda: [matrix.T],
        shape=(matrix.shape[1], matrix.shape[0]),
        dtype=matrix.dtype,
        matrix=matrix,
        rebuild=lambda m: from_wide_array(m, sketch),
    )


def from_blocks(
    blocks: Callable[[], Iterable[Array]], shape: tuple[int, int], dtype: Any
) -> Operator:
    """Operator of row blocks that are read again for every product.

    Args:
      blocks: returns a fresh iterator over row blocks ``[n_i, dim]``.
      shape: ``(n, dim)``.
      dtype: of the results.

    Returns:
      The operator; it holds one block in memory at a time.
    """

    # Every product reads all blocks once.
    def forward(z: Array, scale: Array) -> Tall:
        near_one, inner, outer = split_scale(scale)
        z = z / near_one / inner
        return [_forward_block(block, z) / outer for block in blocks()]

    def backward(y: Tall, scale: Array) -> Array:
        near_one, inner, outer = split_scale(scale)
        total = jnp.zeros((y[0].shape[1], shape[1]), dtype)
        for block, part in zip(blocks(), y, strict=True):
            total = _backward_block(total, part / inner, block)
        return total / outer / near_one

    # Squares in the largest unit so far.
    def gram() -> tuple[Array, Array]:
        total = jnp.zeros((shape[1], shape[1]), dtype)
        unit = power_of_two(jnp.zeros((), dtype))
        for block in blocks():
            total, unit = _gram_block(total, unit, block)
        return normalized_gram(total, unit)

    def materialize() -> Tall:
        return [jnp.asarray(block, dtype) for block in blocks()]

    return Operator(
        forward=forward,
        backward=backward,
        gram=gram,
        materialize=materialize,
        shape=shape,
        dtype=dtype,
    )


@jax.jit
def _forward_block(block: Array, z: Array) -> Array:
    """Multiply a block with vectors."""
    return _product(block.astype(z.dtype), z, 1, 1, "float32")


@jax.jit
def _backward_block(total: Array, part: Array, block: Array) -> Array:
    """Add a block's product with the transpose."""
    return total + _product(part, block.astype(part.dtype), 0, 0, "float32")


@jax.jit
def _gram_block(total: Array, unit: Array, block: Array) -> tuple[Array, Array]:
    """Add a block's Gram matrix in the larger of two units."""
    gram, size = unit_gram(block.astype(total.dtype))
    larger = jnp.maximum(unit, size)
    return total * (unit / larger) ** 2 + gram * (size / larger) ** 2, larger


def _wide_product(matrix: Array, z: Array, sketch: Sketch) -> Array:
    """Multiply ``matrix @ z.T`` in the layout that is fastest on a CPU."""
    excess = len(z) % _KERNEL_WIDTH
    # Just below a multiple of the kernel's width: fill with zeros.
    if excess > _KERNEL_WIDTH // 2:
        padded = jnp.pad(z, ((0, _KERNEL_WIDTH - excess), (0, 0)))
        return _product(matrix, padded, 1, 1, sketch)[:, : len(z)]
    # Just above one: the transposed product.
    if excess and len(z) > _TRANSPOSE_ABOVE:
        return jax.lax.optimization_barrier(_product(z, matrix, 1, 1, sketch)).T
    return _product(matrix, z, 1, 1, sketch)


def _product(a: Array, b: Array, i: int, j: int, sketch: Sketch) -> Array:
    """Contract axis ``i`` of ``a`` with axis ``j`` of ``b`` in some precision."""
    # Factors are rounded to bfloat16, sums are not.
    dims = (((i,), (j,)), ((), ()))
    if sketch == "bfloat16":
        a16, b16 = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jax.lax.dot_general(a16, b16, dims, preferred_element_type=a.dtype)
    # HIGH is TF32 on GPUs that have it, and float32 on CPUs.
    precision = jax.lax.Precision.HIGH if sketch == "tensorfloat32" else HIGHEST
    return jax.lax.dot_general(a, b, dims, precision=precision)


def largest_entry(op: Operator, y: Tall) -> Array:
    """Largest entry of a tall matrix by magnitude, over all devices."""
    size = jnp.stack([largest_size(block) for block in y]).max()
    return size if op.axis is None else jax.lax.pmax(size, op.axis)


def choose_route(
    op: Operator,
    pred: Array,
    careful: Callable[..., Any],
    quick: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Run one of two functions ``(op, *operands)``.

    The array behind the operator, if there is one, is an operand of the condition,
    so that ``vmap`` can batch it.  Without one, the condition is decided in Python
    where it is known.

    Args:
      op: the matrix.
      pred: ``[]`` bool, whether ``careful`` is needed.
      careful: it must not close over arrays.
      quick: likewise, with a result of the same shapes.
      operands: arrays, or trees of arrays.

    Returns:
      The result of one of the two.
    """
    if op.rebuild is not None:
        rebuild = op.rebuild
        return choose(
            pred,
            lambda matrix, *ops: careful(rebuild(matrix), *ops),
            lambda matrix, *ops: quick(rebuild(matrix), *ops),
            op.matrix,
            *operands,
        )
    if not isinstance(pred, Tracer):
        return (careful if pred else quick)(op, *operands)
    return jax.lax.cond(
        pred, lambda *ops: careful(op, *ops), lambda *ops: quick(op, *ops), *operands
    )
