"""Compute the bases of a site."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.decompose import (
    gradient_pca,
    joint_pca,
    local_interaction_basis,
    pca,
)
from toyfeat.jobs.workspace import Site, probed_from
from toyfeat.types import Acts, Array, Basis, Params


def compute_bases(site: Site, names: Sequence[str]) -> dict[str, Basis]:
    """Compute bases of a site, with as many directions as it has.

    Args:
      site: from :func:`toyfeat.jobs.workspace.open_site`.
      names: of :data:`toyfeat.jobs.config.BASES`.

    Returns:
      Name to basis.
    """
    stats, width = site.stats, site.width
    compute_pca = cache(lambda: pca(stats, width))
    rows = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (width, width)))[0]
    random = {"readers": rows, "writers": rows.T, "spectrum": jnp.ones(width)}
    recipes: dict[str, Callable[[], Basis]] = {
        "pca": compute_pca,
        "gradient pca": lambda: gradient_pca(stats, width),
        "joint pca": lambda: joint_pca(stats, width),
        "lib": lambda: _interaction_basis(site),
        "random": lambda: compute_pca()._replace(**random),
    }
    return {name: recipes[name]() for name in names}


def _interaction_basis(site: Site) -> Basis:
    """Local interaction basis towards the logits, over the tokens that count."""
    work, tokens = site.work, site.work.tokens
    probed, batch = probed_from(work), min(work.job.collect.batch, len(tokens))
    weights = np.concatenate([taps.weights for taps in site.taps.chunks()])
    weights = weights.reshape(tokens.shape)

    def batches() -> Iterator[tuple[Array, Array]]:
        for start in range(0, len(tokens), batch):
            # The last batch is filled up with windows of weight 0.
            rows = np.arange(start, start + batch)
            is_window = (rows < len(tokens))[:, None]
            rows = rows % len(tokens)
            yield jnp.asarray(tokens[rows]), jnp.asarray(weights[rows] * is_window)

    def probed_tokens(params: Params, inputs: Any, probes: Any) -> tuple[Any, Acts]:
        return probed(params, inputs[0], probes)

    return local_interaction_basis(
        probed_tokens,
        work.model.params,
        batches,
        sites=[site.name],
        sources=work.job.decompose.sources,
        key=jax.random.key(work.job.collect.seed),
        mask=lambda inputs: inputs[1],
    )[site.name]
