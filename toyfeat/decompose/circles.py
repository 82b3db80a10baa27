"""Planes in which vectors run along a circle."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.types import Array, ArrayLike

_RANK = 1e-6  # of the largest eigenvalue, below which a direction is not there
_ROWS = 4000  # that planes descend on; a fourth moment needs no more
_FEWEST = 80  # rows, below which nothing can be said of a plane
_BESIDE = 0.5  # cosine of planes, below which neither is the other
_SEARCHES = 3  # at most, where planes are found that do not fill the space


def circular_planes(
    key: Array,
    rows: ArrayLike,
    *,
    starts: int = 256,
    steps: int = 400,
    tolerance: float = 1.1,
) -> Array:
    r"""Planes on which the length of a vector's part is constant.

    In coordinates :math:`z` of unit second moment, a plane :math:`P` is circular if
    :math:`E |P z|^4 / (E |P z|^2)^2 = 1`, the least it can be; it is 2 for normal
    vectors and more for sparse ones.  Many random planes descend, each by its own
    fixed step; beside those that get within ``tolerance`` others are looked for, and
    of all of them those that lie beside each other and are the roundest in sum are
    returned if they are within it on rows that they did not descend on, too: few rows
    in many dimensions lie on circles whatever they are.  Inside a plane no direction is
    preferred.  Circles can be missed beside several very sparse directions, at
    frequencies with :math:`a + b = 2 c` (where the minimum is flat) and where the
    lengths of what is mixed differ by more than 1000.

    Args:
      key: random key.
      rows: ``[N, D]``, such as gradients; not centred here.  Planes descend on three
        of four, at most 4000, from all over; of fewer than 80 none is returned.
      starts: random planes to begin with, at every search.
      steps: of the fixed point, 0 for none.
      tolerance: largest ratio that counts as circular.

    Returns:
      ``[2 P, D]`` unit rows, two for every plane, the roundest first; the rows that
      the circles are made of, not those that measure them.

    Raises:
      ValueError: if the rows are not a finite matrix, or an option is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> turn = jnp.arange(500.0)
      >>> rows = jnp.stack([jnp.cos(turn), jnp.sin(turn), 0 * turn], axis=1)
      >>> circular_planes(jax.random.key(0), rows, starts=4).shape
      (2, 3)

    References:
      Hyvärinen (1999), "Fast and robust fixed-point algorithms for independent
      component analysis", for the fixed point, here with a step small enough to
      descend; Engels et al. (2024), "Not all language model features are
      linear", arXiv 2405.14860, for circular features.
    """
    table = np.asarray(rows, np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(
            f"circular_planes: wanted finite rows [N, D], got shape {table.shape}"
        )
    if not (starts >= 1 and steps >= 0 and tolerance >= 1):
        raise ValueError(
            "circular_planes: wanted starts >= 1, steps >= 0 and tolerance >= 1, got "
            f"{starts}, {steps} and {tolerance}"
        )
    if len(table) < _FEWEST:
        return jnp.zeros((0, table.shape[1]))
    some = _spread(np.arange(len(table)), min(len(table) * 3 // 4, _ROWS))
    others = _spread(np.delete(np.arange(len(table)), some), _ROWS)
    white, back = _whitened(table[some])
    rank = len(back)
    if rank < 2:
        return jnp.zeros((0, table.shape[1]))
    look = jnp.asarray(table[some] @ white, float)
    kept = _distinct(key, starts, steps, look, tolerance)
    kept = kept[_ratios(kept, table[others] @ white) <= tolerance]
    found = kept.reshape(-1, rank) @ back
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return jnp.asarray(found / np.where(norms > 0, norms, 1), float)


def _spread(index: np.ndarray, most: int) -> np.ndarray:
    """At most so many of an index, from all over it."""
    return index[np.linspace(0, len(index) - 1, min(len(index), most)).astype(int)]


def _distinct(
    key: Array, starts: int, steps: int, rows: Array, tolerance: float
) -> np.ndarray:
    """Circular planes ``[P, 2, R]`` of white rows, beside each other, roundest first.

    Which planes random ones reach is luck, so what is beside the most that are known,
    all but one at most, is searched too; and all of it a few times, until planes that
    are round enough fill the space.
    """
    rank = rows.shape[1]
    reached: list[tuple[Array, Array]] = []
    kept = np.zeros((0, 2, rank))
    for draw in jax.random.split(key, _SEARCHES):
        everywhere, beside = jax.random.split(draw)
        begin = jax.random.normal(everywhere, (starts, 2, rank))
        reached.append(_descended(steps, begin, rows))
        some, _ = _roundest_set(reached, tolerance, rank // 2 - 1)
        if len(some):
            span = some.reshape(-1, rank)
            basis = jnp.asarray(np.linalg.svd(span)[2][len(span) :], rows.dtype)
            num = 1 if len(basis) == 2 else starts  # there is one plane in a plane
            begin = jax.random.normal(beside, (num, 2, len(basis)))
            inside, ratios = _descended(steps, begin, rows @ basis.T)
            reached.append((inside @ basis, ratios))
            reached.append(_descended(steps, inside @ basis, rows))
        kept, ratios = _roundest_set(reached, tolerance, rank // 2)
        full = len(kept) == rank // 2
        if not len(kept) or (full and ratios[-1] <= (1 + tolerance) / 2):
            break
    return kept


def _roundest_set(
    reached: Sequence[tuple[ArrayLike, ArrayLike]], tolerance: float, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Planes beside each other that are roundest in sum, and their ratios, in order.

    Where frequencies make the minimum flat, mixed planes are nearly as round as true
    ones, and two of them can take the place of one: their number alone decides nothing.
    """
    planes, ratios = (
        np.concatenate([np.asarray(part, np.float64) for part in parts])
        for parts in zip(*reached, strict=True)
    )
    order = np.argsort(ratios)[: np.sum(ratios <= tolerance)]
    planes, ratios = planes[order], ratios[order]
    overlaps = np.einsum("apr,bqr->abpq", planes, planes)
    beside = np.linalg.norm(overlaps, 2, axis=(2, 3)) < _BESIDE
    sets = []
    for first in range(len(planes)):
        chosen, left = [first], beside[first].copy()
        while left.any():
            chosen.append(int(left.argmax()))  # the roundest that is left
            left &= beside[chosen[-1]]
        sets.append(sorted(chosen[:most]))
    best = max(
        sets, key=lambda some: (np.sum(tolerance - ratios[some]), len(some)), default=[]
    )
    return planes[best], ratios[best]


