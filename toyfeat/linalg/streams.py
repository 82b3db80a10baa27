"""Streaming SVD: singular values and right vectors of rows that are seen once."""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_array, check_choice, check_int, show
from toyfeat.linalg import dense
from toyfeat.linalg.compensated import (
    RowMoments,
    empty_moments,
    merge_moments,
    outer,
    row_moments,
    to_float,
    unweighted_moments,
)
from toyfeat.linalg.orthonormal import choose
from toyfeat.linalg.precision import largest_size, nonzero, norm
from toyfeat.linalg.sketches import (
    RowSketch,
    add_to_sketch,
    descending_eigenpairs,
    empty_sketch,
    make_svd,
    merge_sketches,
    sketch_svd,
)
from toyfeat.linalg.svd import SVD
from toyfeat.types import Accumulator, Array

StreamMethod = Literal["auto", "gram", "incremental", "frequent_directions"]

_MAX_GRAM_DIM = 4096
"""Width up to which ``"auto"`` takes the scatter matrix.

Its pair of floats takes 128 MiB there; the border itself was chosen by trial.
"""

_MIN_OVERSAMPLE = 8
"""Rows of a default sketch beyond the rank, at least; chosen by trial."""

_LARGE_MEAN = 100
"""Size of the mean's square, in entries of the scatter, that would drown them.

Adding costs two digits of the scatter there; chosen by trial.
"""


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
      singular values below about 3e-4 of the first.  ``"auto"`` takes it where
      ``D x D`` fits easily.
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
    return make_stream(
        "stream_svd", dim, rank, center=center, method=method, width=width
    )


def make_stream(
    who: str,
    dim: int,
    rank: int,
    *,
    center: bool,
    method: StreamMethod,
    width: int | None,
) -> Accumulator:
    """Make the accumulator of :func:`stream_svd` for a public function ``who``."""
    dim, rank, kind, width = _check_options(who, dim, rank, method, width)
    # A state is a scatter matrix or a sketch: how each is filled, joined, decomposed.
    shrink = kind == "frequent_directions"
    if kind == "gram":
        state_type, init = RowMoments, partial(empty_moments, dim)
        add, join = _add_to_scatter, merge_moments
        decompose = partial(_scatter_svd, rank=rank, center=center)
    else:
        state_type, init = RowSketch, partial(empty_sketch, dim, width)
        add = partial(add_to_sketch, center=center, shrink=shrink)
        join = partial(merge_sketches, center=center, shrink=shrink)
        decompose = partial(sketch_svd, rank=rank, shrink=shrink)
    check = partial(check_state, who, kind=state_type, width=dim)

    def update(state: Any, rows: Array, weights: Array | None = None) -> Any:
        return add(check(state), *_check_rows(who, dim, rows, weights))

    return Accumulator(
        init=init,
        update=update,
        merge=lambda left, right: join(check(left), check(right)),
        finish=lambda state: _check_finite(who, decompose(check(state))),
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
    # A^T A = scatter + e e^T with e = sqrt(weight) * mean, the mean as one more row.
    scatter, mean = to_float(state.scatter), to_float(state.mean)
    extra = jnp.zeros_like(mean) if center else mean * jnp.sqrt(to_float(state.weight))
    large = largest_size(extra) ** 2 > _LARGE_MEAN * largest_size(scatter)

    def quick(scatter: Array, extra: Array) -> tuple[Array, Array]:
        return _svd_from_gram(scatter + outer(extra))

    def careful(scatter: Array, extra: Array) -> tuple[Array, Array]:
        # In e e^T the scatter would drown, so that the row is appended, not squared.
        s, vt = _svd_from_gram(scatter)
        rows = jnp.concatenate([s[:, None] * vt, extra[None, :]])
        _, s, vt = dense.svd(rows)
        return s, vt

    s, vt = choose(large, careful, quick, scatter, extra)
    return make_svd(
        s=s,
        vt=vt[:rank],
        residual=norm(s[rank:]),
        error=jnp.zeros((), s.dtype),
        method="gram",
        width=scatter.shape[0],
        units=(state.unit, state.mass),
    )


def _svd_from_gram(gram: Array) -> tuple[Array, Array]:
    """Singular values and right vectors of a matrix from its Gram matrix."""
    # In units of the largest entry; rounding makes the smallest values negative.
    size = nonzero(largest_size(gram))
    values, vectors = descending_eigenpairs(gram / size)
    return jnp.sqrt(jnp.maximum(values, 0) * size), vectors.T


def _check_finite(who: str, svd: SVD) -> SVD:
    """Raise outside of a trace if the result is not finite."""
    finite: Any = svd.info.finite
    if not isinstance(finite, Tracer) and not np.all(finite):
        raise ValueError(
            f"{who}: rows must be finite and weights not negative, got NaN, inf, a "
            "negative weight, or rows times roots of weights of a size that "
            f"{svd.s.dtype} does not have (1e-36 to 1e36); what was folded after them "
            "is lost: check batches first (toyfeat.check_taps), or rescale them"
        )
    return svd


def _check_options(
    who: str, dim: int, rank: int, method: StreamMethod, width: int | None
) -> tuple[int, int, str, int]:
    """Check the options, and fill in the method and the width."""
    dim = check_int(who, "dim", dim)
    rank = check_int(who, "rank", rank, most=dim, about=", the width of the rows")
    check_choice(who, "method", method, get_args(StreamMethod))
    if width is not None:
        width = check_int(who, "width", width, least=rank, most=dim)
    # Defaults.
    if method == "auto":
        method = "gram" if dim <= _MAX_GRAM_DIM else "incremental"
    if width is None:
        width = min(dim, max(2 * rank, rank + _MIN_OVERSAMPLE))
    return dim, rank, method, width


def _check_rows(
    who: str, dim: int, rows: Any, weights: Any
) -> tuple[Array, Array | None]:
    """Check the shapes and dtypes of a batch."""
    # Rows.
    hint = "convert them with jnp.asarray"
    check_array(who, "rows", rows, hint=hint, floats=True)
    if jnp.ndim(rows) != 2 or jnp.shape(rows)[1] != dim:
        raise ValueError(f"{who}: wanted rows [n, {dim}], got shape {jnp.shape(rows)}")
    rows = jnp.asarray(rows, jnp.result_type(float))
    # Weights, if there are any.
    if weights is None:
        return rows, None
    if not hasattr(weights, "dtype"):
        raise TypeError(
            f"{who}: weights must be an array, got {type(weights).__name__}; convert "
            "them with jnp.asarray"
        )
    if jnp.shape(weights) != rows.shape[:1]:
        raise ValueError(
            f"{who}: wanted one weight per row {rows.shape[:1]}, got shape "
            f"{jnp.shape(weights)}"
        )
    return rows, jnp.asarray(weights, rows.dtype)


def check_state(who: str, state: Any, kind: type, width: int) -> Any:
    """Check that a state is one of an accumulator of this kind and width.

    Args:
      who: the public function.
      state: what came.
      kind: its type, with a pair ``mean``.
      width: of the rows.

    Returns:
      The state.

    Raises:
      TypeError: if it is of another kind.
      ValueError: if it is of another width.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"{who}: state must be that of init(), update() or merge() of the same "
            f"accumulator, got {show(state)}; start with init()"
        )
    if state.mean.high.shape[-1] != width:
        raise ValueError(
            f"{who}: state must be of width {width}, got that of an accumulator of "
            f"width {state.mean.high.shape[-1]}; keep one accumulator per site"
        )
    return state
