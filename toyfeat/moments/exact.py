"""First and second moments of taps, exactly weighted, in one pass."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int
from toyfeat.linalg.compensated import (
    RowMoments,
    empty_moments,
    merge_moments,
    row_moments,
)
from toyfeat.linalg.finished import check_rounded, moments_from_rows, round_rows
from toyfeat.linalg.streams import check_state
from toyfeat.moments.batches import check_batch, check_types, gradient_rows
from toyfeat.types import Accumulator, Array, Moments, Taps


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
        taps = check_batch("moments", taps, dim, grads)
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
    check_types("moments_of", taps)
    if jnp.ndim(taps.acts) != 2:
        raise ValueError(
            f"moments_of: wanted acts [N, D], got shape {jnp.shape(taps.acts)}"
        )
    # One batch of a stream, which is a state of its own.
    dim, grads = jnp.shape(taps.acts)[1], taps.grads is not None
    taps = check_batch("moments", taps, check_int("moments", "dim", dim), grads)
    return check_rounded("moments", _finished_batch(*_batch_arrays(taps)))


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
    rows = gradient_rows(grads.astype(_dtype()), weights)
    return MomentsState(acts_rows, row_moments(*rows))


@jax.jit
def _finished_batch(acts: Array, grads: Array | None, weights: Array) -> Any:
    """Moments of one batch, and what is checked of them."""
    return round_rows(*_batch_moments(acts, grads, weights))


def _batch_arrays(taps: Taps) -> tuple[Any, Any, Any]:
    """Activations, gradients and weights, those of NumPy in a type that JAX has."""
    arrays = (taps.acts, taps.grads, taps.weights)
    return jax.tree.map(
        lambda x: x.astype(_dtype()) if isinstance(x, np.ndarray) else x, arrays
    )


def _dtype() -> jnp.dtype:
    """The default float type, in which moments are summed."""
    return jnp.result_type(float)
