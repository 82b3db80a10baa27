"""First and second moments of taps, exactly weighted, in one pass."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.linalg.compensated import (
    RowMoments,
    empty_moments,
    merge_moments,
    outer,
    ratio,
    row_moments,
    to_float,
)
from toyfeat.linalg.streams import StreamMethod, stream_svd
from toyfeat.linalg.svd import SVD
from toyfeat.types import Accumulator, Array, ArrayLike, Moments, Taps


class SketchedMoments(NamedTuple):
    """Moments reduced to their leading directions.

    Attributes:
      weight: ``[]``, the sum of the weights.
      mean: ``[D]``, the weighted mean of the activations.
      acts: singular values and right vectors of the centred activations, each row
        times the root of its weight.
      grads: those of the gradients, not centred, or ``None``.
    """

    weight: ArrayLike
    mean: ArrayLike
    acts: SVD
    grads: SVD | None = None


class MomentsState(NamedTuple):
    """Running moments; turn them into :class:`Moments` with ``finish``.

    Attributes:
      acts: moments of the activations, one row per example.
      grads: moments of the gradients, ``K`` rows per example, or ``None``.
    """

    acts: RowMoments
    grads: RowMoments | None


def moments(dim: int, *, grads: bool = True) -> Accumulator:
    r"""Accumulate first and second moments of activations and gradients.

    For streams and shards; :func:`moments_of` is the short form for one batch.  A
    batch of weight :math:`b` with mean :math:`\mu_b` and scatter :math:`S_b`
    joins a state of weight :math:`a` by

    .. math:: \delta = \mu_b - \mu_a, \quad
       \mu = \mu_a + \tfrac{b}{a + b} \delta, \quad
       S = S_a + S_b + \tfrac{a b}{a + b} \delta \delta^\top .

    Gradients are centred in the same manner on the way, and their mean is added
    back at the end.  So their second moment is not centred, but that of a constant
    gradient has exactly rank 1.

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
        return MomentsState(empty_moments(dim), empty_moments(dim) if grads else None)

    def update(state: MomentsState, taps: Taps) -> MomentsState:
        _check_batch(taps, dim, grads)
        batch = _batch_moments(taps if grads else taps._replace(grads=None))
        return _merge_states(state, batch)

    return Accumulator(
        init=init, update=update, merge=_merge_states, finish=_finish_state
    )


def moments_of(taps: Taps | Mapping[str, Taps]) -> Moments:
    """Compute first and second moments of one batch of taps.

    The short form of :func:`moments` for taps that fit in memory.  Gradients are
    folded if there are any.

    Args:
      taps: taps of one site, or the dict with one site that :func:`toyfeat.tap`
        returns.

    Returns:
      The moments that :func:`toyfeat.pca`, :func:`toyfeat.gradient_pca` and
      :func:`toyfeat.joint_pca` take.

    Raises:
      ValueError: if the dict does not hold exactly one site, or the shapes do not
        fit each other.
      TypeError: if ``taps`` are neither.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Taps
      >>> acts = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> stats = moments_of(Taps(acts, None, jnp.ones(2)))
      >>> stats.mean.tolist(), stats.scatter.tolist()
      ([2.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])
    """
    if isinstance(taps, Mapping):
        if len(taps) != 1:
            raise ValueError(
                f"moments_of: wanted taps of one site, got {len(taps)} sites "
                f"{list(taps)}; call it per site, moments_of(taps[site])"
            )
        (taps,) = taps.values()
    if not isinstance(taps, Taps):
        raise TypeError(
            f"moments_of: wanted Taps or a dict with one site, got "
            f"{type(taps).__name__}; tap(...) returns such a dict"
        )
    if jnp.ndim(taps.acts) != 2:
        raise ValueError(
            f"moments_of: wanted acts [N, D], got shape {jnp.shape(taps.acts)}"
        )
    accumulator = moments(taps.acts.shape[1], grads=taps.grads is not None)
    return accumulator.finish(accumulator.update(accumulator.init(), taps))


