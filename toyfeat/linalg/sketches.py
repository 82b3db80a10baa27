"""Sketches of a stream: a few rows whose Gram matrix stands for that of all rows."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.linalg import dense
from toyfeat.linalg.compensated import (
    Pair,
    add_float,
    add_pairs,
    drop_last_bits,
    from_float,
    ratio,
    scale_pair,
    smallest_unit,
    to_float,
    units_of_rows,
)
from toyfeat.linalg.gram import unit_gram
from toyfeat.linalg.orthonormal import choose, deviation, polish_columns
from toyfeat.linalg.precision import GRAM_CUTOFF, dot, largest_size, nonzero, norm
from toyfeat.linalg.psd import fix_signs
from toyfeat.linalg.svd import SVD, SVDInfo, is_accurate
from toyfeat.meshes import everywhere, run_automatic
from toyfeat.types import Array

_MIN_FOLD_ROWS, _FOLD_WIDTHS = 512, 4
"""Rows that are folded in at a time: at least, and in widths of the sketch.

See "Incremental streams fold at least 512 rows at a time" in docs/decisions/linalg.md;
the number of widths was chosen by trial.
"""


class RowSketch(NamedTuple):
    """Running sketch: a few rows whose Gram matrix stands for that of all rows.

    Rows are multiplied by the roots of their weights, and everything is held in units
    (see :class:`toyfeat.linalg.compensated.RowMoments`).

    Attributes:
      rows: ``[l, D]``, orthogonal rows whose Gram matrix stands for all so far.
      buffer: ``[m, D]``, rows that are not yet folded in.
      filled: ``[]`` int32, how many rows the buffer holds.
      weight: ``[]``, sum of the weights of the rows seen, over ``mass``.
      mean: ``[D]`` of the rows seen, over ``unit``.
      lost: ``[]``, sum of the squares that were dropped.
      cut: ``[]``, sum over the folds of the largest square that was dropped, which
        frequent directions subtract from every squared singular value.
      unit: ``[]``, a power of two near the largest entry of a row.
      mass: ``[]``, a power of four near the largest weight.
    """

    rows: Array
    buffer: Array
    filled: Array
    weight: Pair
    mean: Pair
    lost: Pair
    cut: Pair
    unit: Array
    mass: Array


def empty_sketch(dim: int, width: int) -> RowSketch:
    """Sketch of no rows."""
    dtype = jnp.result_type(float)
    zero = from_float(jnp.zeros((), dtype))
    fold = max(_FOLD_WIDTHS * width, _MIN_FOLD_ROWS)
    return RowSketch(
        rows=jnp.zeros((width, dim), dtype),
        buffer=jnp.zeros((fold, dim), dtype),
        filled=jnp.zeros((), jnp.int32),
        weight=zero,
        mean=from_float(jnp.zeros((dim,), dtype)),
        lost=zero,
        cut=zero,
        unit=smallest_unit(),
        mass=smallest_unit(four=True),
    )


def add_to_sketch(
    state: RowSketch,
    rows: Array,
    weights: Array | None,
    *,
    center: bool,
    shrink: bool,
) -> RowSketch:
    """Fold a batch into a sketch, each row times the root of its weight.

    Args:
      state: the sketch.
      rows: ``[n, D]``; what a row of weight 0 holds does not matter.
      weights: ``[n]``, or ``None`` for ones.
      center: whether the mean is subtracted.
      shrink: whether folding shrinks what is kept (frequent directions).

    Returns:
      The sketch of all rows, on every device of a mesh.
    """
    if not len(rows):
        return state
    add = partial(_add_to_sketch, center=center, shrink=shrink)
    return run_automatic(add, everywhere, state, rows, weights)


def _add_to_sketch(
    state: RowSketch,
    rows: Array,
    weights: Array | None,
    *,
    center: bool,
    shrink: bool,
) -> RowSketch:
    """Fold a batch into a sketch where products need no sharding of their results."""
    # State and batch in the larger of their units.
    weights = jnp.ones_like(rows[:, 0]) if weights is None else weights
    rows, weights, unit, mass = units_of_rows(rows, weights)
    state = _in_units(
        state, jnp.maximum(state.unit, unit), jnp.maximum(state.mass, mass)
    )
    rows, weights = rows * (unit / state.unit), weights * (mass / state.mass)
    total, roots = jnp.sum(weights), jnp.sqrt(weights)[:, None]
    if not center:
        state = state._replace(weight=add_float(state.weight, total))
        return _buffer_rows(state, rows * roots, shrink)
    # Centre twice: by a rounded mean, and by the tiny mean of what is left.
    mean = drop_last_bits(ratio(dot(weights, rows), total))
    centred = rows - mean[None, :]
    drift = ratio(dot(weights, centred), total)
    centred = (centred - drift[None, :]) * roots
    # One more row stands for the distance between the batch's mean and the state's.
    mean = add_float(from_float(mean), drift)
    state, step = _join_mean(state, from_float(total), mean)
    return _buffer_rows(state, jnp.concatenate([step[None, :], centred]), shrink)


def _in_units(state: RowSketch, unit: Array, mass: Array) -> RowSketch:
    """Change the units of a sketch, exactly."""
    size, share = state.unit / unit, state.mass / mass
    factor = size * jnp.sqrt(share)
    return state._replace(
        rows=state.rows * factor,
        buffer=state.buffer * factor,
        weight=scale_pair(state.weight, share),
        mean=scale_pair(state.mean, size),
        lost=scale_pair(state.lost, factor**2),
        cut=scale_pair(state.cut, factor**2),
        unit=unit,
        mass=mass,
    )


def _join_mean(state: RowSketch, weight: Pair, mean: Pair) -> tuple[RowSketch, Array]:
    """Join the mean of other rows to that of the state.

    Args:
      state: the sketch; its rows stay as they are.
      weight: ``[]`` of the other rows.
      mean: ``[D]`` of the other rows.

    Returns:
      The state with the joint weight and mean, and ``[D]``, the row whose square
      makes up for the distance of the two means.
    """
    total = add_pairs(state.weight, weight)
    step = add_pairs(mean, Pair(-state.mean.high, -state.mean.low))
    share = ratio(to_float(weight), to_float(total))
    joint = add_float(add_float(state.mean, share * step.high), share * step.low)
    row = jnp.sqrt(to_float(state.weight) * share) * to_float(step)
    return state._replace(weight=total, mean=joint), row


def _buffer_rows(state: RowSketch, rows: Array, shrink: bool) -> RowSketch:
    """Put rows into the buffer, and fold it in whenever it is full."""
    room, dim = state.buffer.shape
    # Chunks of one size, the last filled with zeros, which change nothing.
    size = min(len(rows), room)
    chunks = -(-len(rows) // size)
    rows = jnp.pad(rows, ((0, chunks * size - len(rows)), (0, 0)))

    def step(state: RowSketch, chunk: Array) -> tuple[RowSketch, None]:
        full = state.filled + size > room
        state = choose(full, partial(_fold_buffer, shrink=shrink), lambda x: x, state)
        start = (state.filled, jnp.zeros_like(state.filled))
        buffer = jax.lax.dynamic_update_slice(state.buffer, chunk, start)
        return state._replace(buffer=buffer, filled=state.filled + size), None

    return jax.lax.scan(step, state, rows.reshape(chunks, size, dim))[0]


def _fold_buffer(state: RowSketch, shrink: bool) -> RowSketch:
    """Fold the buffer into the rows, and cut back to their number."""
    # Stack rows and buffer in units of the largest entry; decompose the smaller side.
    width = len(state.rows)
    both = jnp.concatenate([state.rows, state.buffer])
    size = nonzero(largest_size(both))
    both = both / size
    gram, unit = unit_gram(both.T)
    values, left = descending_eigenpairs(gram * unit**2)
    low = ~(values[width - 1] > GRAM_CUTOFF * values[0])

    def quick(both: Array, values: Array, left: Array) -> tuple[Array, Array]:
        # Eigenvectors a little too short or long would add up over many blocks.
        leading = polish_columns(left)[:, :width]
        return jnp.maximum(values, 0), dot(leading.T, both)

    def careful(both: Array, values: Array, left: Array) -> tuple[Array, Array]:
        # Squares have lost the small values: decompose the rows themselves.
        del left
        _, s, vt = dense.svd(both)
        vt = polish_columns(vt.T).T
        s = jnp.pad(s, (0, len(values) - len(s)))
        vt = jnp.pad(vt, ((0, max(0, width - len(vt))), (0, 0)))
        return s**2, s[:width, None] * vt[:width]

    values, rows = choose(low, careful, quick, both, values, left)

    # Count what is dropped; frequent directions shrink the others by as much.
    lost, cut = jnp.sum(values[width:]), values[width]
    if shrink:
        share = jnp.maximum(values[:width] - cut, 0) / nonzero(values[:width])
        rows = jnp.sqrt(share)[:, None] * rows
    return state._replace(
        rows=rows * size,
        buffer=jnp.zeros_like(state.buffer),
        filled=jnp.zeros_like(state.filled),
        lost=add_float(state.lost, lost * size**2),
        cut=add_float(state.cut, cut * size**2),
    )


def merge_sketches(
    left: RowSketch, right: RowSketch, *, center: bool, shrink: bool
) -> RowSketch:
    """Fold the rows and the buffer of one sketch into another."""
    # Both in the larger units.
    unit = jnp.maximum(left.unit, right.unit)
    mass = jnp.maximum(left.mass, right.mass)
    left, right = _in_units(left, unit, mass), _in_units(right, unit, mass)
    # Join the means and the counts, then fold the rows.
    rows = jnp.concatenate([right.rows, right.buffer])
    if center:
        left, step = _join_mean(left, right.weight, right.mean)
        rows = jnp.concatenate([step[None, :], rows])
    else:
        left = left._replace(weight=add_pairs(left.weight, right.weight))
    left = left._replace(
        lost=add_pairs(left.lost, right.lost), cut=add_pairs(left.cut, right.cut)
    )
    return _buffer_rows(left, rows, shrink)


@partial(jax.jit, static_argnames=("rank", "shrink"))
def sketch_svd(state: RowSketch, *, rank: int, shrink: bool) -> SVD:
    """Leading triplets of a sketch, its buffer folded in."""
    before, state = state, _fold_buffer(state, shrink=False)
    _, s, vt = dense.svd(state.rows)
    name = "incremental"
    # Frequent directions add back what they subtracted.
    if shrink:
        name = "frequent_directions"
        root = jnp.sqrt(to_float(before.cut))
        s = jnp.where(s > 0, jnp.hypot(s, root), s)
    # A squared value is wrong by at most the sum of the cuts.
    residual = jnp.hypot(norm(s[rank:]), jnp.sqrt(to_float(state.lost)))
    gap = jnp.sqrt(to_float(state.cut))
    last = jnp.hypot(s[rank - 1], gap) + s[rank - 1]
    error = gap * (gap / nonzero(last)) / nonzero(s[0])
    return make_svd(
        s=s,
        vt=vt[:rank],
        residual=residual,
        error=error,
        method=name,
        width=len(state.rows),
        units=(state.unit, state.mass),
    )


def make_svd(
    *,
    s: Array,
    vt: Array,
    residual: Array,
    error: Array,
    method: str,
    width: int,
    units: tuple[Array, Array],
) -> SVD:
    """Make the public result: cut to the rank, out of units, NaN if it is not finite.

    Args:
      s: singular values in units, at least as many as are wanted.
      vt: ``[R, D]``.
      residual: ``[]``, in units.
      error: ``[]``, share of the first value by which the others may be wrong.
      method: name for the diagnostics.
      width: likewise.
      units: unit and mass of the rows.

    Returns:
      The result; not finite as well where a first value that is not zero leaves the
      float's range.
    """
    # Out of units; a first value must not vanish on the way.
    unit, root = units[0], jnp.sqrt(units[1])
    values, vt = s[: len(vt)] * unit * root, fix_signs(vt.T).T
    vanished = (s[0] != 0) & (values[0] < float(jnp.finfo(s.dtype).tiny))
    finite = jnp.isfinite(jnp.sum(values)) & jnp.isfinite(jnp.sum(vt)) & ~vanished
    info = SVDInfo(
        method=method,
        passes=1,
        width=width,
        residual=residual * unit * root,
        orthogonality=deviation(dot(vt, vt.T)),
        fallback=jnp.zeros((), bool),
        finite=finite,
        error=error,
        accurate=is_accurate(error),
    )
    # NaN anywhere makes everything NaN.
    bad = jnp.full((), jnp.nan, s.dtype)
    return SVD(None, jnp.where(finite, values, bad), jnp.where(finite, vt, bad), info)


def descending_eigenpairs(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors as columns, largest first."""
    values, vectors = dense.eigh((gram + gram.T) / 2)
    return values[::-1], vectors[:, ::-1]
