"""Streaming SVD: singular values and right vectors of rows that are seen once."""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.linalg.compensated import (
    Pair,
    RowMoments,
    add_float,
    add_pairs,
    empty_moments,
    from_float,
    merge_moments,
    outer,
    ratio,
    row_moments,
    to_float,
    unweighted_moments,
)
from toyfeat.linalg.gram import scaled_gram
from toyfeat.linalg.orthonormal import choose, deviation, polish_columns
from toyfeat.linalg.precision import GRAM_CUTOFF, dot, nonzero, norm
from toyfeat.linalg.psd import fix_signs
from toyfeat.linalg.svd import SVD, SVDInfo
from toyfeat.types import Accumulator, Array

StreamMethod = Literal["auto", "gram", "incremental", "frequent_directions"]

_MAX_GRAM_DIM = 4096
"""Width up to which ``"auto"`` takes the scatter matrix.

Its pair of floats takes 128 MiB there; the border itself was chosen by trial.
"""

_MIN_FOLD_ROWS, _FOLD_WIDTHS = 512, 4
"""Rows that are folded in at a time: at least, and in widths of the sketch.

See "Incremental streams fold at least 512 rows at a time" in docs/decisions/linalg.md;
the number of widths was chosen by trial.
"""

_MIN_OVERSAMPLE = 8
"""Rows of a default sketch beyond the rank, at least; chosen by trial."""

_LARGE_MEAN = 100
"""Size of the mean's square, in entries of the scatter, that would drown them.

Adding costs two digits of the scatter there; chosen by trial.
"""


class RowSketch(NamedTuple):
    """Running sketch: a few rows whose Gram matrix stands for that of all rows.

    Attributes:
      rows: ``[l, D]``, orthogonal rows whose Gram matrix stands for all so far.
      buffer: ``[m, D]``, rows that are not yet folded in.
      filled: ``[]`` int32, how many rows the buffer holds.
      weight: ``[]``, sum of the weights of the rows seen.
      mean: ``[D]`` of the rows seen.
      lost: ``[]``, sum of the squares that were dropped.
      shrunk: ``[]``, total that was subtracted from every squared singular value.
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

    - ``"gram"``: the ``D x D`` scatter matrix, of shifted rows, summed in pairs of
      floats.  Exact to rounding for any order and size of batches.  Squares lose
      singular values below about 3e-4 of the first, and all rows below 1e-17
      (rescale them).  ``"auto"`` takes it where ``D x D`` fits easily.
    - ``"incremental"``: ``width`` rows that are updated block by block.  Within
      1e-4 of the best residual on rows in random order; an adversarial order can
      defeat it.
    - ``"frequent_directions"``: the same with shrinkage, which guarantees
      :math:`|A^\top A - V S^2 V^\top|_2 \le |A - A_k|_F^2 / (l - k)` in any order
      (with all ``l`` directions), up to rounding of 2e-6 of the first squared
      value.  The shrinkage is added back to ``s``.

    Args:
      dim: the width ``D`` of the rows.
      rank: how many triplets ``R`` to return, ``1 .. D``.
      center: whether the mean of all rows is subtracted (principal components).
      method: ``"auto"``, ``"gram"``, ``"incremental"``,
        ``"frequent_directions"``.
      width: rows ``l`` of the sketch, by default about ``2 * rank``; more is more
        accurate.

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
    kind, width = _check_options(dim, rank, method, width)
    if kind == "gram":
        return Accumulator(
            init=lambda: empty_moments(dim),
            update=lambda state, rows, weights=None: _add_to_scatter(
                state, *_check_rows(rows, weights, dim)
            ),
            merge=merge_moments,
            finish=lambda state: _check_finite(
                _scatter_svd(state, rank=rank, center=center)
            ),
        )
    shrink = kind == "frequent_directions"
    return Accumulator(
        init=lambda: _empty_sketch(dim, width),
        update=lambda state, rows, weights=None: _add_to_sketch(
            state, *_check_rows(rows, weights, dim), center=center, shrink=shrink
        ),
        merge=partial(_merge_sketches, center=center, shrink=shrink),
        finish=lambda state: _check_finite(
            _sketch_svd(state, rank=rank, shrink=shrink)
        ),
    )


def _add_to_scatter(
    state: RowMoments, rows: Array, weights: Array | None
) -> RowMoments:
    """Fold a batch into running moments."""
    if not len(rows):
        return state
    if weights is None:
        return merge_moments(state, unweighted_moments(rows))
    return merge_moments(state, row_moments(rows, weights))


@partial(jax.jit, static_argnames=("rank", "center"))
def _scatter_svd(state: RowMoments, *, rank: int, center: bool) -> SVD:
    """Leading triplets from the scatter matrix, with the mean put back if wanted."""
    scatter, mean = to_float(state.scatter), to_float(state.mean)
    extra = jnp.zeros_like(mean) if center else mean * jnp.sqrt(to_float(state.weight))
    large = jnp.max(jnp.abs(extra)) ** 2 > _LARGE_MEAN * jnp.max(jnp.abs(scatter))

    def quick(scatter: Array, extra: Array) -> tuple[Array, Array]:
        return _svd_from_gram(scatter + outer(extra))

    def careful(scatter: Array, extra: Array) -> tuple[Array, Array]:
        # The mean is one more row: squares of the others would drown in its own.
        s, vt = _svd_from_gram(scatter)
        rows = jnp.concatenate([s[:, None] * vt, extra[None, :]])
        _, s, vt = jnp.linalg.svd(rows, full_matrices=False)
        return s, vt

    s, vt = choose(large, careful, quick, scatter, extra)
    return _make_svd(s, vt, rank, norm(s[rank:]), "gram", scatter.shape[0])


def _svd_from_gram(gram: Array) -> tuple[Array, Array]:
    """Singular values and right vectors of a matrix from its Gram matrix."""
    size = nonzero(jnp.max(jnp.abs(gram)))
    values, vectors = _descending_eigenpairs(gram / size)
    return jnp.sqrt(jnp.maximum(values, 0) * size), vectors.T


def _descending_eigenpairs(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors as columns, largest first."""
    values, vectors = jnp.linalg.eigh((gram + gram.T) / 2)
    return values[::-1], vectors[:, ::-1]


