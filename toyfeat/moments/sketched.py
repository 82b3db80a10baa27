"""Leading directions of activations and of gradients, from two sketches."""

from functools import partial
from typing import Any, NamedTuple

from toyfeat.linalg.compensated import to_float
from toyfeat.linalg.streams import StreamMethod, make_stream
from toyfeat.linalg.svd import SVD
from toyfeat.moments.batches import check_batch, gradient_rows
from toyfeat.types import Accumulator, ArrayLike, Taps


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
        taps = check_batch("sketched_moments", taps, dim, grads)
        acts = acts_svd.update(state.acts, taps.acts, taps.weights)
        if not grads or taps.grads is None:
            return SketchState(acts, None)
        rows = gradient_rows(taps.grads, taps.weights)
        return SketchState(acts, grads_svd.update(state.grads, *rows))

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
