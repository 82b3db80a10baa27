"""Singular values and right vectors of rows that are seen once."""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.linalg.gram import scaled_gram
from toyfeat.linalg.orthonormal import choose, deviation, polished
from toyfeat.linalg.precise import dot, nonzero, norm
from toyfeat.linalg.running import (
    Pair,
    RowMoments,
    added,
    merged_rows,
    no_rows,
    outer,
    pair_sum,
    plain_moments,
    ratio,
    row_moments,
    single,
    value,
)
from toyfeat.linalg.spectral import with_signs
from toyfeat.types import SVD, Accumulator, Array, SVDInfo

StreamMethod = Literal["auto", "gram", "incremental", "frequent_directions"]

_GRAM = 4096
_ROWS = 512  # that are folded in at a time, at least: more is more accurate


class Sketch(NamedTuple):
    """A few rows that stand for many.

    Attributes:
      rows: ``[l, D]``, orthogonal rows whose Gram matrix stands for all so far.
      buffer: ``[m, D]``, rows that are not yet folded in.
      filled: ``[]`` int32, how many of those there are.
      weight: ``[]``, sum of the weights of the rows seen.
      mean: ``[D]`` of the rows seen.
      lost: ``[]``, sum of the squares that were dropped.
      shrunk: ``[]``, what was taken off every squared singular value.
    """

    rows: Array
    buffer: Array
    filled: Array
    weight: Pair
    mean: Pair
    lost: Pair
    shrunk: Pair


def stream_svd(
    dim: int,
    rank: int,
    *,
    center: bool = False,
    method: StreamMethod = "auto",
    width: int | None = None,
) -> Accumulator:
    r"""Fold rows into their leading singular values and right vectors, in one pass.

    - ``"gram"``: the ``D x D`` scatter matrix, shifted before it is squared and
      summed in pairs of floats.  Exact to rounding whatever the order and size of
      batches; squares lose singular values below about 3e-4 of the first, and
      rows below 1e-17 altogether (rescale them).  The choice of ``"auto"`` up to
      ``D = 4096``.
    - ``"incremental"``: ``width`` rows that are updated block by block.  As good
      as the best within 1e-4 of the residual on rows in random order; a spiteful
      order can defeat it.
    - ``"frequent_directions"``: the same with shrinkage, which holds
      :math:`|A^\top A - V S^2 V^\top|_2 \le |A - A_k|_F^2 / (l - k)` in any order
      (with all ``l`` directions kept), up to rounding of 2e-6 of the first
      squared value.  What was shrunk is added back to ``s``.

    Args:
      dim: the width ``D`` of the rows.
      rank: how many triplets ``R`` come out, ``1 .. D``.
      center: whether the mean of all rows is subtracted (principal components).
      method: ``"auto"``, ``"gram"``, ``"incremental"``,
        ``"frequent_directions"``.
      width: rows ``l`` of the sketch, by default ``2 * rank`` and at least
        ``rank + 8``; more is more accurate.

    Returns:
      ``Accumulator(init, update, merge, finish)``: ``update(state, rows [n, D],
      weights [n] = None)``, each row counting as often as its weight says, and
      ``finish(state) -> SVD`` with ``u=None``.  Pure and jit-able; a state has a
      fixed shape and can be carried through ``lax.scan``.  A sum over rows, not
      a mean: the variances of principal components are ``s**2 / n``.

    Raises:
      ValueError: if ``dim``, ``rank``, ``width`` or ``method`` is out of range;
        from ``update``, if rows are not ``[n, D]``; from ``finish``, outside of a
        trace, if a row held NaN or inf.
      TypeError: if ``dim``, ``rank`` or ``width`` is not an int; from ``update``,
        if rows are not of a real floating dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> acc = stream_svd(3, 2)
      >>> rows = jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
      >>> state = acc.update(acc.init(), rows[:1])
      >>> svd = acc.finish(acc.update(state, rows[1:]))
      >>> svd.s.round(4).tolist(), svd.vt.round(4).tolist()
      ([4.0, 3.0], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])

    References:
      Chan, Golub and LeVeque (1983) for the merging of scatter matrices; Brand
      (2002) and Ross et al. (2008) for incremental decompositions; Ghashami,
      Liberty, Phillips and Woodruff (2016), "Frequent Directions".
    """
    kind, width = _checked(dim, rank, method, width)
    if kind == "gram":
        return Accumulator(
            lambda: no_rows(dim),
            lambda state, rows, weights=None: _scattered(
                state, *_checked_rows(rows, weights, dim)
            ),
            merged_rows,
            lambda state: _raised(_of_scatter(state, rank=rank, center=center)),
        )
    shrink = kind == "frequent_directions"
    return Accumulator(
        lambda: _empty(dim, width),
        lambda state, rows, weights=None: _pushed_batch(
            state, *_checked_rows(rows, weights, dim), center=center, shrink=shrink
        ),
        partial(_merged, center=center, shrink=shrink),
        lambda state: _raised(_of_sketch(state, rank=rank, shrink=shrink)),
    )


