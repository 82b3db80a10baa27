"""Subspaces that hold the leading right singular vectors of a matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg.operators import Operator
from toyfeat.linalg.orthonormal import orthonormal_rows
from toyfeat.linalg.precise import dot, nonzero
from toyfeat.linalg.tall import Tall, inner
from toyfeat.types import Array


class Subspace(NamedTuple):
    """Orthonormal rows, and what the (scaled) matrix does to them.

    Attributes:
      z: ``[L, dim]`` orthonormal rows.
      images: tall ``A z^T / scale``, in groups of columns.
      gram: ``[L, L]``, the inner products of the images.
      probes: ``[m, dim]`` random rows that were left out of the subspace.
      seen: tall ``A probes^T / scale``, ``[n, m]``.
      scale: ``[]``, the size of the entries of a product.
      fallback: ``[]`` bool, whether Householder's QR was used.
    """

    z: Array
    images: list[Tall]
    gram: Array
    probes: Array
    seen: Tall
    scale: Array
    fallback: Array


def start(op: Operator, z: Array, probes: Array) -> tuple[Tall, Tall, Array]:
    """First products ``A z^T``, ``A probes^T``, over their common size."""
    both = op.forward(jnp.concatenate([z, probes]))
    size = jnp.stack([jnp.max(jnp.abs(y)) for y in both]).max()
    if op.axis is not None:
        size = jax.lax.pmax(size, op.axis)
    scale = nonzero(size)
    both = [y / scale for y in both]
    return [y[:, : len(z)] for y in both], [y[:, len(z) :] for y in both], scale


def iterated(op: Operator, z: Array, probes: Array, iters: int) -> Subspace:
    r"""Subspace iteration ``z <- orth(z A^T A)``, with the small side held.

    Each step first turns ``z`` by the eigenvectors of
    :math:`z A^\top A z^\top`, so that its rows are graded like the singular
    values and no large one drowns the small ones.

    References:
      Halko, Martinsson and Tropp (2011), algorithm 4.4; nothing of length ``n``
      is made orthonormal here.
    """
    y, seen, scale = start(op, z, probes)
    fallback = jnp.zeros((), bool)
    for _ in range(iters):
        w = op.backward(y) / scale
        turn = _eigenvectors(dot(w, z.T))
        z, bad = orthonormal_rows(dot(turn.T, w))
        y = op.forward(z / scale)
        fallback = fallback | bad
    return Subspace(z, [y], inner(y, y, op.axis), probes, seen, scale, fallback)


def krylov(op: Operator, z: Array, probes: Array, iters: int) -> Subspace:
    r"""Block Krylov space of ``z, z A^T A, ..., z (A^T A)^iters``.

    Every product is kept: the space holds all blocks, not only the last, and its
    images come without another pass.  The inner products of the images are
    :math:`(y_i^\top A) z_j^\top`, of the small side only, but for the last block.

    References:
      Musco and Musco (2015), "Randomized block Krylov methods for stronger and
      faster approximate singular value decomposition"; Tropp and Webber (2023).
    """
    y, seen, scale = start(op, z, probes)
    basis, images, rows = z, [y], []
    fallback = jnp.zeros((), bool)
    for _ in range(iters):
        w = op.backward(y) / scale
        rows.append(w)
        z, bad = orthonormal_rows(w, basis)
        basis = jnp.concatenate([basis, z])
        y = op.forward(z / scale)
        images.append(y)
        fallback = fallback | bad
    gram = _krylov_gram(basis, rows, inner(y, y, op.axis))
    return Subspace(basis, images, gram, probes, seen, scale, fallback)


def _krylov_gram(basis: Array, rows: list[Array], last: Array) -> Array:
    """Inner products of all images from ``y_i^T A`` and the last block's own."""
    if not rows:
        return last
    top = dot(jnp.concatenate(rows), basis.T)
    done = len(top)
    bottom = jnp.concatenate([top[:, done:].T, last], axis=1)
    square = (top[:, :done] + top[:, :done].T) / 2
    top = jnp.concatenate([square, top[:, done:]], axis=1)
    return jnp.concatenate([top, bottom])


def _eigenvectors(gram: Array) -> Array:
    """Eigenvectors as columns, largest eigenvalue first."""
    return jnp.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1]
