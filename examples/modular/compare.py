"""Features and edges that PCA and the local interaction basis need.

Compared on a transformer that adds modulo a number.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp

import toyfeat as ft
from examples.modular import network
from examples.modular.network import SITES, Modular
from toyfeat.decompose import interaction_edges, truncated
from toyfeat.tap import site_shapes
from toyfeat.types import Array, Basis, Params

_RANKS = 8  # ranks tried in one call; few directions are needed, so few calls are

Batches = Callable[[], Iterator[Array]]
"""A function that starts over all pairs, in batches."""


def compare_bases(
    key: Array,
    task: Modular,
    params: Params,
    *,
    tolerance: float = 1e-3,
    num: int = 4096,
    batch: int = 512,
    report: Callable[[str], Any] = lambda text: None,
) -> list[dict[str, Any]]:
    """Count the features and the edges that each basis needs.

    Features are removed on all pairs, weakest first; edges on ``num`` of them,
    between the features that are needed.

    Args:
      key: for the choice of pairs.
      task: sizes of the transformer.
      params: its parameters.
      tolerance: accuracy that may be lost.
      num: pairs on which edges are removed.
      batch: pairs per batch.
      report: called with a line of progress.

    Returns:
      A row per basis and site: ``features``, the fewest directions; ``edges``, the
      fewest edges to the ``next`` site, ``of`` all.
    """
    inputs, labels = network.pairs(task)
    order = jax.random.permutation(key, len(inputs))
    shuffled = inputs[order]
    subset = shuffled[:num], labels[order][:num]

    def batches() -> Iterator[Array]:
        return (shuffled[i : i + batch] for i in range(0, len(inputs), batch))

    bases_by_name = {
        "PCA": _pca_at_sites(params, batches),
        "LIB": ft.local_interaction_basis(
            network.probed(), params, batches, sites=SITES
        ),
    }
    rows = []
    for name, bases in bases_by_name.items():
        # The fewest directions at each site, then the fewest edges between those.
        truncated = {
            site: _fewest_directions(params, inputs, labels, site, basis, tolerance)
            for site, basis in bases.items()
        }
        for row in _edge_rows(params, subset, truncated, batches, tolerance):
            features, edges = row["features"], row["edges"]
            report(f"{name} {row['site']}: {features} features, {edges} edges")
            rows.append({"basis": name, **row})
    return rows


def _edge_rows(
    params: Params,
    subset: tuple[Array, Array],
    bases: dict[str, Basis],
    batches: Batches,
    tolerance: float,
) -> Iterator[dict[str, Any]]:
    """Count the fewest edges from each site to the next, strongest edges first."""
    inputs, labels = subset
    strengths_by_pair = interaction_edges(network.probed(), params, batches, bases)
    for (site, following), strengths in strengths_by_pair.items():
        accuracy = partial(
            _accuracy_with_edges,
            params=params,
            inputs=inputs,
            labels=labels,
            source=bases[site],
            target=bases.get(following),
            site=site,
            following=None if following == "outputs" else following,
        )
        least = float(accuracy(jnp.ones(strengths.shape, bool))) - tolerance
        yield {
            "site": site,
            "features": len(bases[site].writers),
            "next": following,
            "edges": ft.metrics.edges_needed(accuracy, strengths, least=least),
            "of": int(strengths.size),
        }


def mean_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the mean features and edges of several models as a table.

    Args:
      rows: from :func:`compare_bases`, of one model or of several.

    Returns:
      A heading, and a line per site.
    """

    def mean(basis: str, site: str, figure: str) -> float:
        return fmean(
            row[figure] for row in rows if (row["basis"], row["site"]) == (basis, site)
        )

    lines = [f"{'site':<12}features PCA  LIB    edges PCA    LIB"]
    lines += [
        f"{site:<12}{mean('PCA', site, 'features'):>12.1f}"
        f"{mean('LIB', site, 'features'):>5.1f}"
        f"{mean('PCA', site, 'edges'):>13.1f}{mean('LIB', site, 'edges'):>7.1f}"
        for site in SITES
    ]
    return "\n".join(lines)


def _pca_at_sites(params: Params, batches: Batches) -> dict[str, Basis]:
    """Compute principal components of the activations at all sites."""
    shapes = site_shapes(network.probed(), params, next(batches()))
    widths = {site: shape.shape[-1] for site, shape in shapes.items()}
    streams = {site: ft.moments(width, grads=False) for site, width in widths.items()}
    states = {site: stream.init() for site, stream in streams.items()}

    @jax.jit
    def update(states: Any, inputs: Array) -> Any:
        taps = ft.tap(
            network.probed(), params, inputs, sites=list(states), readout=None
        )
        return {s: streams[s].update(state, taps[s]) for s, state in states.items()}

    for inputs in batches():
        states = update(states, inputs)
    return {
        site: ft.pca(streams[site].finish(states[site]), widths[site]) for site in SITES
    }


def _fewest_directions(
    params: Params,
    inputs: Array,
    labels: Array,
    site: str,
    basis: Basis,
    tolerance: float,
) -> Basis:
    """Truncate a basis to the fewest directions that keep the accuracy."""

    def accuracy(outputs: Array) -> Array:
        return jnp.mean(jnp.argmax(outputs, -1) == labels)

    full = float(accuracy(network.probed()(params, inputs, {})[0]))
    rank = int(basis.diagnostics.rank)
    # Ranks in ascending order, some of them per call, until one is enough.
    for start in range(0, rank + 1, _RANKS):
        ranks = [min(start + i, rank) for i in range(_RANKS)]
        curve = ft.metrics.ablation_curve(
            network.probed(),
            params,
            inputs,
            accuracy,
            site=site,
            basis=basis,
            ranks=ranks,
        )
        for candidate, value in zip(ranks, curve.tolist(), strict=True):
            if value >= full - tolerance:
                return truncated(basis, max(candidate, 1))
    return truncated(basis, max(rank, 1))


@partial(jax.jit, static_argnames=("site", "following"))
def _accuracy_with_edges(
    mask: Array,
    *,
    params: Params,
    inputs: Array,
    labels: Array,
    source: Basis,
    target: Basis | None,
    site: str,
    following: str | None,
) -> Array:
    """Compute the accuracy with the edges of a mask only."""
    onto = None if following is None or target is None else (following, target)
    return ft.metrics.edge_ablation(
        network.probed(),
        params,
        inputs,
        lambda outputs: jnp.mean(jnp.argmax(outputs, -1) == labels),
        source=(site, source),
        target=onto,
        kept=mask,
    )
