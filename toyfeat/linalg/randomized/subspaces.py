"""Subspaces that hold the leading right singular vectors of a matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import orthonormal_rows
from toyfeat.linalg.precision import dot, nonzero
from toyfeat.linalg.randomized.operators import Operator
from toyfeat.linalg.randomized.tall import Tall, inner
from toyfeat.types import Array


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
    """

    z: Array
    images: list[Tall]
    gram: Array
    probes: Array
    probe_images: Tall
    scale: Array
    fallback: Array


def first_images(op: Operator, z: Array, probes: Array) -> tuple[Tall, Tall, Array]:
    """Compute ``A z^T`` and ``A probes^T`` in units of their largest entry.

    Args:
      op: the matrix.
      z: ``[l, dim]``.
      probes: ``[m, dim]``.

    Returns:
      Both images, tall, and the unit ``[]``.
    """
    both = op.forward(jnp.concatenate([z, probes]))
    size = jnp.stack([jnp.max(jnp.abs(y)) for y in both]).max()
    if op.axis is not None:
        size = jax.lax.pmax(size, op.axis)
    scale = nonzero(size)
    both = [y / scale for y in both]
    return [y[:, : len(z)] for y in both], [y[:, len(z) :] for y in both], scale


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
    fallback = jnp.zeros((), bool)
    for _ in range(iters):
        # Apply A^T, grade the rows, make them orthonormal, apply A.
        w = op.backward(y) / scale
        turn = _eigenvectors(dot(w, z.T))
        z, bad = orthonormal_rows(dot(turn.T, w))
        y = op.forward(z / scale)
        fallback = fallback | bad
    return Subspace(
        z=z,
        images=[y],
        gram=inner(y, y, op.axis),
        probes=probes,
        probe_images=probe_images,
        scale=scale,
        fallback=fallback,
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
        w = op.backward(y) / scale
        rows.append(w)
        z, bad = orthonormal_rows(w, basis)
        basis = jnp.concatenate([basis, z])
        y = op.forward(z / scale)
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


def _eigenvectors(gram: Array) -> Array:
    """Eigenvectors as columns, largest eigenvalue first."""
    return jnp.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1]
