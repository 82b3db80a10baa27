"""Matrices that are given by their products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.linalg.precision import largest_size, nonzero, split_scale
from toyfeat.linalg.randomized.operators import Operator
from toyfeat.linalg.randomized.tall import Tall
from toyfeat.types import Array


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


def from_linear_map(products: LinearMap) -> Operator:
    """Operator of a matrix that is given by its products.

    Args:
      products: the two products, the shape and the dtype.

    Returns:
      The operator; its Gram matrix takes ``dim`` products.
    """
    # Products of the caller's, of vectors over the inner factor of the scale.
    rows, dim = products.shape
    dtype = jnp.dtype(products.dtype)

    def forward(z: Array, scale: Array) -> Tall:
        near_one, inner, outer = split_scale(scale)
        z = (z / near_one / inner).T
        return [_call_product("matvec", products.matvec, z, rows, dtype) / outer]

    def backward(y: Tall, scale: Array) -> Array:
        near_one, inner, outer = split_scale(scale)
        w = _call_product("rmatvec", products.rmatvec, y[0] / inner, dim, dtype)
        return w.T / outer / near_one

    # The matrix is its product with the identity.
    def materialize() -> Tall:
        return forward(jnp.eye(dim, dtype=dtype), jnp.ones((), dtype))

    def gram() -> tuple[Array, Array]:
        # A^T A / size^2, divided factor by factor.
        y = materialize()
        size = nonzero(largest_size(y[0]))
        return backward([y[0] / size], size), size

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


def _call_product(
    name: str, product: Callable[[Array], Array], x: Array, length: int, dtype: Any
) -> Array:
    """Call a product of the caller's, and check what it returns."""
    # An error of the caller's function is most often one of its shape.
    about = f"to take a block of column vectors {x.shape}"
    try:
        result = product(x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"randomized_svd: wanted {name} {about}, got {type(error).__name__}: "
            f"{error}; check the shape (N, D) of the LinearMap, and its functions"
        ) from error
    # Its shape and dtype.
    shape, kind = (length, x.shape[1]), getattr(result, "dtype", None)
    if kind is None or jnp.shape(result) != shape:
        got = "no array" if kind is None else f"shape {jnp.shape(result)}"
        raise ValueError(
            f"randomized_svd: wanted {name} to return shape {shape}, got {got}; the "
            "products act on blocks of column vectors"
        )
    if jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(
            f"randomized_svd: wanted {name} to return real numbers, got {kind}; split "
            "a complex matrix into real and imaginary rows"
        )
    return jnp.asarray(result, dtype)
