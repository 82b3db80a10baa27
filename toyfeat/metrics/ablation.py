"""Ablate directions at a site, or edges between features, and measure the model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import (
    as_array,
    as_floats,
    check_function,
    check_int,
    check_number,
    check_type,
)
from toyfeat.decompose import decode, encode
from toyfeat.types import Array, Basis, Inputs, Outputs, Params, Probed


def ablation_curve(
    probed: Probed,
    params: Params,
    inputs: Inputs,
    metric: Callable[[Outputs], Array],
    *,
    site: str,
    basis: Basis,
    ranks: Sequence[int] | None = None,
) -> Array:
    """Measure a metric of the outputs as directions at a site are removed.

    At each rank ``r`` the activation at the site is replaced by what its first
    ``r`` coordinates decode to; what lies outside the basis is removed too.  All
    ranks run in one vmapped call.

    Args:
      probed: the model.
      params: its parameters.
      inputs: pytree with leading axis ``B``.
      metric: outputs to an array, such as an accuracy or a loss.
      site: where the directions live.
      basis: from any decomposition.
      ranks: how many directions are kept, ``0 .. R`` each by default.

    Returns:
      ``[len(ranks), *metric]``.

    Raises:
      ValueError: if a rank is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> probed = ft.from_split(lambda p, x: x, lambda p, a: a @ jnp.array([1.0, 0.1]))
      >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
      >>> stats = ft.Moments(jnp.array(4.0), jnp.zeros(2), 4 * jnp.eye(2),
      ...     jnp.array([1.0, 0.1]), jnp.array([[1.0, 0.1], [0.1, 0.01]]))
      >>> basis = ft.joint_pca(stats, 1)
      >>> ablation_curve(
      ...     probed, None, x, lambda y: jnp.var(y), site="acts", basis=basis
      ... ).round(3).tolist()
      [0.0, 1.0099999904632568]

    References:
      Bushnaq et al. (2024), arXiv 2405.10928, section 4: "node ablation".
    """
    check_function("ablation_curve", "probed", probed, "from ft.from_linen, ...")
    check_function("ablation_curve", "metric", metric, "of the outputs")
    check_type("ablation_curve", "basis", basis, Basis)
    width = basis.writers.shape[0]
    ranks = range(width + 1) if ranks is None else ranks
    if not isinstance(ranks, Iterable):
        raise TypeError(
            f"ablation_curve: ranks must be several ranks, got {ranks!r:.80}; pass a "
            "list"
        )
    limits: Any = {"least": 0, "most": width, "about": ", the rank of the basis"}
    ranks = [check_int("ablation_curve", "a rank", r, **limits) for r in ranks]
    # A mask of the first directions for every rank, so that one program runs all.
    counts = jnp.asarray(ranks, jnp.int32)
    masks = (jnp.arange(width)[None, :] < counts[:, None]).astype(basis.mean.dtype)

    def metric_with(mask: Array) -> Array:
        outputs, _ = probed(params, inputs, {site: _masked(basis, mask)})
        return metric(outputs)

    return jax.vmap(metric_with)(masks)


def edge_ablation(
    probed: Probed,
    params: Params,
    inputs: Inputs,
    metric: Callable[[Outputs], Array],
    *,
    source: tuple[str, Basis],
    target: tuple[str, Basis] | None,
    kept: Array,
) -> Array:
    """Measure a metric of the outputs when some edges between features are removed.

    Every feature of the target is computed anew, from the source's activation
    with the features that have no edge to it at their mean.

    Args:
      probed: the model.
      params: its parameters.
      inputs: pytree with leading axis ``B``.
      metric: outputs to an array.
      source: site and basis that edges come from.
      target: site and basis that they go to; ``None`` for the outputs, an array
        whose last axis holds the features.
      kept: ``[R', R]`` bool, which edges are kept.

    Returns:
      The metric.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if ``kept`` does not fit the bases.

    References:
      Bushnaq et al. (2024), arXiv 2405.10928, section 4: "edge ablation".
    """
    check_function("edge_ablation", "probed", probed, "from ft.from_linen, ...")
    check_function("edge_ablation", "metric", metric, "of the outputs")
    site, basis = _check_end("source", source)
    if target is not None:
        _check_end("target", target)
    kept = as_array("edge_ablation", "kept", kept)
    sources = basis.writers.shape[0]
    rows = None if target is None else target[1].writers.shape[0]
    wrong_rows = kept.ndim == 2 and rows is not None and len(kept) != rows
    if kept.ndim != 2 or kept.shape[1] != sources or wrong_rows:
        raise ValueError(
            f"edge_ablation: kept must be [{rows or 'R_target'}, {sources}], one row "
            f"per target feature, got shape {kept.shape}; take that of the edges"
        )
    kept = jnp.asarray(kept)

    def target_feature(mask: Array, index: Array) -> Array:
        mask = mask.astype(basis.mean.dtype)
        outputs, acts = probed(params, inputs, {site: _masked(basis, mask)})
        codes = outputs if target is None else encode(target[1], acts[target[0]])
        return jax.lax.dynamic_index_in_dim(codes, index, axis=-1, keepdims=False)

    # Row i of ``kept`` masks the sources of feature i, so the model runs once for each,
    # one after another: all runs at once would not fit into memory.
    pairs = kept, jnp.arange(len(kept))
    codes = jax.lax.map(lambda pair: target_feature(*pair), pairs)
    codes = jnp.moveaxis(codes, 0, -1)
    if target is None:
        return metric(codes)

    # The rest of the model, from the target's features on.
    target_site, target_basis = target
    probes = {target_site: lambda _: decode(target_basis, codes)}
    return metric(probed(params, inputs, probes)[0])


def edges_needed(
    metric_at: Callable[[Array], Array], edges: Array, *, least: float
) -> int:
    """Find the fewest edges, strongest first, that keep a metric.

    Bisection takes the metric to grow with the number of edges.  Where it does not,
    this is one crossing of several.

    Args:
      metric_at: kept edges ``[R', R]`` bool to the metric, as
        :func:`edge_ablation` with everything else given.
      edges: ``[R', R]`` strengths, from :func:`toyfeat.decompose.interaction_edges`.
      least: what the metric must reach.

    Returns:
      How many edges, or one more than there are if all of them do not do.

    Raises:
      ValueError: if an edge, the metric or ``least`` is NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> strengths = jnp.array([[4.0, 1.0], [3.0, 2.0]])
      >>> metric = lambda kept: jnp.where(kept, strengths, 0.0).sum()
      >>> edges_needed(metric, strengths, least=6.5)
      2
    """
    check_function("edges_needed", "metric_at", metric_at, "of kept edges")
    edges = as_floats("edges_needed", "edges", edges)
    least = float(check_number("edges_needed", "least", least, finite=False))
    if edges.ndim != 2 or jnp.isnan(edges).any():
        raise ValueError(
            "edges_needed: edges must be strengths [R', R] without NaN, got shape "
            f"{edges.shape} with {int(jnp.isnan(edges).sum())} NaN; look at the "
            "model's values"
        )
    # The place of every edge in the order of strength.
    order = jnp.argsort(-edges.ravel())
    place = jnp.zeros(edges.size, jnp.int32).at[order].set(jnp.arange(edges.size))

    def is_enough(count: int) -> bool:
        value = metric_at((place < count).reshape(edges.shape))
        if np.isnan(np.asarray(value)).any():
            raise ValueError(
                f"edges_needed: metric_at must return numbers, got NaN for {count} "
                "edges; look at the model's values"
            )
        return bool(value >= least)

    # Bisect with enough(high) and not enough(low - 1) throughout; one more than all
    # edges stands for "never".
    low, high = 0, edges.size + 1
    while low < high:
        middle = (low + high) // 2
        if middle > edges.size or is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _check_end(name: str, end: Any) -> tuple[str, Basis]:
    """Return a site and its basis, or raise."""
    pair = isinstance(end, tuple) and len(end) == 2
    if not pair or not isinstance(end[0], str) or not isinstance(end[1], Basis):
        raise TypeError(
            f"edge_ablation: {name} must be a pair of a site and its Basis, got "
            f"{type(end).__name__}; pass (site, basis)"
        )
    return end


def _masked(basis: Basis, mask: Array) -> Callable[[Array], Array]:
    """Make a probe that decodes the masked coordinates of an activation."""

    def probe(act: Array) -> Array:
        # A code of 0 decodes to the mean of the basis.
        codes = encode(basis, act)
        return decode(basis, codes * jnp.broadcast_to(mask, codes.shape)).astype(
            act.dtype
        )

    return probe
