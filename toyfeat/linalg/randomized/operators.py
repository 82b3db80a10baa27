"""Matrices as operators: in memory, given by products, or in row blocks."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.linalg.gram import safe_gram, scaled_gram
from toyfeat.linalg.precision import HIGHEST, Axis, nonzero, sum_over_devices
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


class LinearMap(NamedTuple):
    """A linear map, given by its products with blocks of vectors.

    Attributes:
      matvec: ``[D, l] -> [N, l]``, the product with the matrix.
      rmatvec: ``[N, l] -> [D, l]``, the product with its transpose.
      shape: ``(N, D)``.
      dtype: of the vectors, ``float32`` or ``float64``.
    """

    matvec: Callable[[Array], Array]
    rmatvec: Callable[[Array], Array]
    shape: tuple[int, int]
    dtype: Any = np.float32


class Operator(NamedTuple):
    """Products of a matrix ``[n, dim]``, the face that all algorithms use.

    Attributes:
      forward: ``z [l, dim] -> A z^T``, tall.
      backward: ``y`` tall ``-> y^T A``, ``[l, dim]``, summed over devices.
      gram: ``() -> (A^T A / size^2, size)``, ``size`` being that of the entries.
      materialize: ``() -> A``, tall.
      shape: ``(n, dim)``, over all devices.
      dtype: of everything.
      axis: the mesh axis of the rows.
      matrix: the array behind the products, if it is one array.
      rebuild: makes the same operator of another such array.
    """

    forward: Callable[[Array], Tall]
    backward: Callable[[Tall], Array]
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

    def forward(z: Array) -> Tall:
        return [_wide_product(matrix, z, sketch)]

    def backward(y: Tall) -> Array:
        return sum_over_devices(_product(y[0], matrix, 0, 0, sketch), axis)

    return Operator(
        forward=forward,
        backward=backward,
        gram=lambda: safe_gram(matrix, scaled_gram, axis),
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

    def forward(z: Array) -> Tall:
        y = _product(z, matrix, 1, 0, sketch)
        return [jax.lax.optimization_barrier(y).T]

    def backward(y: Tall) -> Array:
        w = _product(matrix, y[0], 1, 0, sketch)
        return jax.lax.optimization_barrier(w).T

    def outer_gram(matrix: Array, factor: Array) -> Array:
        scaled = matrix * factor
        return _product(scaled, scaled, 1, 1, "float32")

    return Operator(
        forward=forward,
        backward=backward,
        gram=lambda: safe_gram(matrix, outer_gram),
        materialize=lambda: [matrix.T],
        shape=(matrix.shape[1], matrix.shape[0]),
        dtype=matrix.dtype,
        matrix=matrix,
        rebuild=lambda m: from_wide_array(m, sketch),
    )


def from_linear_map(products: LinearMap) -> Operator:
    """Operator of a matrix that is given by its products.

    Args:
      products: the two products, the shape and the dtype.

    Returns:
      The operator; its Gram matrix takes ``dim`` products.
    """
    rows, dim = products.shape
    dtype = jnp.dtype(products.dtype)

    def forward(z: Array) -> Tall:
        y = products.matvec(z.T)
        return [_check_product("matvec", y, (rows, len(z)), dtype)]

    def backward(y: Tall) -> Array:
        w = products.rmatvec(y[0])
        return _check_product("rmatvec", w, (dim, y[0].shape[1]), dtype).T

    def materialize() -> Tall:
        return forward(jnp.eye(dim, dtype=dtype))

    def gram() -> tuple[Array, Array]:
        y = materialize()
        size = nonzero(jnp.max(jnp.abs(y[0])))
        return backward([y[0] / size]) / size, size

    return Operator(
        forward=forward,
        backward=backward,
        gram=gram,
        materialize=materialize,
        shape=(rows, dim),
        dtype=dtype,
    )


def transpose(products: LinearMap) -> LinearMap:
    """Transpose a linear map by swapping its two products."""
    return LinearMap(
        matvec=products.rmatvec,
        rmatvec=products.matvec,
        shape=(products.shape[1], products.shape[0]),
        dtype=products.dtype,
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

    def forward(z: Array) -> Tall:
        return [_forward_block(block, z) for block in blocks()]

    def backward(y: Tall) -> Array:
        total = jnp.zeros((y[0].shape[1], shape[1]), dtype)
        for block, part in zip(blocks(), y, strict=True):
            total = _backward_block(total, part, block)
        return total

    def gram() -> tuple[Array, Array]:
        total = jnp.zeros((shape[1], shape[1]), dtype)
        size = jnp.zeros((), dtype)
        for block in blocks():
            total, size = _gram_block(total, size, block)
        return total, nonzero(size)

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
def _gram_block(total: Array, size: Array, block: Array) -> tuple[Array, Array]:
    """Add a block's Gram matrix in units of the largest entry so far."""
    block = block.astype(total.dtype)
    larger = jnp.maximum(size, jnp.max(jnp.abs(block), initial=0))
    inverse = 1 / nonzero(larger)
    return total * (size * inverse) ** 2 + scaled_gram(block, inverse), larger


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
    dims = (((i,), (j,)), ((), ()))
    if sketch == "bfloat16":
        a16, b16 = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jax.lax.dot_general(a16, b16, dims, preferred_element_type=a.dtype)
    # HIGH is TF32 on GPUs that have it, and float32 on CPUs.
    precision = jax.lax.Precision.HIGH if sketch == "tensorfloat32" else HIGHEST
    return jax.lax.dot_general(a, b, dims, precision=precision)


def _check_product(name: str, x: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Check the shape of a product that the caller's function returned."""
    if jnp.shape(x) != shape:
        raise ValueError(
            f"randomized_svd: wanted {name} to return shape {shape}, got "
            f"{jnp.shape(x)}; the products act on blocks of column vectors"
        )
    return jnp.asarray(x, dtype)
