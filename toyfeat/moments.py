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


class Pair(NamedTuple):
    """An unevaluated sum of two floats, ``high + low``."""

    high: Array
    low: Array


class GradientSums(NamedTuple):
    """Sums over examples and readouts.

    Attributes:
      total: ``[D]``, ``sum_n w_n sum_k g_nk``.
      gram: ``[D, D]``, ``sum_n w_n sum_k g_nk g_nk^T``.
      readouts: ``[]``, ``K``, 0 before the first batch.
    """

    total: Pair
    gram: Pair
    readouts: Array


class MomentsState(NamedTuple):
    """Running sums; turn them into :class:`Moments` with ``finish``.

    Attributes:
      weight: ``[]``, sum of the weights.
      mean: ``[D]``.
      scatter: ``[D, D]`` about ``mean``.
      grads: sums of the gradients, or ``None``.
    """

    weight: Pair
    mean: Pair
    scatter: Pair
    grads: GradientSums | None


def moments(dim: int, *, grads: bool = True) -> Accumulator:
    r"""Accumulate first and second moments of activations and gradients.

    A batch of weight :math:`b` with mean :math:`\mu_b` and scatter :math:`S_b`
    joins a state of weight :math:`a` by

    .. math:: \delta = \mu_b - \mu_a, \quad
       \mu = \mu_a + \tfrac{b}{a + b} \delta, \quad
       S = S_a + S_b + \tfrac{a b}{a + b} \delta \delta^\top .

    Gradients are summed as they are: their second moment is not centred.

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
        sums = GradientSums(_zeros(dim), _zeros(dim, dim), jnp.zeros((), jnp.int32))
        return MomentsState(
            _zeros(), _zeros(dim), _zeros(dim, dim), sums if grads else None
        )

    def update(state: MomentsState, taps: Taps) -> MomentsState:
        _check_batch(taps, dim, grads)
        return _merged(state, _of_batch(taps if grads else taps._replace(grads=None)))

    return Accumulator(init, update, _merged, _finished)


def _merged(left: MomentsState, right: MomentsState) -> MomentsState:
    weight = _sum(left.weight, right.weight)
    delta = _value(_sum(right.mean, Pair(-left.mean.high, -left.mean.low)))
    share = _ratio(_value(right.weight), _value(weight))
    cross = _value(left.weight) * share * _outer(delta)
    sums = None
    if left.grads is not None and right.grads is not None:
        sums = GradientSums(
            _sum(left.grads.total, right.grads.total),
            _sum(left.grads.gram, right.grads.gram),
            jnp.maximum(left.grads.readouts, right.grads.readouts),
        )
    return MomentsState(
        weight=weight,
        mean=_added(left.mean, share * delta),
        scatter=_added(_sum(left.scatter, right.scatter), cross),
        grads=sums,
    )


def _finished(state: MomentsState) -> Moments:
    weight = _value(state.weight)
    stats = Moments(weight, _value(state.mean), _value(state.scatter))
    if state.grads is None:
        return stats
    readouts = jnp.maximum(state.grads.readouts, 1).astype(weight.dtype)
    return stats._replace(
        grad_mean=_ratio(_value(state.grads.total), weight * readouts),
        grad_second=_ratio(_value(state.grads.gram), weight),
        readouts=readouts,
    )


def _of_batch(taps: Taps) -> MomentsState:
    weights = taps.weights.astype(_dtype())
    acts = _counted(taps.acts, weights)
    total = jnp.sum(weights)
    rough = _ratio(_dot(weights, acts), total)
    centred = acts - rough[None, :]
    rest = _ratio(_dot(weights, centred), total)
    scatter = _dot((centred * weights[:, None]).T, centred) - total * _outer(rest)
    return MomentsState(
        weight=_single(total),
        mean=_added(_single(rough), rest),
        scatter=_single(scatter),
        grads=None if taps.grads is None else _gradient_sums(taps.grads, weights),
    )


def _gradient_sums(gradients: Array, weights: Array) -> GradientSums:
    _, num, dim = gradients.shape
    flat = _counted(gradients, weights).reshape(-1, dim)
    repeated = jnp.repeat(weights, num)
    return GradientSums(
        total=_single(_dot(repeated, flat)),
        gram=_single(_dot((flat * repeated[:, None]).T, flat)),
        readouts=jnp.asarray(num, jnp.int32),
    )


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
    return Pair(high, x.low + ((x.high - (high - back)) + (y - back)))


def _sum(x: Pair, y: Pair) -> Pair:
    high, low = _added(x, y.high)
    return Pair(high, low + y.low)


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