def _empty_sketch(dim: int, width: int) -> RowSketch:
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
        shrunk=zero,
    )


def _add_to_sketch(
    state: RowSketch,
    rows: Array,
    weights: Array | None,
    *,
    center: bool,
    shrink: bool,
) -> RowSketch:
    """Fold a batch into a sketch, each row times the root of its weight."""
    if not len(rows):
        return state
    weights = jnp.ones_like(rows[:, 0]) if weights is None else weights
    total, roots = jnp.sum(weights), jnp.sqrt(weights)[:, None]
    if not center:
        state = state._replace(weight=add_float(state.weight, total))
        return _buffer_rows(state, rows * roots, shrink)
    # Centre twice: the mean of what is left is tiny.
    mean = ratio(dot(weights, rows), total)
    centred = rows - mean[None, :]
    drift = ratio(dot(weights, centred), total)
    centred = (centred - drift[None, :]) * roots
    # One more row stands for the distance between the batch's mean and the state's.
    mean = add_float(from_float(mean), drift)
    state, step = _join_mean(state, from_float(total), mean)
    return _buffer_rows(state, jnp.concatenate([step[None, :], centred]), shrink)


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
    size = nonzero(jnp.max(jnp.abs(both)))
    both = both / size
    gram = scaled_gram(both.T, jnp.ones((), both.dtype))
    values, left = _descending_eigenpairs(gram)
    low = ~(values[width - 1] > GRAM_CUTOFF * values[0])

    def quick(both: Array, values: Array, left: Array) -> tuple[Array, Array]:
        # Eigenvectors a little too short or long would add up over many blocks.
        leading = polish_columns(left)[:, :width]
        return jnp.maximum(values, 0), dot(leading.T, both)

    def careful(both: Array, values: Array, left: Array) -> tuple[Array, Array]:
        # Squares have lost the small values: decompose the rows themselves.
        del left
        _, s, vt = jnp.linalg.svd(both, full_matrices=False)
        vt = polish_columns(vt.T).T
        s = jnp.pad(s, (0, len(values) - len(s)))
        vt = jnp.pad(vt, ((0, max(0, width - len(vt))), (0, 0)))
        return s**2, s[:width, None] * vt[:width]

    values, rows = choose(low, careful, quick, both, values, left)

    # Count what is dropped; frequent directions shrink the others by as much.
    lost, shrunk = jnp.sum(values[width:]), state.shrunk
    if shrink:
        cut = values[width]
        share = jnp.maximum(values[:width] - cut, 0) / nonzero(values[:width])
        rows = jnp.sqrt(share)[:, None] * rows
        shrunk = add_float(shrunk, cut * size**2)
    return state._replace(
        rows=rows * size,
        buffer=jnp.zeros_like(state.buffer),
        filled=jnp.zeros_like(state.filled),
        lost=add_float(state.lost, lost * size**2),
        shrunk=shrunk,
    )


