"""First and second moments of taps, exactly weighted, in one pass."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_array, check_int, check_type
from toyfeat.linalg.compensated import (
    RowMoments,
    empty_moments,
    merge_moments,
    row_moments,
    to_float,
)
from toyfeat.linalg.finished import moments_from_rows
from toyfeat.linalg.streams import StreamMethod, check_state, make_stream
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

    Activations and gradients may have any size between 1e-14 and 1e16, where their
    squares fit float32, and weights any between 1e-30 and 1e30.

    Raises:
      ValueError: from ``update``, if a batch has another width, no gradients
        where they are wanted, or a shape that is not ``[N, D]``, ``[N, K, D]``,
        ``[N]``; from the factory, if ``dim < 1``; from ``finish``, outside of a
        trace (inside, the statistics are NaN), if an entry of a row that counts was
        not finite, a weight negative or not finite, or if squares leave the range.
      TypeError: if ``dim`` is not an int; from ``update``, if a batch is not
        :class:`toyfeat.Taps` of arrays.

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
    dim = check_int("moments", "dim", dim)

    # Checks of shapes only: all of this runs inside a trace as well.
    def check(state: MomentsState) -> MomentsState:
        acts = getattr(state, "acts", state)
        check_state("moments", acts, RowMoments, dim)
        return state

    def init() -> MomentsState:
        return _empty_state(dim, grads)

    # A batch is a state of its own, merged like one.
    def update(state: MomentsState, taps: Taps) -> MomentsState:
        taps = _check_batch("moments", taps, dim, grads)
        return _add_batch(check(state), *_batch_arrays(taps))

    def merge(left: MomentsState, right: MomentsState) -> MomentsState:
        return _merge_states(check(left), check(right))

    def finish(state: MomentsState) -> Moments:
        return moments_from_rows("moments", check(state).acts, state.grads)

    return Accumulator(init=init, update=update, merge=merge, finish=finish)


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
    # Taps of one site, out of a dict if need be.
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
    _check_types("moments_of", taps)
    if jnp.ndim(taps.acts) != 2:
        raise ValueError(
            f"moments_of: wanted acts [N, D], got shape {jnp.shape(taps.acts)}"
        )
    # One batch of a stream, which is a state of its own.
    dim, grads = jnp.shape(taps.acts)[1], taps.grads is not None
    taps = _check_batch("moments", taps, check_int("moments", "dim", dim), grads)
    return moments_from_rows("moments", *_batch_moments(*_batch_arrays(taps)))


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
    stream = partial(make_stream, "sketched_moments", dim, rank)
    acts_svd = stream(center=True, method=method, width=width)
    grads_svd = stream(center=False, method=method, width=width)

    def init() -> SketchState:
        return SketchState(acts_svd.init(), grads_svd.init() if grads else None)

    def update(state: SketchState, taps: Taps) -> SketchState:
        taps = _check_batch("sketched_moments", taps, dim, grads)
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
        # Weights are stored in units of ``mass``, rows in units of ``unit``.
        return SketchedMoments(
            weight=to_float(state.acts.weight) * state.acts.mass,
            mean=to_float(state.acts.mean) * state.acts.unit,
            acts=acts_svd.finish(state.acts),
            grads=grads_svd.finish(state.grads) if grads else None,
        )

    return Accumulator(init=init, update=update, merge=merge, finish=finish)


# Each of these is one program: a first call compiles that, not every operation.
@partial(jax.jit, static_argnums=(0, 1))
def _empty_state(dim: int, grads: bool) -> MomentsState:
    """Moments of no examples."""
    return MomentsState(empty_moments(dim), empty_moments(dim) if grads else None)


@jax.jit
def _add_batch(
    state: MomentsState, acts: Array, grads: Array | None, weights: Array
) -> MomentsState:
    """Merge the moments of a batch into a state."""
    return _merge_states(state, _batch_moments(acts, grads, weights))


@jax.jit
def _merge_states(left: MomentsState, right: MomentsState) -> MomentsState:
    """Merge the moments of two sets of examples."""
    acts = merge_moments(left.acts, right.acts)
    if left.grads is None or right.grads is None:
        return MomentsState(acts, None)
    return MomentsState(acts, merge_moments(left.grads, right.grads))


@jax.jit
def _batch_moments(acts: Array, grads: Array | None, weights: Array) -> MomentsState:
    """Moments of one batch, with a row per example and per gradient."""
    weights = weights.astype(_dtype())
    acts_rows = row_moments(acts.astype(_dtype()), weights)
    if grads is None:
        return MomentsState(acts_rows, None)
    # One row per readout, each with the weight of its example.
    _, num, dim = grads.shape
    rows = grads.astype(_dtype()).reshape(-1, dim)
    return MomentsState(acts_rows, row_moments(rows, jnp.repeat(weights, num)))


def _batch_arrays(taps: Taps) -> tuple[Any, Any, Any]:
    """Activations, gradients and weights, those of NumPy in a type that JAX has."""
    arrays = (taps.acts, taps.grads, taps.weights)
    return jax.tree.map(
        lambda x: x.astype(_dtype()) if isinstance(x, np.ndarray) else x, arrays
    )


def _dtype() -> jnp.dtype:
    """The default float type, in which moments are summed."""
    return jnp.result_type(float)


def _check_types(who: str, taps: Taps) -> None:
    """Check that taps are taps of real arrays."""
    hint = "toyfeat.tap returns a dict of them"
    if isinstance(taps, Mapping):
        hint = "pass the taps of one site, taps[site]"
    check_type(who, "taps", taps, Taps, hint=hint)
    # Every field that is there is a real array.
    for name in ("acts", "weights", "grads"):
        value = getattr(taps, name)
        if name != "grads" or value is not None:
            check_array(who, name, value, hint="convert it with jnp.asarray")


def _check_batch(who: str, taps: Taps, dim: int, grads: bool) -> Taps:
    """Check the types and shapes of a batch; gradients that are not wanted go."""
    _check_types(who, taps)
    # Activations and weights.
    acts, gradients, weights = taps.acts, taps.grads, taps.weights
    if acts.ndim != 2 or acts.shape[1] != dim:
        raise ValueError(
            f"{who}: wanted acts [N, {dim}], got shape {acts.shape}; the accumulator "
            "is made for one site's width"
        )
    if weights.shape != acts.shape[:1]:
        raise ValueError(
            f"{who}: wanted one weight per example {acts.shape[:1]}, got shape "
            f"{weights.shape}"
        )
    # Gradients, if they are wanted.
    if not grads:
        return taps._replace(grads=None)
    if gradients is None:
        raise ValueError(
            f"{who}: the taps carry no gradients; tap with a readout, or use "
            f"{who}(..., grads=False)"
        )
    if gradients.ndim != 3 or gradients.shape[::2] != acts.shape:
        raise ValueError(
            f"{who}: wanted grads [{acts.shape[0]}, K, {dim}], got shape "
            f"{gradients.shape}"
        )
    return taps
