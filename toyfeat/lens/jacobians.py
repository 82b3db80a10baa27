"""Mean Jacobians of the final residual stream, and their second moments."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_array
from toyfeat.lens.averages import Estimate
from toyfeat.lens.clusters import nearest
from toyfeat.lens.fits import (
    FitOptions,
    JacobianState,
    add_batch,
    check_options,
    count_positions,
    finish_state,
    init_state,
    merge_states,
    take_turn,
)
from toyfeat.lens.model import LensModel
from toyfeat.lens.pullbacks import Pulled, Reduce, pull_back
from toyfeat.meshes import everywhere, run_automatic, split_like
from toyfeat.types import Accumulator, Array, Inputs, Params

_CHUNK = 16
"""Cotangents at a time, unless told otherwise.

Matrices are then ``16 B T`` rows long, which fills the products of a CPU; memory of a
chunk is ``16 B T`` rows of every layer.
"""

_HIGHEST = jax.lax.Precision.HIGHEST


def mean_jacobian(
    model: LensModel,
    dim: int,
    *,
    skip_first: int = 16,
    skip_last: int = 1,
    cotangents: int | None = None,
    key: Array | None = None,
    chunk: int = _CHUNK,
    chain: bool = False,
    centres: Mapping[str, Array] | None = None,
) -> Accumulator:
    r"""Accumulate the mean Jacobian of the final stream at every earlier one.

    The published estimator of the Jacobian lens.  A cotangent :math:`e_i` stands at all
    valid positions of the final residual stream at once, so that its gradient at
    position :math:`t` of layer :math:`l` is row :math:`i` of

    .. math:: J_{l,t} = \sum_{t' \ge t} \partial h_{L,t'} / \partial h_{l,t} ,

    and :math:`J_l` is the mean over valid positions of a prompt, then over prompts, all
    of equal weight.  One pull-back serves all layers.

    Args:
      model: from :func:`from_decoder` or :func:`from_probed`.
      dim: width ``D`` of its residual streams.
      skip_first: tokens left out at the start of every prompt.
      skip_last: tokens left out at its end.
      cotangents: ``M``, a divisor of ``D``: how many cotangents a prompt is given.
        They are rows of a random orthonormal basis, in turn, so that ``D / M`` prompts
        see all of it.  Unbiased over keys, at ``M / D`` of the cost.  By default all
        ``D``, which is exact.
      key: for the basis; all shards of a fit need the same.
      chunk: cotangents pulled back at a time, by one ``vmap``.
      chain: whether to pull back block by block, all cotangents at once, instead of
        through the whole model.  Exact too; takes memory of ``D B T`` rows.
      centres: by site, ``[E, D]``: one Jacobian for every cluster of activations, of
        the positions that are nearest to its centre.

    Returns:
      ``Accumulator(init, update, merge, finish)``: ``update(state, params, inputs,
      mask=None)`` for a batch of prompts, with ``mask [B, T]`` 0 at padding and a
      prompt without tokens left out; ``finish(state) -> Estimate``.  Pure and jit-able.
      Clusters are averaged by the number of their positions in a prompt.

    Raises:
      ValueError: if a size is out of range, ``cotangents`` does not divide ``dim``, or
        ``centres`` lack a site; from ``update``, for streams of other shapes, or
        prompts that are not longer than what is skipped.
      TypeError: if an argument has the wrong type, or there is no key where
        ``cotangents`` are given.

    Example:
      >>> import jax, jax.numpy as jnp, toyfeat as ft
      >>> def chain(params, x, tap):
      ...     for name, matrix in params.items():
      ...         x = tap(name, x @ matrix)
      ...     return x
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(chain), sites=["a", "b"], unembed=lambda p, h: h
      ... )
      >>> params = {"a": jnp.eye(2), "b": jnp.array([[1.0, 2.0], [0.0, 3.0]])}
      >>> acc = mean_jacobian(model, 2, skip_first=0, skip_last=0)
      >>> state = jax.jit(acc.update)(acc.init(), params, jnp.ones((3, 1, 2)))
      >>> acc.finish(state).matrices["a"].tolist()  # the transpose: out times in
      [[1.0, 0.0], [2.0, 3.0]]

    References:
      Gurnee et al. (2026), "Verbalizable Representations Form a Global Workspace in
      Language Models", transformer-circuits.pub/2026/workspace.
    """
    who = "mean_jacobian"
    options = check_options(
        who, model, dim, skip_first, skip_last, cotangents, key, chunk, chain
    )
    if centres is not None:
        centres = _check_centres(who, centres, options)
    experts = 1 if centres is None else len(next(iter(centres.values())))
    return Accumulator(
        init=partial(init_state, options, experts),
        update=partial(_update, partial(_update_mean, options), centres),
        merge=merge_states,
        finish=partial(finish_state, squeeze=centres is None),
    )


def second_moment(
    model: LensModel,
    dim: int,
    *,
    skip_first: int = 16,
    skip_last: int = 1,
    cotangents: int | None = None,
    key: Array | None = None,
    chunk: int = _CHUNK,
    chain: bool = False,
) -> Accumulator:
    r"""Accumulate the second moment :math:`E[J_{l,t}^\top J_{l,t}]` at every stream.

    Of the same Jacobians as :func:`mean_jacobian`, averaged over positions and prompts
    in the same manner.  Where the sign of a derivative depends on the input, the mean
    is near 0 and the second moment is not.

    Args:
      model: as of :func:`mean_jacobian`.
      dim: width ``D``.
      skip_first: tokens left out at the start of every prompt.
      skip_last: tokens left out at its end.
      cotangents: ``M``, as of :func:`mean_jacobian`: the sum over all ``D`` outputs is
        estimated by ``D / M`` times the sum over ``M`` directions.
      key: for the basis.
      chunk: cotangents at a time.
      chain: whether to pull back block by block.

    Returns:
      ``Accumulator`` as of :func:`mean_jacobian`; matrices are symmetric.

    Raises:
      ValueError: as :func:`mean_jacobian`.
      TypeError: as :func:`mean_jacobian`.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> def square(params, x, tap):
      ...     return tap("y", tap("x", x) ** 2)
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(square), sites=["x", "y"], unembed=lambda p, h: h
      ... )
      >>> x = jnp.array([[[1.0]], [[-1.0]]])
      >>> for family in (mean_jacobian, second_moment):
      ...     acc = family(model, 1, skip_first=0, skip_last=0)
      ...     print(acc.finish(acc.update(acc.init(), {}, x)).matrices["x"].tolist())
      [[0.0]]
      [[4.0]]
    """
    who = "second_moment"
    options = check_options(
        who, model, dim, skip_first, skip_last, cotangents, key, chunk, chain
    )

    return Accumulator(
        init=partial(init_state, options, 1, groups=1),  # prompts give whole matrices
        update=partial(_update, partial(_update_second, options), None),
        merge=merge_states,
        finish=_finish_second,
    )


def _update(
    update: Callable[..., JacobianState],
    centres: Mapping[str, Array] | None,
    state: JacobianState,
    params: Params,
    inputs: Inputs,
    mask: Any = None,
) -> JacobianState:
    """Add a batch; the state is on every device of a mesh."""
    return run_automatic(update, everywhere, centres, state, params, inputs, mask)


def _update_mean(
    options: FitOptions,
    centres: Mapping[str, Array] | None,
    state: JacobianState,
    params: Params,
    inputs: Inputs,
    mask: Any,
) -> JacobianState:
    """Add the rows of a batch's Jacobians, averaged over positions."""
    valid, pull = _prepare("mean_jacobian", options, params, inputs, mask)
    total = jnp.sum(valid, axis=1)
    shares = valid / jnp.maximum(total, 1)[:, None]

    def position_weights(site: str, acts: Array) -> Array:
        """Weights ``[B, T, E]`` of positions, 1 in all for a prompt."""
        if centres is None:
            return shares[:, :, None]
        return shares[:, :, None] * nearest(acts, centres[site])

    # Gradients averaged over the positions of each cluster, times its share.
    def reduce(site: str, acts: Array, grads: Array) -> Array:
        weights = position_weights(site, acts)
        grads = grads.astype(weights.dtype)
        return jnp.einsum("bte,kbtd->kbed", weights, grads, precision=_HIGHEST)

    turn = take_turn(state, options, total > 0)
    pulled = pull(turn.directions, reduce, summed=False)
    split = partial(split_like, tree=inputs)
    # The mean of a cluster weighs as much as its share of the prompt.
    rows, weights = {}, {}
    for site, grads in pulled.grads.items():
        share = jnp.sum(position_weights(site, pulled.acts[site]), axis=1)
        divisor = jnp.where(share > 0, share, 1)[None, :, :, None]
        rows[site] = split(jnp.moveaxis(grads / divisor, 0, 2))
        weights[site] = share
    return add_batch(state, turn, rows, weights)


