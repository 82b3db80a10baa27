"""Subspaces that hold the leading right singular vectors of a matrix."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.linalg import dense
from toyfeat.linalg.orthonormal import orthonormal_rows
from toyfeat.linalg.precision import dot, nonzero
from toyfeat.linalg.randomized.operators import (
    Operator,
    choose_route,
    largest_entry,
)
from toyfeat.linalg.randomized.tall import Tall, inner
from toyfeat.types import Array

_ORDINARY_LOW, _ORDINARY_HIGH = 2.0**-60, 2.0**100
"""Sizes of a first product whose terms are neither flushed nor overflow.

At the lower one a term that is ``2**-60`` of the sum is still a normal float32; at the
upper one squares are never taken, and sums of ``2**27`` terms are finite.
"""

_SHIFT = 2.0**64
"""Half the exponents of float32: brings what is not ordinary near 1."""


class Subspace(NamedTuple):
    """Orthonormal rows and their images under the (scaled) matrix.

    Attributes:
      z: ``[L, dim]`` orthonormal rows.
      images: tall ``A z^T / scale``, in groups of columns.
      gram: ``[L, L]``, the inner products of the images.
      probes: ``[m, dim]`` random rows that were left out of the subspace.
      probe_images: tall ``A probes^T / scale``, ``[n, m]``.
      scale: ``[]``, the size of the entries of a product.
      fallback: ``[]`` bool, whether Householder QR was used.
      history: squared singular values ``[l]`` on the subspaces of earlier iterations.
    """

    z: Array
    images: list[Tall]
    gram: Array
    probes: Array
    probe_images: Tall
    scale: Array
    fallback: Array
    history: list[Array]


def first_images(op: Operator, z: Array, probes: Array) -> tuple[Tall, Tall, Array]:
    """Compute ``A z^T`` and ``A probes^T`` in units of their largest entry.

    Args:
      op: the matrix.
      z: ``[l, dim]``.
      probes: ``[m, dim]``.

    Returns:
      Both images, tall, and the unit ``[]``.
    """
    rows, one = jnp.concatenate([z, probes]), jnp.ones((), op.dtype)
    both = op.forward(rows, one)
    size = largest_entry(op, both)
    extreme = ~((size > _ORDINARY_LOW) & (size < _ORDINARY_HIGH))

    def careful(op: Operator, rows: Array, *quick: Any) -> tuple[Tall, Array, Array]:
        # Once more, of vectors that bring the product near 1.
        size = quick[1]
        shift = jnp.where(size < 1, 1 / _SHIFT, _SHIFT).astype(rows.dtype)
        both = op.forward(rows, shift)
        return both, largest_entry(op, both), shift

    both, size, shift = choose_route(
        op, extreme, careful, lambda _op, _rows, *quick: quick, rows, both, size, one
    )
    # The size of a product with rows that are not of unit length may be out of range.
    info = jnp.finfo(op.dtype)
    size = jnp.clip(nonzero(size), float(info.tiny) / shift, float(info.max) / shift)
    both = [y / size for y in both]
    return [y[:, : len(z)] for y in both], [y[:, len(z) :] for y in both], size * shift


def subspace_iteration(op: Operator, z: Array, probes: Array, iters: int) -> Subspace:
    r"""Subspace iteration ``z <- orth(z A^T A)`` on the small side.

    Each step first turns ``z`` by the eigenvectors of
    :math:`z A^\top A z^\top`, so that its rows are graded like the singular
    values and large ones do not drown small ones.

    Args:
      op: the matrix.
      z: ``[l, dim]`` orthonormal rows to start from.
      probes: ``[m, dim]`` random rows for the error estimate.
      iters: how often ``A^T A`` is applied.

    Returns:
      A subspace of ``l`` rows.

    References:
      Halko, Martinsson and Tropp (2011), algorithm 4.4; nothing of length ``n``
      is made orthonormal here.
    """
    y, probe_images, scale = first_images(op, z, probes)
    fallback, history = jnp.zeros((), bool), []
    for _ in range(iters):
        # Apply A^T, grade the rows, make them orthonormal, apply A.
        w = op.backward(y, scale)
        values, turn = _eigenpairs(dot(w, z.T))
        z, bad = orthonormal_rows(dot(turn.T, w))
        history.append(values)
        y = op.forward(z, scale)
        fallback = fallback | bad
    return Subspace(
        z=z,
        images=[y],
        gram=inner(y, y, op.axis),
        probes=probes,
        probe_images=probe_images,
        scale=scale,
        fallback=fallback,
        history=history,
    )


def krylov_space(op: Operator, z: Array, probes: Array, iters: int) -> Subspace:
    r"""Block Krylov space of ``z, z A^T A, ..., z (A^T A)^iters``.

    Every product is used: the space holds all blocks, not only the last, and its
    images need no other pass.  The inner products of the images are
    :math:`(y_i^\top A) z_j^\top`, of the small side only, except for the last
    block.

    Args:
      op: the matrix.
      z: ``[l, dim]`` orthonormal rows to start from.
      probes: ``[m, dim]`` random rows for the error estimate.
      iters: how often ``A^T A`` is applied.

    Returns:
      A subspace of ``(iters + 1) * l`` rows.

    References:
      Musco and Musco (2015), "Randomized block Krylov methods for stronger and
      faster approximate singular value decomposition"; Tropp and Webber (2023).
    """
    y, probe_images, scale = first_images(op, z, probes)
    basis, images, rows = z, [y], []
    fallback = jnp.zeros((), bool)
    for _ in range(iters):
        # Apply A^T, make the block orthonormal to all others, apply A.
        w = op.backward(y, scale)
        rows.append(w)
        z, bad = orthonormal_rows(w, basis)
        basis = jnp.concatenate([basis, z])
        y = op.forward(z, scale)
        images.append(y)
        fallback = fallback | bad
    return Subspace(
        z=basis,
        images=images,
        gram=_krylov_gram(basis, rows, inner(y, y, op.axis)),
        probes=probes,
        probe_images=probe_images,
        scale=scale,
        fallback=fallback,
        history=[],
    )


def _krylov_gram(basis: Array, rows: list[Array], last: Array) -> Array:
    """Inner products of all images from ``y_i^T A`` and the last block's own.

    Args:
      basis: ``[L, dim]``, all blocks of rows.
      rows: ``y_i^T A`` of all blocks except the last.
      last: ``[l, l]``, inner products of the last block's images.

    Returns:
      ``[L, L]``, symmetric.
    """
    if not rows:
        return last
    # Rows of all blocks but the last: their square part is symmetric to rounding.
    top = dot(jnp.concatenate(rows), basis.T)
    size = len(top)
    square = (top[:, :size] + top[:, :size].T) / 2
    # The last block's row is the mirror image of its column.
    bottom = jnp.concatenate([top[:, size:].T, last], axis=1)
    top = jnp.concatenate([square, top[:, size:]], axis=1)
    return jnp.concatenate([top, bottom])


def _eigenpairs(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues, and eigenvectors as columns, largest first."""
    values, vectors = dense.eigh((gram + gram.T) / 2)
    return values[::-1], vectors[:, ::-1]