def _scattered(state: RowMoments, rows: Array, weights: Array | None) -> RowMoments:
    if not len(rows):
        return state
    if weights is None:
        return merged_rows(state, plain_moments(rows))
    return merged_rows(state, row_moments(rows, weights))


@partial(jax.jit, static_argnames=("rank", "center"))
def _of_scatter(state: RowMoments, *, rank: int, center: bool) -> SVD:
    scatter, mean = value(state.scatter), value(state.mean)
    extra = jnp.zeros_like(mean) if center else mean * jnp.sqrt(value(state.weight))
    large = jnp.max(jnp.abs(extra)) ** 2 > 100 * jnp.max(jnp.abs(scatter))

    def added_up(scatter: Array, extra: Array) -> tuple[Array, Array]:
        return _roots(scatter + outer(extra))

    def stacked(scatter: Array, extra: Array) -> tuple[Array, Array]:
        s, vt = _roots(scatter)  # their squares would drown in that of the mean
        rows = jnp.concatenate([s[:, None] * vt, extra[None, :]])
        _, s, vt = jnp.linalg.svd(rows, full_matrices=False)
        return s, vt

    s, vt = choose(large, stacked, added_up, scatter, extra)
    return _found(s, vt, rank, norm(s[rank:]), "gram", scatter.shape[0])


def _roots(gram: Array) -> tuple[Array, Array]:
    """Singular values and right vectors of what a Gram matrix is made of."""
    size = nonzero(jnp.max(jnp.abs(gram)))
    values, vectors = _descending(gram / size)
    return jnp.sqrt(jnp.maximum(values, 0) * size), vectors.T