def _merge_sketches(
    left: RowSketch, right: RowSketch, *, center: bool, shrink: bool
) -> RowSketch:
    """Fold the rows and the buffer of one sketch into another."""
    rows = jnp.concatenate([right.rows, right.buffer])
    if center:
        left, step = _join_mean(left, right.weight, right.mean)
        rows = jnp.concatenate([step[None, :], rows])
    else:
        left = left._replace(weight=add_pairs(left.weight, right.weight))
    left = left._replace(
        lost=add_pairs(left.lost, right.lost),
        shrunk=add_pairs(left.shrunk, right.shrunk),
    )
    return _buffer_rows(left, rows, shrink)


@partial(jax.jit, static_argnames=("rank", "shrink"))
def _sketch_svd(state: RowSketch, *, rank: int, shrink: bool) -> SVD:
    """Leading triplets of a sketch, its buffer folded in."""
    state = _fold_buffer(state, shrink=False)
    _, s, vt = jnp.linalg.svd(state.rows, full_matrices=False)
    name = "incremental"
    if shrink:
        name = "frequent_directions"
        root = jnp.sqrt(to_float(state.shrunk))
        s = jnp.where(s > 0, jnp.hypot(s, root), s)
    residual = jnp.hypot(norm(s[rank:]), jnp.sqrt(to_float(state.lost)))
    return _make_svd(s, vt, rank, residual, name, len(state.rows))


def _make_svd(
    s: Array, vt: Array, rank: int, residual: Array, method: str, width: int
) -> SVD:
    """Make the public result: cut, signs, NaN where the input was not finite."""
    s, vt = s[:rank], fix_signs(vt[:rank].T).T
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


def _check_finite(svd: SVD) -> SVD:
    """Raise outside of a trace if the result is not finite."""
    finite: Any = svd.info.finite
    if not isinstance(finite, Tracer) and not np.all(finite):
        raise ValueError(
            "stream_svd: a row held NaN or inf, or squares overflow, and what was "
            "folded after it is lost; check batches before they are folded "
            "(toyfeat.check_taps), and rescale values beyond 1e16"
        )
    return svd


def _check_options(
    dim: int, rank: int, method: StreamMethod, width: int | None
) -> tuple[str, int]:
    """Check the options, and fill in the method and the width."""
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
        method = "gram" if dim <= _MAX_GRAM_DIM else "incremental"
    if width is None:
        width = min(dim, max(2 * rank, rank + _MIN_OVERSAMPLE))
    return method, width


def _check_rows(rows: Any, weights: Any, dim: int) -> tuple[Array, Array | None]:
    """Check a batch, and set rows of weight 0 to zeros."""
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
    # The entries of a row of weight 0 must not matter, not even NaN.
    return jnp.where(weights[:, None] != 0, rows, jnp.zeros_like(rows)), weights
