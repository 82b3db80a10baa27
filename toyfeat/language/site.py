"""What is known of a site: its store, its second moments, its bases."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint import load_tree, save_tree
from toyfeat.checkpoint.files import write_whole
from toyfeat.data.store import Store, open_store, shard_taps
from toyfeat.decompose import (
    gradient_pca,
    joint_pca,
    local_interaction_basis,
    pca,
)
from toyfeat.language.collecting import fingerprint, moments_of, site_folder
from toyfeat.language.jobs import Job
from toyfeat.language.live import of_model
from toyfeat.language.opening import Opened, probed_of
from toyfeat.language.supply import Supply, of_store
from toyfeat.types import Acts, Array, Basis, Moments, Params

Say = Callable[[str], None]


def left_out(store: Store) -> int:
    """Tokens between the first and the last of a window that do not count.

    Their activations are massive (``collect.massive``).
    """
    num = 0
    for index in range(len(store.shards)):
        num += int(np.sum(np.asarray(shard_taps(store, index).weights) == 0))
    return num - 2 * (store.rows // store.metadata["length"])


def store_of(job: Job, site: str) -> tuple[Store, Moments]:
    """A site's store and moments.

    Raises:
      FileNotFoundError: if nothing was collected there.
    """
    check_collected(job, site)
    folder, name = Path(job.out), site_folder(site)
    store = open_store(folder / "stores" / name)
    shapes = jax.eval_shape(lambda: store_moments_like(store.dim))
    return store, load_tree(folder / "moments" / name, shapes)


def check_collected(job: Job, site: str) -> None:
    """Whether there is what a step after collecting wants.

    Raises:
      FileNotFoundError: if there is not.
    """
    path = Path(job.out) / "moments" / site_folder(site)
    if job.source == "store" and not path.exists():
        raise FileNotFoundError(
            f"job: {job.out} has nothing of {site!r} yet; run scripts/collect.py first"
        )


def store_moments_like(dim: int) -> Moments:
    """The shape of a store's moments."""
    zeros = jnp.zeros((dim, dim))
    return Moments(jnp.zeros(()), zeros[0], zeros, zeros[0], zeros)


def stats_of(run: Opened, site: str, say: Say = print) -> Moments:
    """Second moments of a site, of the very weights that are open.

    Raises:
      FileNotFoundError: if nothing was collected, of a job with a store.
      ValueError: if what was collected is of other weights.
    """
    if run.job.source == "store":
        stats = store_of(run.job, site)[1]
        supply_of(run, site)
        return stats
    path = Path(run.job.out) / "moments of the model" / site_folder(site)
    supply = supply_of(run, site)
    if path.exists():
        like = jax.eval_shape(lambda: store_moments_like(supply.dim))
        return load_tree(path, like)
    say(f"{site}: {run.tokens.size:,} tokens straight from the model")
    stats = moments_of(supply.chunks(), supply.dim)
    save_tree(path, stats)
    return stats


def supply_of(run: Opened, site: str) -> Supply:
    """Activations and gradients of a site, of the very weights that are open.

    A job without a store keeps which weights and text it was begun with.

    Raises:
      FileNotFoundError: if nothing was collected, of a job with a store.
      ValueError: if what is there is of other weights or another text, or a batch of a
        job without a store is not of whole windows.
    """
    if run.job.source != "store":
        supply = of_model(run, site)
        _check_same(run, supply.about["weights"])
        return supply
    store, _ = store_of(run.job, site)
    mine = fingerprint(run.model.params)
    _check_weights(run, store.path, store.metadata["weights"], mine)
    return of_store(store, run.job.train.batch)


def _check_same(run: Opened, weights: str) -> None:
    path = Path(run.job.out) / "model and text.json"
    text = np.ascontiguousarray(run.tokens, np.int32)
    mine = {"weights": weights, "tokens": hashlib.sha256(text.data).hexdigest()}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mine) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    _check_weights(run, path.parent, found["weights"], weights)
    if found["tokens"] != mine["tokens"]:
        raise ValueError(
            f"job: {path.parent} has work on another text than {run.job.text} is now; "
            "give another folder as out"
        )


def _check_weights(run: Opened, path: Path, found: str, mine: str) -> None:
    if found != mine:
        raise ValueError(
            f"job: {path} was written by other weights than those of {run.job.model} "
            f"in {run.job.weights}; give the model it was, or another folder as out"
        )


def bases_of(
    run: Opened, site: str, stats: Moments, names: Sequence[str]
) -> dict[str, Basis]:
    """Bases of a site by name, of :class:`toyfeat.language.Decompose`."""
    width = len(stats.mean)
    plain = cache(lambda: pca(stats, width))
    rows = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (width, width)))[0]
    random = {"readers": rows, "writers": rows.T, "spectrum": jnp.ones(width)}
    made: dict[str, Callable[[], Basis]] = {
        "pca": plain,
        "gradient pca": lambda: gradient_pca(stats, width),
        "joint pca": lambda: joint_pca(stats, width),
        "lib": lambda: _interaction(run, site),
        "random": lambda: plain()._replace(**random),
    }
    return {name: made[name]() for name in names}


def _interaction(run: Opened, site: str) -> Basis:
    """The local interaction basis towards the logits, over the tokens that count."""
    probed, batch = probed_of(run), min(run.job.collect.batch, len(run.tokens))
    chunks = supply_of(run, site).chunks()
    weights = np.concatenate([taps.weights for taps in chunks])
    weights = weights.reshape(run.tokens.shape)

    def batches() -> Iterator[tuple[Array, Array]]:
        for start in range(0, len(run.tokens), batch):
            rows = np.arange(start, start + batch)  # the last batch is filled up
            there = (rows < len(run.tokens))[:, None]
            rows = rows % len(run.tokens)
            yield jnp.asarray(run.tokens[rows]), jnp.asarray(weights[rows] * there)

    def alone(params: Params, inputs: Any, probes: Any) -> tuple[Any, Acts]:
        return probed(params, inputs[0], probes)

    return local_interaction_basis(
        alone,
        run.model.params,
        batches,
        sites=[site],
        sources=run.job.decompose.sources,
        key=jax.random.key(run.job.collect.seed),
        mask=lambda inputs: inputs[1],
    )[site]
