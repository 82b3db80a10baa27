"""Scores of decompositions of toys: importances, reconstructions, parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from partition_toys import PROBE, TOYS, batches_of

import toyfeat as ft
from toyfeat import metrics, partition
from toyfeat.metrics.partition import ALIVE

JUDGED = 4096
"""Fresh examples behind reconstructions and counts."""
TEST_SEED = 8


class Judged(NamedTuple):
    """A member of a population on the inputs that it is judged by.

    Attributes:
      alone: site to ``[F, C]``, importances of each feature alone.
      fresh: site to ``[B, C]``, importances of fresh examples.
      errors: kind to the error of the masked model.
    """

    alone: dict[str, jax.Array]
    fresh: dict[str, jax.Array]
    errors: dict[str, jax.Array]


def make_judge(name: str, split: partition.Decomposition) -> Callable[..., Judged]:
    """Compile what scores need of a member: ``(target, params) -> Judged``."""
    toy = TOYS[name]
    family = toy.preset.importance_of(split)
    taps = batches_of(name, jax.random.key(TEST_SEED), JUDGED)(0)

    def judge(target: Any, params: Any) -> Judged:
        member = split, family, target, params
        alone = partition.importances(*member, PROBE * jnp.eye(toy.features))[1]
        fresh = partition.importances(*member, taps.acts)[1]
        key = jax.random.key(TEST_SEED)
        errors = partition.reconstructions(key, *member, taps.acts, taps.weights)
        return Judged(alone, fresh, errors)

    return jax.jit(judge)


def member_of(state: ft.TrainState, member: int) -> tuple[Any, Any]:
    """Return the target and the parameters of a member."""
    both = state.running["target"], state.params
    return jax.tree.map(lambda x: np.asarray(x)[member], both)


def score(
    name: str, judge: Callable[..., Judged], state: ft.TrainState, member: int
) -> dict[str, Any]:
    """Score one member of a population."""
    toy = TOYS[name]
    target, params = member_of(state, member)
    judged: Judged = jax.device_get(judge(target, params))
    figures: dict[str, Any] = {}
    if not name.startswith("residual"):
        parts = params["components"]["weight"]
        cosines = metrics.mean_max_cosine(parts["V"], parts["U"], target["weight"])
        figures |= {"mmcs": cosines.mmcs, "ml2r": cosines.ml2r}
        # A part that is never in use can be the nearest by chance, and short.
        used = np.asarray(judged.fresh["weight"] > ALIVE).any(0)
        if used.any():
            v, u = parts["V"][:, used], parts["U"][used]
            cosines = metrics.mean_max_cosine(v, u, target["weight"])
            figures |= {"mmcs alive": cosines.mmcs, "ml2r alive": cosines.ml2r}
    for tolerance in (0.1, 0.2):
        for site in toy.identity:
            error = metrics.identity_ci_error(judged.alone[site], tolerance=tolerance)
            figures[f"identity_error {site} {tolerance}"] = error
        for site, k in toy.dense.items():
            values = judged.alone[site]
            error = metrics.dense_ci_error(
                values, min(k, values.shape[1]), tolerance=tolerance
            )
            figures[f"dense_error {site} {tolerance}"] = error
    figures |= {f"error {kind}": float(e) for kind, e in judged.errors.items()}
    # The last row stands for the inputs of zeros.
    weights = batches_of(name, jax.random.key(TEST_SEED), JUDGED)(0).weights
    counts = [metrics.component_l0(g, weights=weights) for g in judged.fresh.values()]
    alive = {site: metrics.alive_components(g) for site, g in judged.fresh.items()}
    return figures | {"l0": sum(counts), "alive": alive}


def correct(name: str, figures: dict[str, Any]) -> bool:
    """Tell whether importances are those of the known mechanisms, at tolerance .1."""
    sites = TOYS[name].identity
    return all(figures[f"identity_error {site} 0.1"] == 0 for site in sites)
