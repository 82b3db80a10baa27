"""One face for a matrix in memory, given by products, or in row blocks."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.linalg.gram import safe_gram, scaled_gram
from toyfeat.linalg.precise import HIGHEST, nonzero
from toyfeat.linalg.tall import Axis, Tall, summed
from toyfeat.types import Array

Sketch = Literal["float32", "tensorfloat32", "bfloat16"]
"""Precision of the passes that only find a subspace."""


class Products(NamedTuple):
    """A matrix that is known by what it does to blocks of vectors.

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
    """What the kernels know of a matrix ``[n, dim]``.

    Attributes:
      forward: ``z [l, dim] -> A z^T``, tall.
      backward: ``y`` tall ``-> y^T A``, ``[l, dim]``, summed over devices.
      gram: ``() -> (A^T A / size^2, size)``, ``size`` being that of the entries.
      whole: ``() -> A``, tall.
      shape: ``(n, dim)``, over all devices.
      dtype: of everything.
      axis: the mesh axis of the rows.
      matrix: what the products are made of, if that is one array.
      rebuild: the same operator of another such array.
    """

    forward: Callable[[Array], Tall]
    backward: Callable[[Tall], Array]
    gram: Callable[[], tuple[Array, Array]]
    whole: Callable[[], Tall]
    shape: tuple[int, int]
    dtype: Any
    axis: Axis = None
    matrix: Array | None = None
    rebuild: Callable[[Array], "Operator"] | None = None


def dense(
    matrix: Array, rows: int, axis: Axis = None, sketch: Sketch = "float32"
) -> Operator:
    """A matrix in memory; the small side of products is kept as ``[l, dim]``.

    Args:
      matrix: ``[n, dim]``, on each device its own rows.
      rows: ``n`` over all devices.
      axis: the mesh axis of the rows.
      sketch: the precision of the products, see :func:`_product`.
    """

    def forward(z: Array) -> Tall:
        return [_wide_product(matrix, z, sketch)]

    def backward(y: Tall) -> Array:
        return summed(_product(y[0], matrix, 0, 0, sketch), axis)

    return Operator(
        forward,
        backward,
        gram=lambda: safe_gram(matrix, scaled_gram, axis),
        whole=lambda: [matrix],
        shape=(rows, matrix.shape[1]),
        dtype=matrix.dtype,
        axis=axis,
        matrix=matrix,
        rebuild=lambda m: dense(m, rows, axis, sketch),
    )


def dense_wide(matrix: Array, sketch: Sketch = "float32") -> Operator:
    """The transpose of a wide matrix ``[dim, n]``, without transposing it.

    The barriers keep the products in the orientation in which they are fast:
    the compiler would fold a transposition into them.
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
        forward,
        backward,
        gram=lambda: safe_gram(matrix, outer_gram),
        whole=lambda: [matrix.T],
        shape=(matrix.shape[1], matrix.shape[0]),
        dtype=matrix.dtype,
        matrix=matrix,
        rebuild=lambda m: dense_wide(m, sketch),
    )


def by_products(products: Products) -> Operator:
    """A matrix given by products."""
    rows, dim = products.shape
    dtype = jnp.dtype(products.dtype)

    def forward(z: Array) -> Tall:
        return [_checked("matvec", products.matvec(z.T), (rows, len(z)), dtype)]

    def backward(y: Tall) -> Array:
        width = y[0].shape[1]
        return _checked("rmatvec", products.rmatvec(y[0]), (dim, width), dtype).T

    def whole() -> Tall:
        return forward(jnp.eye(dim, dtype=dtype))

    def gram() -> tuple[Array, Array]:
        y = whole()
        size = nonzero(jnp.max(jnp.abs(y[0])))
        return backward([y[0] / size]) / size, size

    return Operator(forward, backward, gram, whole, (rows, dim), dtype)


def transposed(products: Products) -> Products:
    """The transpose of a matrix given by products."""
    return Products(
        products.rmatvec,
        products.matvec,
        (products.shape[1], products.shape[0]),
        products.dtype,
    )


def in_blocks(
    blocks: Callable[[], Iterable[Array]], shape: tuple[int, int], dtype: Any
) -> Operator:
    """Row blocks that are read again for every product, one at a time."""

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

    def whole() -> Tall:
        return [jnp.asarray(block, dtype) for block in blocks()]

    return Operator(forward, backward, gram, whole, shape, dtype)


@jax.jit
def _forward_block(block: Array, z: Array) -> Array:
    return _product(block.astype(z.dtype), z, 1, 1, "float32")


@jax.jit
def _backward_block(total: Array, part: Array, block: Array) -> Array:
    return total + _product(part, block.astype(part.dtype), 0, 0, "float32")


@jax.jit
def _gram_block(total: Array, size: Array, block: Array) -> tuple[Array, Array]:
    """Add a block's Gram matrix in units of the largest entry so far."""
    block = block.astype(total.dtype)
    larger = jnp.maximum(size, jnp.max(jnp.abs(block), initial=0))
    inverse = 1 / nonzero(larger)
    return total * (size * inverse) ** 2 + scaled_gram(block, inverse), larger


def _wide_product(matrix: Array, z: Array, sketch: Sketch) -> Array:
    """``matrix @ z.T`` for a width that the compiler's CPU kernel likes or not.

    That kernel is at its best for widths of 32, 64, ...; just below them it takes
    up to 1.6 times as long as with zeros to fill the width, and just above 64
    the transposed product is faster by a sixth.
    """
    rest = len(z) % 32
    if rest > 16:
        full = jnp.pad(z, ((0, 32 - rest), (0, 0)))
        return _product(matrix, full, 1, 1, sketch)[:, : len(z)]
    if rest and len(z) > 64:
        return jax.lax.optimization_barrier(_product(z, matrix, 1, 1, sketch)).T
    return _product(matrix, z, 1, 1, sketch)


def _product(a: Array, b: Array, i: int, j: int, sketch: Sketch) -> Array:
    """Contract axis ``i`` of ``a`` with axis ``j`` of ``b``."""
    dims = (((i,), (j,)), ((), ()))
    if sketch == "bfloat16":
        a16, b16 = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jax.lax.dot_general(a16, b16, dims, preferred_element_type=a.dtype)
    # HIGH is TF32 on GPUs that have it, and float32 on CPUs.
    precision = jax.lax.Precision.HIGH if sketch == "tensorfloat32" else HIGHEST
    return jax.lax.dot_general(a, b, dims, precision=precision)


def _checked(name: str, x: Array, shape: tuple[int, int], dtype: Any) -> Array:
    if jnp.shape(x) != shape:
        raise ValueError(
            f"randomized_svd: wanted {name} to return shape {shape}, got "
            f"{jnp.shape(x)}; the products act on blocks of column vectors"
        )
    return jnp.asarray(x, dtype)
