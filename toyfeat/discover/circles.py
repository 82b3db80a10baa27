"""Planes in which vectors run along a circle."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.discover.gradients import white_coordinates
from toyfeat.types import Array, ArrayLike

# Smallest eigenvalue of the second moment that counts, as a share of the largest.
# Circles whose lengths differ by more than a thousand are lost with it.
_MIN_EIGENVALUE = 1e-6

# Rows that planes descend on, and as many to test them on; a fourth moment needs no
# more.  docs/research.md, section 4.
_MAX_ROWS = 4000

# Share of the rows that planes descend on, as numerator and denominator; the others
# test them.  Not tuned.
_DESCENT_SHARE = 3, 4

# Fewest rows in which a circle can be told from chance: the circle in 80 rows of 8
# dimensions of docs/research.md, section 4.
_MIN_ROWS = 80

# Largest principal cosine of two planes that count as different.  Mixed planes of
# resonant frequencies lie between true ones (docs/research.md, section 4).
_MAX_OVERLAP = 0.5

# The search ends if no plane is below this ratio on held-out rows after an eighth of
# the steps.  Where there were circles the roundest had 1.000 by then, and elsewhere
# none got below 1.50 later on (docs/research.md, section 14).  On the rows of the
# descent itself planes of hundreds of dimensions get there whatever the rows are.
_HOPELESS_RATIO = 1.5
_EARLY_DIVISOR = 8

# Most searches.  Each one starts from new random planes, since which circles random
# planes reach is luck (docs/research.md, section 4).
_MAX_SEARCHES = 3


def circular_planes(
    key: Array,
    rows: ArrayLike,
    *,
    starts: int = 256,
    steps: int = 400,
    tolerance: float = 1.1,
) -> Array:
    r"""Find planes on which the length of a vector's part is constant.

    In coordinates :math:`z` of unit second moment, a plane :math:`P` is circular if
    :math:`E |P z|^4 / (E |P z|^2)^2 = 1`, the least it can be; it is 2 for normal
    vectors and more for sparse ones.  Many random planes descend, each by its own
    fixed step.  Then planes beside the circular ones are searched, too.  Of all planes
    with a ratio of at most ``tolerance``, the set of different planes that is roundest
    in sum is kept, and of these the planes that are round on held-out rows as well: few
    rows in many dimensions lie on circles whatever they are.

    Inside a plane no direction is preferred.  Circles can be missed beside several very
    sparse directions, at frequencies with :math:`a + b = 2 c` (where the minimum is
    flat) and where the lengths of what is mixed differ by orders of magnitude.

    Args:
      key: random key.
      rows: ``[N, D]``, such as gradients; not centred.  If there are too few to tell a
        circle from chance, no plane is returned.
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
      linear", arXiv 2405.14860, for circular features; ``docs/research.md``, section 4.
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
    no_planes = jnp.zeros((0, table.shape[1]))
    if len(table) < _MIN_ROWS:
        return no_planes

    # Rows to descend on, and others to test on.
    numerator, denominator = _DESCENT_SHARE
    index = np.arange(len(table))
    num_descent = min(len(table) * numerator // denominator, _MAX_ROWS)
    descent = _spread(index, num_descent)
    held_out = _spread(np.delete(index, descent), _MAX_ROWS)

    # Coordinates of unit second moment, in the span of the rows.
    coordinates = white_coordinates(table[descent], min_eigenvalue=_MIN_EIGENVALUE)
    rank = len(coordinates.unwhiten)
    if rank < 2:
        return no_planes

    # Search, then keep what is round on the other rows, too.
    white, others = (
        jnp.asarray(table[part] @ coordinates.whiten, float)
        for part in (descent, held_out)
    )
    planes = _search(key, starts, steps, white, others, tolerance)
    planes = planes[_ratios(planes, others) <= tolerance]

    # Back to the rows that circles are made of, at unit length.
    return jnp.asarray(coordinates.directions(planes.reshape(-1, rank)), float)


def _spread(index: np.ndarray, num: int) -> np.ndarray:
    """Take at most ``num`` evenly spaced entries of an index."""
    return index[np.linspace(0, len(index) - 1, min(len(index), num)).astype(int)]


def _search(
    key: Array,
    starts: int,
    steps: int,
    rows: Array,
    held_out: Array,
    tolerance: float,
) -> np.ndarray:
    """Find circular planes ``[P, 2, R]`` of white rows, different ones, roundest first.

    Which planes random ones reach is luck, so the complement of the planes that are
    known, of all but one at most, is searched as well; and everything several times,
    until planes that are round enough fill the space.
    """
    rank = rows.shape[1]
    reached: list[tuple[Array, Array]] = []
    planes = np.zeros((0, 2, rank))
    for search_key in jax.random.split(key, _MAX_SEARCHES):
        # Random planes of the whole space.
        space_key, complement_key = jax.random.split(search_key)
        initial = jax.random.normal(space_key, (starts, 2, rank))
        early, _ = _descend(steps // _EARLY_DIVISOR, initial, rows)
        can_tell = not reached and steps >= _EARLY_DIVISOR
        if can_tell and _ratios(early, held_out).min() > _HOPELESS_RATIO:
            return planes
        reached.append(_descend(steps, early, rows))

        # Random planes beside the known ones, in coordinates of that complement: beside
        # it, rounding errors double at every step.
        known, _ = _roundest_set(reached, tolerance, rank // 2 - 1)
        if len(known):
            span = known.reshape(-1, rank)
            basis = jnp.asarray(np.linalg.svd(span)[2][len(span) :], rows.dtype)
            num = 1 if len(basis) == 2 else starts  # there is one plane in a plane
            initial = jax.random.normal(complement_key, (num, 2, len(basis)))
            inside, ratios = _descend(steps, initial, rows @ basis.T)
            reached.append((inside @ basis, ratios))
            reached.append(_descend(steps, inside @ basis, rows))

        # Stop where there are no circles, or where round ones fill the space.
        planes, ratios = _roundest_set(reached, tolerance, rank // 2)
        full = len(planes) == rank // 2
        if not len(planes) or (full and ratios[-1] <= (1 + tolerance) / 2):
            break
    return planes


def _roundest_set(
    reached: Sequence[tuple[ArrayLike, ArrayLike]], tolerance: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose at most ``size`` different planes, roundest in sum, and their ratios.

    Where frequencies make the minimum flat, mixed planes are nearly as round as true
    ones, and two of them can take the place of one: their number alone decides nothing.
    """
    # All planes that are round enough, roundest first.
    planes, ratios = (
        np.concatenate([np.asarray(part, np.float64) for part in parts])
        for parts in zip(*reached, strict=True)
    )
    order = np.argsort(ratios)[: np.sum(ratios <= tolerance)]
    planes, ratios = planes[order], ratios[order]

    # From each of them, a greedy set of planes that differ from one another.
    overlaps = np.einsum("apr,bqr->abpq", planes, planes)
    different = np.linalg.norm(overlaps, 2, axis=(2, 3)) < _MAX_OVERLAP
    sets = []
    for first in range(len(planes)):
        chosen, free = [first], different[first].copy()
        while free.any():
            chosen.append(int(free.argmax()))  # the roundest that is free
            free &= different[chosen[-1]]
        sets.append(sorted(chosen[:size]))

    # The roundest set in sum, the larger one of equals.
    best = max(
        sets,
        key=lambda chosen: (np.sum(tolerance - ratios[chosen]), len(chosen)),
        default=[],
    )
    return planes[best], ratios[best]


@partial(jax.jit, static_argnums=0)
def _descend(steps: int, planes: Array, rows: Array) -> tuple[Array, Array]:
    """Run the fixed point; return planes ``[S, 2, R]`` and their ratios ``[S]``."""

    def step(planes: Array, _: Any) -> tuple[Array, None]:
        # Parts of the rows along both rows of each plane, [S, N].
        x, y = planes[:, 0] @ rows.T, planes[:, 1] @ rows.T
        square = x**2 + y**2
        pull = jnp.stack([(x * square) @ rows, (y * square) @ rows], axis=1)
        fourth = jnp.mean(square**2, axis=1)[:, None, None]
        return _orthonormal_pairs(fourth * planes - pull / len(rows)), None

    planes = _orthonormal_pairs(planes)
    planes = jax.lax.scan(step, planes, None, length=steps)[0]
    return planes, _ratios(planes, rows)


def _orthonormal_pairs(pairs: Array) -> Array:
    r"""Return the nearest orthonormal rows of pairs ``[S, 2, R]``.

    They are :math:`(A A^\top)^{-1/2} A`, with the square root of the two by two matrix
    in closed form, :math:`\sqrt G = (G + s I) / t` where :math:`s^2 = \det G` and
    :math:`t^2 = \operatorname{tr} G + 2 s`; a decomposition of each pair takes longer
    than the rest of a step.
    """
    largest = jnp.max(jnp.abs(pairs), axis=(1, 2), keepdims=True)
    pairs = pairs / jnp.where(largest > 0, largest, 1)
    first, second = pairs[:, 0], pairs[:, 1]
    a, b, c = (
        jnp.sum(x * y, axis=1, keepdims=True)
        for x, y in ((first, first), (first, second), (second, second))
    )
    s = jnp.sqrt(jnp.maximum(a * c - b * b, 0.0))
    t = jnp.sqrt(a + c + 2 * s)
    # The inverse of G + s I, times t.
    det = (a + s) * (c + s) - b * b
    scale = t / jnp.where(det > 0, det, 1)
    rows = (
        scale * ((c + s) * first - b * second),
        scale * ((a + s) * second - b * first),
    )
    return jnp.stack(rows, axis=1)


def _ratios(planes: ArrayLike, rows: ArrayLike) -> Array:
    """Return the moment ratios of rows ``[N, R]`` in planes ``[S, 2, R]``."""
    square = jnp.sum(jnp.einsum("spr,nr->snp", planes, rows) ** 2, axis=2)
    return jnp.mean(square**2, axis=1) / jnp.mean(square, axis=1) ** 2