class SketchState(NamedTuple):
    """Running sketches of activations and gradients.

    Attributes:
      acts: sketch of the activations, centred.
      grads: sketch of the gradients, not centred, or ``None``.
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

    For widths whose ``D x D`` matrices do not fit in memory: two sketches of
    ``width`` rows (see :func:`toyfeat.linalg.stream_svd`) replace the two scatter
    matrices.

    Args:
      dim: the width ``D`` of the site.
      rank: how many directions of each to compute.
      grads: whether gradients are folded too; if so every batch must have them.
      method: of :func:`toyfeat.linalg.stream_svd`.
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
    acts_svd = stream_svd(dim, rank, center=True, method=method, width=width)
    grads_svd = stream_svd(dim, rank, method=method, width=width)

    def init() -> SketchState:
        return SketchState(acts_svd.init(), grads_svd.init() if grads else None)

    def update(state: SketchState, taps: Taps) -> SketchState:
        _check_batch(taps, dim, grads)
        acts = acts_svd.update(state.acts, taps.acts, taps.weights)
        if not grads or taps.grads is None:
            return SketchState(acts, None)
        # One row per readout, each with the weight of its example.
        rows = taps.grads.reshape(-1, dim)
        weights = jnp.repeat(taps.weights, taps.grads.shape[1])
        return SketchState(acts, grads_svd.update(state.grads, rows, weights))

    def merge(left: SketchState, right: SketchState) -> SketchState:
        acts = acts_svd.merge(left.acts, right.acts)
        return SketchState(
            acts, grads_svd.merge(left.grads, right.grads) if grads else None
        )

    def finish(state: SketchState) -> SketchedMoments:
        return SketchedMoments(
            weight=to_float(state.acts.weight),
            mean=to_float(state.acts.mean),
            acts=acts_svd.finish(state.acts),
            grads=grads_svd.finish(state.grads) if grads else None,
        )

    return Accumulator(init=init, update=update, merge=merge, finish=finish)


def _merge_states(left: MomentsState, right: MomentsState) -> MomentsState:
    """Merge the moments of two sets of examples."""
    acts = merge_moments(left.acts, right.acts)
    if left.grads is None or right.grads is None:
        return MomentsState(acts, None)
    return MomentsState(acts, merge_moments(left.grads, right.grads))


def _finish_state(state: MomentsState) -> Moments:
    """Round the pairs of floats, and add back the mean of the gradients."""
    weight = to_float(state.acts.weight)
    stats = Moments(weight, to_float(state.acts.mean), to_float(state.acts.scatter))
    if state.grads is None:
        return stats
    # Per example, not per row: each example has a row per readout.
    mean = to_float(state.grads.mean)
    readouts = ratio(to_float(state.grads.weight), weight)
    centred = ratio(to_float(state.grads.scatter), weight)
    return stats._replace(
        grad_mean=mean,
        grad_second=centred + readouts * outer(mean),
        readouts=readouts,
    )


def _batch_moments(taps: Taps) -> MomentsState:
    """Moments of one batch, with a row per example and per gradient."""
    weights = taps.weights.astype(_dtype())
    acts = row_moments(_zero_unweighted(taps.acts, weights), weights)
    if taps.grads is None:
        return MomentsState(acts, None)
    _, num, dim = taps.grads.shape
    rows = _zero_unweighted(taps.grads, weights).reshape(-1, dim)
    return MomentsState(acts, row_moments(rows, jnp.repeat(weights, num)))


def _dtype() -> jnp.dtype:
    """The default float type, in which moments are summed."""
    return jnp.result_type(float)


def _zero_unweighted(x: Array, weights: Array) -> Array:
    """Set rows of weight 0 to zeros, so that their entries cannot matter."""
    mask = (weights != 0).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.where(mask, x.astype(_dtype()), jnp.zeros((), _dtype()))


def _check_batch(taps: Taps, dim: int, grads: bool) -> None:
    """Check the shapes of a batch."""
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