def _update_second(
    options: FitOptions,
    centres: None,
    state: JacobianState,
    params: Params,
    inputs: Inputs,
    mask: Any,
) -> JacobianState:
    """Add the second moments of a batch's Jacobians, averaged over positions."""
    del centres
    valid, pull = _prepare("second_moment", options, params, inputs, mask)
    total = jnp.sum(valid, axis=1)
    # M directions stand for all D.
    scale = options.dim / options.num
    shares = scale * valid / jnp.maximum(total, 1)[:, None]

    def reduce(site: str, acts: Array, grads: Array) -> Array:
        grads = grads.astype(shares.dtype)
        weighted = grads * shares[None, :, :, None]
        return jnp.einsum("kbtd,kbte->bde", weighted, grads, precision=_HIGHEST)

    turn = take_turn(state, options, total > 0)
    pulled = pull(turn.directions, reduce, summed=True)
    rows = {s: split_like(x[:, None], inputs) for s, x in pulled.grads.items()}
    weights = dict.fromkeys(rows, (total > 0).astype(shares.dtype)[:, None])
    whole = turn._replace(group=jnp.zeros_like(turn.group))
    return add_batch(state, whole, rows, weights)


def _prepare(
    who: str, options: FitOptions, params: Params, inputs: Inputs, mask: Any
) -> tuple[Array, Callable[..., Pulled]]:
    """Mark the positions of a batch that count, and make its pull-back."""
    valid = count_positions(who, options, params, inputs, mask)

    def pull(directions: Array, reduce: Reduce, *, summed: bool) -> Pulled:
        return pull_back(
            options.model,
            params,
            inputs,
            valid,
            directions,
            reduce,
            summed=summed,
            chunk=options.chunk,
            chain=options.chain,
        )

    return valid, pull


def _finish_second(state: JacobianState) -> Estimate:
    """Finish; the basis was that of the cotangents, not of the matrices."""
    return finish_state(state._replace(basis=None), squeeze=True)


def _check_centres(
    who: str, centres: Mapping[str, Array], options: FitOptions
) -> dict[str, Array]:
    """Check that all sites but the final one have centres of one shape."""
    sources = options.model.sites[:-1]
    arrays = {
        site: jnp.asarray(check_array(who, "centres", x, hint="of cluster_centres"))
        for site, x in centres.items()
    }
    shapes = {arrays[site].shape for site in sources if site in arrays}
    wrong = len(shapes) != 1 or any(len(s) != 2 or s[1] != options.dim for s in shapes)
    if wrong or set(arrays) != set(sources):
        raise ValueError(
            f"{who}: centres must have [E, {options.dim}] for each of {list(sources)}, "
            f"got { {site: x.shape for site, x in arrays.items()} }; make them with "
            "ft.lenses.cluster_centres"
        )
    return arrays
