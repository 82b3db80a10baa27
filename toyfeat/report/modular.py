"""PCA and the local interaction basis on a transformer that adds modulo a number."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import toyfeat as tf
from toyfeat.models import modular
from toyfeat.models.modular import Modular
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
    probed, sites = modular.probed(), modular.SITES

    def batches() -> Iterator[Array]:
        shuffled = inputs[order]
        return (shuffled[i : i + batch] for i in range(0, len(inputs), batch))

    lib = tf.local_interaction_basis(probed, params, batches, sites=sites)
    found = {"PCA": _principal(params, batches, sites), "LIB": lib}
    some, theirs = inputs[order][:num], labels[order][:num]
    rows = []
    for name, bases in found.items():
        needed = {
            site: _features_needed(params, inputs, labels, site, bases[site], tolerance)
            for site in sites
        }
        report(f"{name}: features needed {needed}")
        cut = {site: _leading(bases[site], needed[site]) for site in sites}
        edges = tf.interaction_edges(probed, params, batches, cut)
        for (site, after), strengths in edges.items():
            metric = partial(
                _accuracy_with_edges,
                params=params,
                inputs=some,
                labels=theirs,
                source=cut[site],
                target=cut.get(after),
                site=site,
                after=None if after == "outputs" else after,
            )
            least = float(metric(jnp.ones(strengths.shape, bool))) - tolerance
            count = tf.edges_needed(metric, strengths, least=least)
            rows.append(
                {
                    "basis": name,
                    "site": site,
                    "features": needed[site],
                    "next": after,
                    "edges": count,
                    "of": int(strengths.size),
                }
            )
            report(f"{name}: {site} -> {after}: {count} of {strengths.size} edges")
    return rows


def _principal(
    params: Params, batches: Callable[[], Iterator[Array]], sites: tuple[str, ...]
) -> dict[str, Basis]:
    states: dict[str, Any] = {}

    @jax.jit
    def taps_of(inputs: Array) -> Any:
        return tf.tap(modular.probed(), params, inputs, sites=sites, readout=None)

    for inputs in batches():
        for site, taps in taps_of(inputs).items():
            acc = tf.moments(taps.acts.shape[1], grads=False)
            states[site] = acc.update(states.get(site, acc.init()), taps)
    acc = tf.moments(1, grads=False)
    width = {site: state.acts.mean.high.shape[0] for site, state in states.items()}
    return {site: tf.pca(acc.finish(states[site]), width[site]) for site in sites}


def _features_needed(
    params: Params,
    inputs: Array,
    labels: Array,
    site: str,
    basis: Basis,
    tolerance: float,
) -> int:
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
                return max(kept, 1)
    return rank


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
