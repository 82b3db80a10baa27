"""Taps folded into exactly weighted moments, in one pass."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.linalg.running import (
    RowMoments,
    merged_rows,
    no_rows,
    outer,
    ratio,
    row_moments,
    value,
)
from toyfeat.linalg.streams import StreamMethod, stream_svd
from toyfeat.types import Accumulator, Array, Moments, SketchedMoments, Taps


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
        return MomentsState(no_rows(dim), no_rows(dim) if grads else None)

    def update(state: MomentsState, taps: Taps) -> MomentsState:
        _check_batch(taps, dim, grads)
        return _merged(state, _of_batch(taps if grads else taps._replace(grads=None)))

    return Accumulator(init, update, _merged, _finished)


class SketchState(NamedTuple):
    """Running sketches of activations and gradients.

    Attributes:
      acts: of the activations, centred.
      grads: of the gradients, not centred, or ``None``.
    """

    acts: Any
    grads: Any


def sketched_moments(
    dim: int,
    rank: int,
    *,
    grads: bool = True,
    method: StreamMethod = "incremental",
    width: int | None = None,
) -> Accumulator:
    """Accumulate the leading directions of activations and of gradients.

    For widths whose ``D x D`` matrices do not fit: two sketches of ``width`` rows
    (see :func:`toyfeat.stream_svd`) take the place of the two scatter matrices.

    Args:
      dim: the width ``D`` of the site.
      rank: how many directions of each are kept.
      grads: whether gradients are folded too; if so every batch must have them.
      method: of :func:`toyfeat.stream_svd`.
      width: rows of a sketch, ``2 * rank`` by default.

    Returns:
      ``Accumulator(init, update, merge, finish)``: ``update(state, taps)``,
      ``finish(state) -> SketchedMoments``, which ``pca``, ``gradient_pca`` and
      ``joint_pca`` take.

    Raises:
      ValueError: if a size is out of range; from ``update``, as :func:`moments`.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Taps
      >>> acc = sketched_moments(3, 1, grads=False)
      >>> acts = jnp.array([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
      >>> stats = acc.finish(acc.update(acc.init(), Taps(acts, None, jnp.ones(2))))
      >>> (stats.acts.s**2 / stats.weight).round(4).tolist()
      [4.0]
    """
    of_acts = stream_svd(dim, rank, center=True, method=method, width=width)
    of_grads = stream_svd(dim, rank, method=method, width=width)

    def init() -> SketchState:
        return SketchState(of_acts.init(), of_grads.init() if grads else None)

    def update(state: SketchState, taps: Taps) -> SketchState:
        _check_batch(taps, dim, grads)
        acts = of_acts.update(state.acts, taps.acts, taps.weights)
        if not grads or taps.grads is None:
            return SketchState(acts, None)
        rows = taps.grads.reshape(-1, dim)
        weights = jnp.repeat(taps.weights, taps.grads.shape[1])
        return SketchState(acts, of_grads.update(state.grads, rows, weights))

    def merge(left: SketchState, right: SketchState) -> SketchState:
        acts = of_acts.merge(left.acts, right.acts)
        return SketchState(
            acts, of_grads.merge(left.grads, right.grads) if grads else None
        )

    def finish(state: SketchState) -> SketchedMoments:
        return SketchedMoments(
            weight=value(state.acts.weight),
            mean=value(state.acts.mean),
            acts=of_acts.finish(state.acts),
            grads=of_grads.finish(state.grads) if grads else None,
        )

    return Accumulator(init, update, merge, finish)


def _merged(left: MomentsState, right: MomentsState) -> MomentsState:
    acts = merged_rows(left.acts, right.acts)
    if left.grads is None or right.grads is None:
        return MomentsState(acts, None)
    return MomentsState(acts, merged_rows(left.grads, right.grads))


def _finished(state: MomentsState) -> Moments:
    weight = value(state.acts.weight)
    stats = Moments(weight, value(state.acts.mean), value(state.acts.scatter))
    if state.grads is None:
        return stats
    mean = value(state.grads.mean)
    readouts = ratio(value(state.grads.weight), weight)
    centred = ratio(value(state.grads.scatter), weight)
    return stats._replace(
        grad_mean=mean,
        grad_second=centred + readouts * outer(mean),
        readouts=readouts,
    )


def _of_batch(taps: Taps) -> MomentsState:
    weights = taps.weights.astype(_dtype())
    acts = row_moments(_counted(taps.acts, weights), weights)
    if taps.grads is None:
        return MomentsState(acts, None)
    _, num, dim = taps.grads.shape
    rows = _counted(taps.grads, weights).reshape(-1, dim)
    return MomentsState(acts, row_moments(rows, jnp.repeat(weights, num)))


def _dtype() -> jnp.dtype:
    return jnp.result_type(float)


def _counted(x: Array, weights: Array) -> Array:
    """Rows of weight 0 as zeros, so that what they hold cannot matter."""
    mask = (weights != 0).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.where(mask, x.astype(_dtype()), jnp.zeros((), _dtype()))


def _check_batch(taps: Taps, dim: int, grads: bool) -> None:
    acts, gradients, weights = taps.acts, taps.grads, taps.weights
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
