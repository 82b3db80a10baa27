"""PCA and the local interaction basis on a transformer that adds modulo a number."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp

import toyfeat as tf
from toyfeat.models import modular
from toyfeat.models.modular import Modular
from toyfeat.tap import site_shapes
from toyfeat.types import Array, Basis, Params


def compared(
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

    Features are removed on all pairs, from the weakest on; edges on ``num`` of
    them, between the features that are needed.

    Args:
      key: for the choice of pairs.
      task: the transformer's sizes.
      params: its parameters.
      tolerance: how much accuracy may be lost.
      num: pairs that edges are removed on.
      batch: pairs per batch.
      report: called with a line of progress.

    Returns:
      One row per basis and site: ``features``, the fewest directions;
      ``edges``, the fewest edges to the next site.
    """
    inputs, labels = modular.pairs(task)
    order = jax.random.permutation(key, len(inputs))
    shuffled = inputs[order]

    def batches() -> Iterator[Array]:
        return (shuffled[i : i + batch] for i in range(0, len(inputs), batch))

    probed, sites = modular.probed(), modular.SITES
    found = {
        "PCA": _principal(params, batches),
        "LIB": tf.local_interaction_basis(probed, params, batches, sites=sites),
    }
    some = shuffled[:num], labels[order][:num]
    rows = []
    for name, bases in found.items():
        cut = {
            site: _needed(params, inputs, labels, site, basis, tolerance)
            for site, basis in bases.items()
        }
        edges = tf.interaction_edges(probed, params, batches, cut)
        for (site, after), strengths in edges.items():
            metric = partial(
                _accuracy_with_edges,
                params=params,
                inputs=some[0],
                labels=some[1],
                source=cut[site],
                target=cut.get(after),
                site=site,
                after=None if after == "outputs" else after,
            )
            least = float(metric(jnp.ones(strengths.shape, bool))) - tolerance
            row = {
                "basis": name,
                "site": site,
                "features": len(cut[site].writers),
                "next": after,
                "edges": tf.edges_needed(metric, strengths, least=least),
                "of": int(strengths.size),
            }
            report(f"{name} {site}: {row['features']} features, {row['edges']} edges")
            rows.append(row)
    return rows


def means(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the mean features and edges of some models' rows."""

    def mean(basis: str, site: str, figure: str) -> float:
        here = [row for row in rows if (row["basis"], row["site"]) == (basis, site)]
        return fmean(row[figure] for row in here)

    lines = [f"{'site':<12}features PCA  LIB    edges PCA    LIB"]
    lines += [
        f"{site:<12}{mean('PCA', site, 'features'):>12.1f}"
        f"{mean('LIB', site, 'features'):>5.1f}"
        f"{mean('PCA', site, 'edges'):>13.1f}{mean('LIB', site, 'edges'):>7.1f}"
        for site in modular.SITES
    ]
    return "\n".join(lines)


def _principal(
    params: Params, batches: Callable[[], Iterator[Array]]
) -> dict[str, Basis]:
    """Principal components of the activations at all sites."""
    widths = {
        site: shape.shape[-1]
        for site, shape in site_shapes(
            modular.probed(), params, next(batches())
        ).items()
    }
    streams = {site: tf.moments(width, grads=False) for site, width in widths.items()}
    states = {site: stream.init() for site, stream in streams.items()}

    @jax.jit
    def folded(states: Any, inputs: Array) -> Any:
        taps = tf.tap(
            modular.probed(), params, inputs, sites=list(states), readout=None
        )
        return {s: streams[s].update(state, taps[s]) for s, state in states.items()}

    for inputs in batches():
        states = folded(states, inputs)
    return {
        site: tf.pca(streams[site].finish(states[site]), widths[site])
        for site in modular.SITES
    }


def _needed(
    params: Params,
    inputs: Array,
    labels: Array,
    site: str,
    basis: Basis,
    tolerance: float,
) -> Basis:
    """The fewest directions with accuracy within the tolerance of all of them."""

    def accuracy(outputs: Array) -> Array:
        return jnp.mean(jnp.argmax(outputs, -1) == labels)

    full = float(accuracy(modular.probed()(params, inputs, {})[0]))
    rank = int(basis.diagnostics.rank)
    for start in range(0, rank + 1, 8):  # few are needed: stop at the first that do
        ranks = [min(start + i, rank) for i in range(8)]
        curve = tf.ablation_curve(
            modular.probed(),
            params,
            inputs,
            accuracy,
            site=site,
            basis=basis,
            ranks=ranks,
        )
        for kept, value in zip(ranks, curve.tolist(), strict=True):
            if value >= full - tolerance:
                return _leading(basis, max(kept, 1))
    return _leading(basis, rank)


def _leading(basis: Basis, rank: int) -> Basis:
    return basis._replace(
        readers=basis.readers[:, :rank],
        writers=basis.writers[:rank],
        spectrum=basis.spectrum[:rank],
    )


@partial(jax.jit, static_argnames=("site", "after"))
def _accuracy_with_edges(
    kept: Array,
    *,
    params: Params,
    inputs: Array,
    labels: Array,
    source: Basis,
    target: Basis | None,
    site: str,
    after: str | None,
) -> Array:
    onto = None if after is None or target is None else (after, target)
    return tf.edge_ablation(
        modular.probed(),
        params,
        inputs,
        lambda outputs: jnp.mean(jnp.argmax(outputs, -1) == labels),
        source=(site, source),
        target=onto,
        kept=kept,
    )
