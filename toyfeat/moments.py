r"""Taps folded into exactly weighted moments, in one pass.

Every running sum is kept in two floats (Knuth's two-sum), and activations are
centred before they are squared, so that a stream of 1e9 rows loses no more than
one of 1e3, and a mean of 1e4 standard deviations costs nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.types import Accumulator, Array, Moments, Taps

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 512


class Pair(NamedTuple):
    """An unevaluated sum of two floats, ``high + low``."""

    high: Array
    low: Array


class RowMoments(NamedTuple):
    """Running moments of weighted rows.

    Attributes:
      weight: ``[]``, sum of the weights.
      mean: ``[D]``.
      scatter: ``[D, D]`` about ``mean``.
    """

    weight: Pair
    mean: Pair
    scatter: Pair


class MomentsState(NamedTuple):
    """Running moments; turn them into :class:`Moments` with ``finish``.

    Attributes:
      acts: of the activations, one row per example.
      grads: of the gradients, ``K`` rows per example, or ``None``.
    """

    acts: RowMoments
    grads: RowMoments | None


def moments(dim: int, *, grads: bool = True) -> Accumulator:
    r"""Accumulate first and second moments of activations and gradients.

    A batch of weight :math:`b` with mean :math:`\mu_b` and scatter :math:`S_b`
    joins a state of weight :math:`a` by

    .. math:: \delta = \mu_b - \mu_a, \quad
       \mu = \mu_a + \tfrac{b}{a + b} \delta, \quad
       S = S_a + S_b + \tfrac{a b}{a + b} \delta \delta^\top .

    Gradients are centred on the way in the same manner, and their mean is added
    back at the end: the second moment that comes out is not centred, but a
    constant gradient has exactly rank 1 in it.

    Args:
      dim: the width ``D`` of the site.
      grads: whether gradients are folded too.  If so every batch must have
        them, with one ``K`` throughout.

    Returns:
      ``Accumulator(init, update, merge, finish)``: ``update(state, taps)``,
      ``finish(state) -> Moments``.  Pure and jit-able; a state has a fixed shape
      and can be carried through ``lax.scan``.

    Raises:
      ValueError: from ``update``, if a batch has another width, no gradients
        where they are wanted, or a shape that is not ``[N, D]``, ``[N, K, D]``,
        ``[N]``; from the factory, if ``dim < 1``.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Taps
      >>> acc = moments(2, grads=False)
      >>> acts = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> state = acc.update(acc.init(), Taps(acts, None, jnp.ones(2)))
      >>> stats = acc.finish(state)
      >>> stats.mean.tolist(), stats.scatter.tolist()
      ([2.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])

    References:
      Chan, Golub and LeVeque (1983), on merging sample variances; Knuth, TAOCP
      volume 2, section 4.2.2, theorem B, on the exact sum.
    """
    if dim < 1:
        raise ValueError(f"moments: dim must be at least 1, got {dim}")

    def init() -> MomentsState:
        return MomentsState(_nothing(dim), _nothing(dim) if grads else None)

    def update(state: MomentsState, taps: Taps) -> MomentsState:
        _check_batch(taps, dim, grads)
        return _merged(state, _of_batch(taps if grads else taps._replace(grads=None)))

    return Accumulator(init, update, _merged, _finished)


def _merged(left: MomentsState, right: MomentsState) -> MomentsState:
    acts = _merged_rows(left.acts, right.acts)
    if left.grads is None or right.grads is None:
        return MomentsState(acts, None)
    return MomentsState(acts, _merged_rows(left.grads, right.grads))


def _merged_rows(left: RowMoments, right: RowMoments) -> RowMoments:
    weight = _sum(left.weight, right.weight)
    step = _sum(right.mean, Pair(-left.mean.high, -left.mean.low))
    share = _ratio(_value(right.weight), _value(weight))
    delta = _value(step)
    cross = _value(left.weight) * share * _outer(delta)
    return RowMoments(
        weight=weight,
        mean=_added(_added(left.mean, share * step.high), share * step.low),
        scatter=_added(_sum(left.scatter, right.scatter), cross),
    )


def _finished(state: MomentsState) -> Moments:
    weight = _value(state.acts.weight)
    stats = Moments(weight, _value(state.acts.mean), _value(state.acts.scatter))
    if state.grads is None:
        return stats
    mean = _value(state.grads.mean)
    readouts = _ratio(_value(state.grads.weight), weight)
    centred = _ratio(_value(state.grads.scatter), weight)
    return stats._replace(
        grad_mean=mean,
        grad_second=centred + readouts * _outer(mean),
        readouts=readouts,
    )


def _of_batch(taps: Taps) -> MomentsState:
    weights = taps.weights.astype(_dtype())
    acts = _of_rows(_counted(taps.acts, weights), weights)
    if taps.grads is None:
        return MomentsState(acts, None)
    _, num, dim = taps.grads.shape
    rows = _counted(taps.grads, weights).reshape(-1, dim)
    return MomentsState(acts, _of_rows(rows, jnp.repeat(weights, num)))


def _of_rows(rows: Array, weights: Array) -> RowMoments:
    """Moments of one batch, centred twice: the mean of what is left is tiny."""
    total = jnp.sum(weights)
    rough = _short(_ratio(_dot(weights, rows), total))
    centred = rows - rough[None, :]
    rest = _ratio(_dot(weights, centred), total)
    gram = _gram(centred, weights)
    scatter = _added(gram, -total * _outer(rest))
    return RowMoments(_single(total), _added(_single(rough), rest), scatter)


def _gram(rows: Array, weights: Array) -> Pair:
    """Weighted Gram matrix, block by block: a long float32 sum drifts."""
    num, dim = rows.shape
    if num <= _BLOCK:
        return _single(_dot((rows * weights[:, None]).T, rows))
    blocks = -(-num // _BLOCK)
    fill = blocks * _BLOCK - num
    rows = jnp.pad(rows, ((0, fill), (0, 0))).reshape(blocks, _BLOCK, dim)
    weights = jnp.pad(weights, (0, fill)).reshape(blocks, _BLOCK)

    def add(gram: Pair, block: tuple[Array, Array]) -> tuple[Pair, None]:
        rows, weights = block
        return _added(gram, _dot((rows * weights[:, None]).T, rows)), None

    return jax.lax.scan(add, _zeros(dim, dim), (rows, weights))[0]


def _short(x: Array) -> Array:
    """Drop the last bits of the mantissa: any number near the mean will do.

    A compiler may fuse ``rows - a * b`` without rounding the product, and keep
    another, rounded product as the mean; it cannot do so through this rounding.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - 2)


