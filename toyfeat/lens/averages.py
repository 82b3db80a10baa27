"""Means of matrices over prompts, with the error that is left in them.

A prompt gives some rows of a matrix: all of them, or those along a few directions of an
orthonormal basis, in turn.  Every row has a mean of its own, so that prompts that give
different rows can be averaged, and a scatter, which says how far the mean may be off.
Prompts are dealt out to two halves on the way: how much their means differ is how much
a second fit would differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.meshes import cut_rows, row_parts
from toyfeat.types import Array

HALVES = 2

CENTRE = 1.0
"""Jacobian, as a multiple of the identity, of directions that were not seen.

A residual stream passes on what was written to it, so that Jacobians lie around it.
"""


class RowMeans(NamedTuple):
    """Running means of the rows of ``E`` matrices ``[D, D]``, in two halves.

    Rows come in ``G`` groups of ``M``, ``G M = D``; a prompt gives one group.

    Attributes:
      weight: ``[2, E, G]``, sum of the weights of a group's prompts.
      squares: ``[2, E, G]``, sum of the squares of these weights.
      mean: ``[2, E, G, M, D]``.
      scatter: ``[2, E, G]``, ``sum_p w_p |rows_p - mean|^2`` of the group's rows.
    """

    weight: Array
    squares: Array
    mean: Array
    scatter: Array


class Estimate(NamedTuple):
    """Mean matrices by site, and how sure they are.

    Attributes:
      matrices: by site, ``[D, D]``, or ``[E, D, D]`` of clusters; out times in.
      standard_error: by site, ``[]`` or ``[E]``, of the matrix as a whole: the root of
        the expected ``|estimate - truth|_F^2``, by the jackknife over prompts; NaN
        where a row has fewer than two prompts.
      relative_error: by site, ``standard_error`` over the norm of the matrix.
      refit_cosine: by site, cosine of the matrices of two halves of the prompts.  Two
        fits of *all* prompts each agree better, about ``2 c / (1 + c)``.
      prompts: ``[]``, number of prompts.
    """

    matrices: dict[str, Array]
    standard_error: dict[str, Array]
    relative_error: dict[str, Array]
    refit_cosine: dict[str, Array]
    prompts: Array


def empty_means(experts: int, groups: int, dim: int) -> RowMeans:
    """Make the means of no prompt at all."""
    zeros = jnp.zeros((HALVES, experts, groups))
    mean = jnp.zeros((HALVES, experts, groups, dim // groups, dim))
    return RowMeans(weight=zeros, squares=zeros, mean=mean, scatter=zeros)


def add_prompts(
    means: RowMeans, rows: Array, weights: Array, half: Array, group: Array
) -> RowMeans:
    """Add prompts to the means, one after the other on each device.

    Args:
      means: so far.
      rows: ``[B, E, M, D]``.
      weights: ``[B, E]``; 0 leaves a prompt out.
      half: ``[B]`` int, 0 or 1.
      group: ``[B]`` int, the group of rows that a prompt gives.

    Returns:
      The means with them.
    """
    dtype = means.mean.dtype
    prompts = (rows.astype(dtype), weights.astype(dtype), half, group)
    parts = row_parts(len(rows), rows)
    if parts == 1:
        return _add_in_turn(means, prompts)
    # Means of each device from none, which are joined by a few sums over the devices.
    empty = jax.tree.map(jnp.zeros_like, means)
    cut = jax.tree.map(lambda x: cut_rows(x, parts), prompts)
    return merge_means(
        means, _join_parts(jax.vmap(_add_in_turn, (None, 0))(empty, cut))
    )


def _add_in_turn(means: RowMeans, prompts: tuple[Array, ...]) -> RowMeans:
    """Add prompts, one after the other."""

    def add(means: RowMeans, prompt: tuple[Array, ...]) -> tuple[RowMeans, None]:
        row, weight, half, group = prompt
        at = (half, slice(None), group)
        # A prompt that is left out may hold anything, NaN too.
        row = jnp.where(weight[:, None, None] > 0, row, 0)
        # A prompt is a set of one: no scatter of its own, and a weight.
        single = RowMeans(weight, weight**2, row, jnp.zeros_like(weight))
        merged = merge_means(jax.tree.map(lambda x: x[at], means), single)
        return jax.tree.map(lambda x, new: x.at[at].set(new), means, merged), None

    return jax.lax.scan(add, means, prompts)[0]


def _join_parts(parts: RowMeans) -> RowMeans:
    """Join the means of several sets of prompts, along the first axis."""
    weight = jnp.sum(parts.weight, axis=0)
    share = parts.weight / jnp.where(weight > 0, weight, 1)[None]
    mean = jnp.sum(share[..., None, None] * parts.mean, axis=0)
    # The distance of a mean from that of all is scatter too.
    far = jnp.sum((parts.mean - mean[None]) ** 2, axis=(-2, -1))
    return RowMeans(
        weight=weight,
        squares=jnp.sum(parts.squares, axis=0),
        mean=mean,
        scatter=jnp.sum(parts.scatter + parts.weight * far, axis=0),
    )


def merge_means(left: RowMeans, right: RowMeans) -> RowMeans:
    """Merge the means of two sets of prompts (Chan, Golub and LeVeque, 1983)."""
    weight = left.weight + right.weight
    share = right.weight / jnp.where(weight > 0, weight, 1)
    # The distance of the means is scatter too.
    delta = right.mean - left.mean
    between = left.weight * share * jnp.sum(delta**2, axis=(-2, -1))
    return RowMeans(
        weight=weight,
        squares=left.squares + right.squares,
        mean=left.mean + share[..., None, None] * delta,
        scatter=left.scatter + right.scatter + between,
    )


def finish_means(means: RowMeans, basis: Array | None) -> tuple[Array, Array, Array]:
    """Make matrices of the mean rows.

    Args:
      means: of a site.
      basis: ``[D, D]``, orthonormal rows: row ``k`` of a prompt was ``basis[k] @ J``;
        ``None`` for the standard basis.

    Returns:
      ``(matrices [E, D, D], standard error [E], cosine of two halves [E])``.
    """
    halves = [jax.tree.map(lambda x, i=i: x[i], means) for i in range(HALVES)]
    matrices = [matrices_from_means(half, basis) for half in halves]
    # Cosine of the halves as vectors.
    dots = jnp.sum(matrices[0] * matrices[1], axis=(1, 2))
    sizes = [jnp.sqrt(jnp.sum(m**2, axis=(1, 2))) for m in matrices]
    cosine = dots / (sizes[0] * sizes[1])
    # Squared error of the mean of n rows, s^2 / n, which is the jackknife's.  Unequal
    # weights count as (sum w)^2 / sum w^2 rows.
    both = merge_means(*halves)
    effective = both.weight**2 / jnp.where(both.squares > 0, both.squares, 1)
    variance = both.scatter / both.weight / (effective - 1)
    error = jnp.sqrt(jnp.sum(jnp.where(effective > 1, variance, jnp.nan), axis=-1))
    return matrices_from_means(both, basis), error, cosine


def matrices_from_means(means: RowMeans, basis: Array | None) -> Array:
    """Make matrices ``[E, D, D]`` of the mean rows of one half, or of both together.

    Rows along the standard basis are the matrix.  Those along another basis are added
    up; directions that no prompt has given are :data:`CENTRE` times the identity.
    """
    experts, _, num, dim = means.mean.shape
    rows = means.mean.reshape(experts, dim, dim)
    if basis is None:
        return rows
    # J = c I + sum_k q_k (r_k - c q_k)^T over the directions that were seen.  If some
    # were not, those seen stand for all: unbiased over the draw of the basis.
    seen = jnp.repeat(means.weight > 0, num, axis=1).astype(rows.dtype)
    share = jnp.sum(seen, axis=1, keepdims=True) / dim
    scale = seen / jnp.where(share > 0, share, 1)
    change = (rows - CENTRE * basis[None]) * scale[:, :, None]
    eye = CENTRE * jnp.eye(dim, dtype=rows.dtype)
    highest = jax.lax.Precision.HIGHEST
    return eye[None] + jnp.einsum("kd,eki->edi", basis, change, precision=highest)