def _descending(gram: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh((gram + gram.T) / 2)
    return values[::-1], vectors[:, ::-1]


def _empty(dim: int, width: int) -> Sketch:
    zero = single(jnp.zeros((), jnp.result_type(float)))
    none = jnp.zeros((width, dim), jnp.result_type(float))
    buffer = jnp.zeros((max(4 * width, _ROWS), dim), none.dtype)
    mean = single(jnp.zeros((dim,), none.dtype))
    return Sketch(none, buffer, jnp.zeros((), jnp.int32), zero, mean, zero, zero)


def _pushed_batch(
    state: Sketch,
    rows: Array,
    weights: Array | None,
    *,
    center: bool,
    shrink: bool,
) -> Sketch:
    if not len(rows):
        return state
    weights = jnp.ones_like(rows[:, 0]) if weights is None else weights
    total, roots = jnp.sum(weights), jnp.sqrt(weights)[:, None]
    if not center:
        state = state._replace(weight=added(state.weight, total))
        return _pushed(state, rows * roots, shrink)
    mean = ratio(dot(weights, rows), total)
    centred = rows - mean[None, :]
    rest = ratio(dot(weights, centred), total)
    centred = (centred - rest[None, :]) * roots
    state, step = _moved(state, single(total), added(single(mean), rest))
    return _pushed(state, jnp.concatenate([step[None, :], centred]), shrink)


def _moved(state: Sketch, count: Pair, mean: Pair) -> tuple[Sketch, Array]:
    """Join another mean; the row that makes up for the distance of the two."""
    total = pair_sum(state.weight, count)
    step = pair_sum(mean, Pair(-state.mean.high, -state.mean.low))
    share = ratio(value(count), value(total))
    joined = added(added(state.mean, share * step.high), share * step.low)
    row = jnp.sqrt(value(state.weight) * share) * value(step)
    return state._replace(weight=total, mean=joined), row


def _pushed(state: Sketch, rows: Array, shrink: bool) -> Sketch:
    """Put rows into the buffer, folding it in whenever it is full."""
    room, dim = state.buffer.shape
    size = min(len(rows), room)
    chunks = -(-len(rows) // size)
    rows = jnp.pad(rows, ((0, chunks * size - len(rows)), (0, 0)))

    def step(state: Sketch, chunk: Array) -> tuple[Sketch, None]:
        full = state.filled + size > room
        state = choose(full, partial(_folded, shrink=shrink), lambda x: x, state)
        start = (state.filled, jnp.zeros_like(state.filled))
        buffer = jax.lax.dynamic_update_slice(state.buffer, chunk, start)
        return state._replace(buffer=buffer, filled=state.filled + size), None

    return jax.lax.scan(step, state, rows.reshape(chunks, size, dim))[0]


def _folded(state: Sketch, shrink: bool) -> Sketch:
    """Fold the buffer into the rows, and keep as many as there were."""
    width = len(state.rows)
    both = jnp.concatenate([state.rows, state.buffer])
    size = nonzero(jnp.max(jnp.abs(both)))
    both = both / size
    values, left = _descending(scaled_gram(both.T, jnp.ones((), both.dtype)))
    low = ~(values[width - 1] > 4e-5 * values[0])

    def quick(both: Array, values: Array, left: Array) -> tuple[Array, Array]:
        # Eigenvectors a little too short or long would add up over many blocks.
        return jnp.maximum(values, 0), dot(polished(left)[:, :width].T, both)

    def careful(both: Array, values: Array, left: Array) -> tuple[Array, Array]:
        del left  # squares have lost the small ones
        _, s, vt = jnp.linalg.svd(both, full_matrices=False)
        vt = polished(vt.T).T
        s = jnp.pad(s, (0, len(values) - len(s)))
        vt = jnp.pad(vt, ((0, max(0, width - len(vt))), (0, 0)))
        return s**2, s[:width, None] * vt[:width]

    values, rows = choose(low, careful, quick, both, values, left)
    lost, shrunk = jnp.sum(values[width:]), state.shrunk
    if shrink:
        cut = values[width]
        kept = jnp.maximum(values[:width] - cut, 0) / nonzero(values[:width])
        rows = jnp.sqrt(kept)[:, None] * rows
        shrunk = added(shrunk, cut * size**2)
    return state._replace(
        rows=rows * size,
        buffer=jnp.zeros_like(state.buffer),
        filled=jnp.zeros_like(state.filled),
        lost=added(state.lost, lost * size**2),
        shrunk=shrunk,
    )


def _merged(left: Sketch, right: Sketch, *, center: bool, shrink: bool) -> Sketch:
    rows = jnp.concatenate([right.rows, right.buffer])
    if center:
        left, step = _moved(left, right.weight, right.mean)
        rows = jnp.concatenate([step[None, :], rows])
    else:
        left = left._replace(weight=pair_sum(left.weight, right.weight))
    left = left._replace(
        lost=pair_sum(left.lost, right.lost),
        shrunk=pair_sum(left.shrunk, right.shrunk),
    )
    return _pushed(left, rows, shrink)


@partial(jax.jit, static_argnames=("rank", "shrink"))
def _of_sketch(state: Sketch, *, rank: int, shrink: bool) -> SVD:
    state = _folded(state, shrink=False)
    _, s, vt = jnp.linalg.svd(state.rows, full_matrices=False)
    name = "incremental"
    if shrink:
        name = "frequent_directions"
        root = jnp.sqrt(value(state.shrunk))
        s = jnp.where(s > 0, jnp.hypot(s, root), s)
    residual = jnp.hypot(norm(s[rank:]), jnp.sqrt(value(state.lost)))
    return _found(s, vt, rank, residual, name, len(state.rows))


def _found(
    s: Array, vt: Array, rank: int, residual: Array, method: str, width: int
) -> SVD:
    s, vt = s[:rank], with_signs(vt[:rank].T).T
    finite = jnp.isfinite(jnp.sum(s)) & jnp.isfinite(jnp.sum(vt))
    info = SVDInfo(
        method=method,
        passes=1,
        width=width,
        residual=residual,
        orthogonality=deviation(dot(vt, vt.T)),
        fallback=jnp.zeros((), bool),
        finite=finite,
    )
    bad = jnp.full((), jnp.nan, s.dtype)
    return SVD(None, jnp.where(finite, s, bad), jnp.where(finite, vt, bad), info)


def _raised(svd: SVD) -> SVD:
    finite: Any = svd.info.finite
    if not isinstance(finite, Tracer) and not np.all(finite):
        raise ValueError(
            "stream_svd: a row held NaN or inf, or squares overflow, and what was "
            "folded after it is lost; check batches before they are folded "
            "(toyfeat.check_taps), and rescale values beyond 1e16"
        )
    return svd


def _checked(
    dim: int, rank: int, method: StreamMethod, width: int | None
) -> tuple[str, int]:
    for name, number in (("dim", dim), ("rank", rank), ("width", width or 1)):
        if not isinstance(number, int | np.integer):
            raise TypeError(f"stream_svd: {name} must be an int, got {number!r}")
    if not 1 <= rank <= dim:
        raise ValueError(
            f"stream_svd: rank must be in 1 .. {dim}, the width of the rows, got {rank}"
        )
    if method not in get_args(StreamMethod):
        raise ValueError(
            f"stream_svd: method must be one of {', '.join(get_args(StreamMethod))}, "
            f"got {method!r}"
        )
    if width is not None and not rank <= width <= dim:
        raise ValueError(
            f"stream_svd: width must be in rank .. dim = {rank} .. {dim}, got {width}"
        )
    if method == "auto":
        method = "gram" if dim <= _GRAM else "incremental"
    return method, min(dim, max(2 * rank, rank + 8)) if width is None else width


def _checked_rows(rows: Any, weights: Any, dim: int) -> tuple[Array, Array | None]:
    if jnp.ndim(rows) != 2 or jnp.shape(rows)[1] != dim:
        raise ValueError(
            f"stream_svd: wanted rows [n, {dim}], got shape {jnp.shape(rows)}"
        )
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise TypeError(
            f"stream_svd: wanted rows of a real floating dtype, got {rows.dtype}"
        )
    rows = jnp.asarray(rows, jnp.result_type(float))
    if weights is None:
        return rows, None
    if jnp.shape(weights) != rows.shape[:1]:
        raise ValueError(
            f"stream_svd: wanted one weight per row {rows.shape[:1]}, got shape "
            f"{jnp.shape(weights)}"
        )
    weights = jnp.asarray(weights, rows.dtype)
    # What a row of weight 0 holds must not matter, not even NaN.
    return jnp.where(weights[:, None] != 0, rows, jnp.zeros_like(rows)), weights