def _nothing(dim: int) -> RowMoments:
    return RowMoments(_zeros(), _zeros(dim), _zeros(dim, dim))


def _dtype() -> jnp.dtype:
    return jnp.result_type(float)


def _counted(x: Array, weights: Array) -> Array:
    """Rows of weight 0 as zeros, so that what they hold cannot matter."""
    mask = (weights != 0).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.where(mask, x.astype(_dtype()), jnp.zeros((), _dtype()))


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _outer(x: Array) -> Array:
    return x[:, None] * x[None, :]


def _ratio(x: Array, y: Array) -> Array:
    """``x / y``, and 0 where nothing was seen."""
    return jnp.where(
        y > 0, x / jnp.where(y > 0, y, jnp.ones_like(y)), jnp.zeros_like(x)
    )


def _zeros(*shape: int) -> Pair:
    return Pair(jnp.zeros(shape, _dtype()), jnp.zeros(shape, _dtype()))


def _single(x: Array) -> Pair:
    return Pair(x, jnp.zeros_like(x))


def _value(x: Pair) -> Array:
    return x.high + x.low


def _added(x: Pair, y: Array) -> Pair:
    """Add a float without losing its low bits."""
    high = x.high + y
    back = high - x.high
    low = x.low + ((x.high - (high - back)) + (y - back))
    total = high + low  # so that the low part stays below the rounding of the high
    return Pair(total, low - (total - high))


def _sum(x: Pair, y: Pair) -> Pair:
    return _added(_added(x, y.high), y.low)


def _check_batch(taps: Taps, dim: int, grads: bool) -> None:
    acts, gradients, weights = taps
    if acts.ndim != 2 or acts.shape[1] != dim:
        raise ValueError(
            f"moments: wanted acts [N, {dim}], got shape {acts.shape}; the accumulator "
            "is made for one site's width"
        )
    if weights.shape != acts.shape[:1]:
        raise ValueError(
            f"moments: wanted one weight per example {acts.shape[:1]}, got shape "
            f"{weights.shape}"
        )
    if not grads:
        return
    if gradients is None:
        raise ValueError(
            "moments: the taps carry no gradients; tap with a readout, or use "
            "moments(dim, grads=False)"
        )
    if gradients.ndim != 3 or gradients.shape[::2] != acts.shape:
        raise ValueError(
            f"moments: wanted grads [{acts.shape[0]}, K, {dim}], got shape "
            f"{gradients.shape}"
        )
