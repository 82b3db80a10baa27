"""Checks of the matrices that ``randomized_svd`` takes."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from toyfeat.checks import check_array, check_function, check_int
from toyfeat.linalg.precision import Axis, largest_size
from toyfeat.linalg.randomized.linear_maps import LinearMap, from_linear_map
from toyfeat.types import Array, ArrayLike

Blocks = (
    Callable[[], Iterable[ArrayLike]]
    | list[ArrayLike]
    | tuple[ArrayLike, ...]
    | Iterator[ArrayLike]
)
"""Row blocks ``[n_i, D]``: a list, or a function that returns a fresh iterator."""

_MAX_ASYMMETRY = 0.05
"""Largest difference of ``x^T (A^T A x)`` from ``|A x|^2`` that rounding explains.

Products in bfloat16 differ by less than 1e-2; those of another matrix by about 1.
"""

_HOW = (
    "give sparse and implicit matrices as LinearMap(matvec, rmatvec, shape), lists and "
    "others as jnp.asarray(matrix)"
)


def as_floats(matrix: Any) -> Array:
    """Check that a matrix is an array of floats, and cast 16-bit ones to float32."""
    check_array("randomized_svd", "matrix", matrix, hint=_HOW, floats=True)
    array = jnp.asarray(matrix)
    small = jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if small else array


def check_linear_map(key: Array, products: LinearMap) -> LinearMap:
    """Check the fields of a linear map, and that its products belong together.

    Args:
      key: of a random vector.
      products: from the caller.

    Returns:
      The same with ints and a dtype.

    Raises:
      TypeError: if a field is of another type.
      ValueError: if the two products are not those of one matrix.
    """
    # Two functions.
    for name in ("matvec", "rmatvec"):
        check_function(
            "randomized_svd",
            name,
            getattr(products, name),
            "of a block of vectors",
            hint="for a sparse matrix write lambda x: a @ np.asarray(x)",
        )
    # Two sides.
    shape = products.shape
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise TypeError(
            f"randomized_svd: shape of a LinearMap must be (N, D), got {shape!r}"
        )
    rows, dim = (check_int("randomized_svd", "side of shape", n) for n in shape)
    # A dtype that arrays can have here: float64 only where it is enabled.
    try:
        dtype = jnp.dtype(products.dtype)
    except TypeError:
        dtype = None
    if dtype not in (jnp.float32, jnp.float64) or dtype != jnp.zeros((), dtype).dtype:
        raise TypeError(
            "randomized_svd: dtype of a LinearMap must be float32, or float64 inside "
            f"jax.enable_x64(True), got {products.dtype!r}; split a complex matrix "
            "into real and imaginary rows"
        )
    products = LinearMap(products.matvec, products.rmatvec, (rows, dim), dtype)
    _check_adjoint(key, products)
    return products


def _check_adjoint(key: Array, products: LinearMap) -> None:
    """Check with one vector that ``rmatvec`` is the transpose of ``matvec``."""
    op, one = from_linear_map(products), jnp.ones((), products.dtype)
    # A random direction, and its image.
    x = jax.random.normal(key, (1, products.shape[1]), products.dtype)
    x = x / jnp.linalg.norm(x)
    y = op.forward(x, one)
    size = largest_size(y[0])
    if isinstance(size, Tracer):
        return
    # Both sides in units of the product; one of zeros, NaN or inf shows later.
    if not 0 < float(size) < np.inf:
        return
    y = [y[0] / size]
    w = op.backward(y, size)
    square, form = (float(v) for v in (jnp.sum(y[0] ** 2), jnp.sum(w * x)))
    if abs(form - square) > _MAX_ASYMMETRY * square:
        raise ValueError(
            "randomized_svd: rmatvec must be the product with the transpose of that of "
            f"matvec, got x^T rmatvec(matvec(x)) = {form:.3g} where |matvec(x)|^2 is "
            f"{square:.3g}; check both on the columns of an identity matrix"
        )


def check_blocks(blocks: Blocks) -> tuple[Callable[[], Iterable[Array]], int, int]:
    """Check row blocks, and read their shapes.

    Args:
      blocks: a list, or a function that returns a fresh iterator.

    Returns:
      A function that reads the blocks again, checked, the number of rows and the
      width.

    Raises:
      TypeError: if there is no iterator, or a block is no array of floats.
      ValueError: if they cannot be read again, or the shapes do not fit.
    """
    # Blocks must be readable more than once.
    if isinstance(blocks, Iterator):
        raise ValueError(
            "randomized_svd: row blocks must be readable more than once, got an "
            "iterator; pass a list or a function that returns a fresh iterator, or "
            "fold the blocks with stream_svd"
        )
    read = blocks if callable(blocks) else lambda: iter(blocks)
    first = read()
    if not isinstance(first, Iterable) or hasattr(first, "shape"):
        raise TypeError(
            "randomized_svd: a function must return an iterator over row blocks, got "
            f"{type(first).__name__}; write lambda: iter(blocks)"
        )
    # The first pass is for the shapes.
    shapes = [as_floats(block).shape for block in first]
    if isinstance(first, Iterator) and read() is first:
        raise ValueError(
            "randomized_svd: a function must return a fresh iterator at every call, "
            "got the same iterator again; write lambda: iter(blocks)"
        )
    # Matrices of one width.
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"randomized_svd: wanted row blocks [n, D], got shapes {shapes[:3]}; a "
            "list is one of blocks, give a matrix as one array"
        )
    widths = sorted({shape[1] for shape in shapes})
    if len(widths) > 1:
        raise ValueError(
            f"randomized_svd: wanted row blocks of one width D, got widths {widths}"
        )

    reread = partial(_reread, read, shapes)
    return reread, sum(shape[0] for shape in shapes), widths[0]


def _reread(
    read: Callable[[], Iterable[ArrayLike]], shapes: list[tuple[int, ...]]
) -> Iterator[Array]:
    """Read row blocks again, and check that they are the same."""
    for block, shape in zip_longest(read(), shapes):
        array = None if block is None else as_floats(block)
        if array is None or array.shape != shape:
            raise ValueError(
                "randomized_svd: row blocks must be the same at every call, got "
                f"shape {None if array is None else array.shape} where it was "
                f"{shape}; return a fresh iterator over the same blocks"
            )
        yield array


def mesh_and_axis(array: Array, mesh: Any, axis: Axis) -> tuple[Any, Axis]:
    """Mesh and axis over which the rows are split, ``None`` if they are not."""
    if (mesh is None) != (axis is None):
        raise ValueError(
            f"randomized_svd: mesh and axis go together, got mesh={mesh}, axis={axis!r}"
        )
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"randomized_svd: mesh must be a jax.sharding.Mesh, got {mesh!r}; "
            "jax.make_mesh makes one"
        )
    # The array's own sharding.
    source = jax.typeof(array) if isinstance(array, Tracer) else array
    sharding = getattr(source, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    spec = (*sharding.spec, None, None) if named else (None, None)
    if spec[1] is not None:
        raise ValueError(
            "randomized_svd: rows can be split over devices, columns cannot; got "
            f"sharding {spec[:2]}"
        )
    if mesh is None:
        if not named or spec[0] is None or sharding.mesh.empty:
            return None, None
        mesh, axis = sharding.mesh, spec[0]
    # Does the mesh have these axes, and do the rows divide over them?
    names = axis if isinstance(axis, tuple) else (axis,)
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"randomized_svd: the mesh has axes {tuple(mesh.shape)}, got axis={axis!r}"
        )
    shards = int(np.prod([mesh.shape[name] for name in names]))
    if len(array) % shards:
        raise ValueError(
            f"randomized_svd: {len(array)} rows cannot be split over {shards} devices; "
            "add rows of zeros"
        )
    return mesh, axis