def _whitened(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[D, R]`` to coordinates of unit second moment, and ``[R, D]`` back."""
    values, vectors = np.linalg.eigh(rows.T @ rows / max(1, len(rows)))
    there = values > _RANK * values.max(initial=np.finfo(np.float64).tiny)
    size, vectors = np.sqrt(values[there]), vectors[:, there]
    return vectors / size, (vectors * size).T


@partial(jax.jit, static_argnums=0)
def _descended(steps: int, planes: Array, rows: Array) -> tuple[Array, Array]:
    """Planes ``[S, 2, R]`` after the fixed point, and their ratios ``[S]``."""

    def step(planes: Array, _: Any) -> tuple[Array, None]:
        inside = jnp.einsum("spr,nr->snp", planes, rows)
        square = jnp.sum(inside**2, axis=2)
        pull = jnp.einsum("snp,sn,nr->spr", inside, square, rows) / len(rows)
        fourth = jnp.mean(square**2, axis=1)[:, None, None]
        u, _, vt = jnp.linalg.svd(fourth * planes - pull, full_matrices=False)
        return u @ vt, None

    u, _, vt = jnp.linalg.svd(planes, full_matrices=False)
    planes = jax.lax.scan(step, u @ vt, None, length=steps)[0]
    return planes, _ratios(planes, rows)


def _ratios(planes: ArrayLike, rows: ArrayLike) -> Array:
    """Of the moments of rows ``[N, R]`` in planes ``[S, 2, R]``, 1 for circles."""
    square = jnp.sum(jnp.einsum("spr,nr->snp", planes, rows) ** 2, axis=2)
    return jnp.mean(square**2, axis=1) / jnp.mean(square, axis=1) ** 2
