"""Factorize dense matrices: ``eigh``, ``svd``, ``qr``, ``cholesky`` of ``jax.numpy``.

They give what ``jax.numpy.linalg`` gives, for one matrix. Under ``jax.vmap`` on a CPU
they take one matrix after the other. A batched call of jaxlib 0.10 spreads its matrices
over the threads of XLA and waits for them in one of these threads: as many independent
calls as there are threads, and the program waits for ever. Two do on a machine of two
cores. Later versions of jaxlib work off a batch in one thread too; accelerators keep
their batched kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``vmap`` of a function of arrays a loop on CPUs.

    Args:
      function: takes arrays; differentiable.

    Returns:
      The same function. Its derivatives are those of ``function``, batched as ever.
    """

    @jax.custom_batching.custom_vmap
    def single(*arrays: Array) -> Any:
        return function(*arrays)

    @single.def_vmap
    def batch(size: int, in_batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        del size
        axes = tuple(0 if batched else None for batched in in_batched)

        def loop(*arrays: Array) -> Any:
            split = [x for x, axis in zip(arrays, axes, strict=True) if axis == 0]

            def body(rows: list[Array]) -> Any:
                rest = iter(rows)
                pairs = zip(arrays, axes, strict=True)
                return single(*(next(rest) if axis == 0 else x for x, axis in pairs))

            return jax.lax.map(body, split)

        whole = jax.vmap(function, in_axes=axes)
        out = jax.lax.platform_dependent(*arrays, cpu=loop, default=whole)
        return out, jax.tree.map(lambda _: True, out)

    # Reverse mode does not pass through a rule for vmap; this one gives it a way round.
    @jax.custom_jvp
    def differentiable(*arrays: Array) -> Any:
        return single(*arrays)

    @differentiable.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(function, primals, tangents)

    return differentiable


_eigh = _one_at_a_time(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
_qr = _one_at_a_time(lambda matrix: tuple(jnp.linalg.qr(matrix)))
_svd = _one_at_a_time(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)))
_values = _one_at_a_time(partial(jnp.linalg.svd, compute_uv=False))
_cholesky = _one_at_a_time(jnp.linalg.cholesky)
_lower = _one_at_a_time(partial(jax.scipy.linalg.solve_triangular, lower=True))


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, smallest first, and eigenvectors as columns.

    Args:
      matrix: symmetric, ``[D, D]``.

    Returns:
      The values, ``[D]``, and the vectors, ``[D, D]``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat.linalg.dense import eigh
      >>> both = jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])
      >>> jax.vmap(eigh)(both)[0].tolist()
      [[1.0, 1.0], [3.0, 3.0]]
    """
    return _eigh(matrix)


def qr(matrix: Array) -> tuple[Array, Array]:
    """Orthonormal columns and a triangular matrix whose product is ``matrix``.

    Args:
      matrix: ``[N, D]``.

    Returns:
      The columns, ``[N, min(N, D)]``, and the triangle, ``[min(N, D), D]``.
    """
    return _qr(matrix)


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition.

    Args:
      matrix: ``[N, D]``; ``K = min(N, D)``.

    Returns:
      Left vectors as columns, ``[N, K]``, values, ``[K]``, largest first, and right
      vectors as rows, ``[K, D]``.
    """
    return _svd(matrix)


def singular_values(matrix: Array) -> Array:
    """Singular values of a matrix ``[N, D]``, largest first: ``[min(N, D)]``."""
    return _values(matrix)


def cholesky(matrix: Array) -> Array:
    """Lower triangular ``L`` with ``L @ L.T = matrix``; NaN where there is none.

    Args:
      matrix: symmetric, positive definite, ``[D, D]``.
    """
    return _cholesky(matrix)


def solve_lower(lower: Array, right: Array) -> Array:
    """Solve ``lower @ x = right``.

    Args:
      lower: lower triangular, ``[D, D]``.
      right: ``[D, K]``.
    """
    return _lower(lower, right)
