"""What is known of a site: its store, its second moments, its bases."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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
from toyfeat.tap import readouts
from toyfeat.types import Array, Basis, Moments

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
    weights = path.with_name(f"{path.name}.weights")
    mine, supply = fingerprint(run.model.params), of_model(run, site)
    if path.exists() and weights.exists():
        if weights.read_text(encoding="utf-8") != mine:
            raise ValueError(_other_weights(path, run.job))
        like = jax.eval_shape(lambda: store_moments_like(supply.dim))
        return load_tree(path, like)
    say(f"{site}: {run.tokens.size:,} tokens straight from the model")
    stats = moments_of(supply.chunks(), supply.dim)
    save_tree(path, stats)
    write_whole(weights, mine)
    return stats


def supply_of(run: Opened, site: str) -> Supply:
    """Activations and gradients of a site, of the very weights that are open."""
    if run.job.source != "store":
        return of_model(run, site)
    store, _ = store_of(run.job, site)
    if store.metadata["weights"] != fingerprint(run.model.params):
        raise ValueError(_other_weights(store.path, run.job))
    return of_store(store, run.job.train.batch)


def _other_weights(path: Path, job: Job) -> str:
    return (
        f"job: {path} was written by other weights than those of {job.model}; give the "
        "model it was, or another folder as out"
    )


def bases_of(
    run: Opened, site: str, stats: Moments, names: Sequence[str]
) -> dict[str, Basis]:
    """Bases of a site by name, of :class:`toyfeat.language.Decompose`."""
    width = len(stats.mean)

    def random() -> Basis:
        key = jax.random.key(0)
        rows = jnp.linalg.qr(jax.random.normal(key, (width, width)))[0]
        return pca(stats, width)._replace(
            readers=rows, writers=rows.T, spectrum=jnp.ones(width)
        )

    made: dict[str, Callable[[], Basis]] = {
        "pca": lambda: pca(stats, width),
        "gradient pca": lambda: gradient_pca(stats, width),
        "joint pca": lambda: joint_pca(stats, width),
        "lib": lambda: _interaction(run, site),
        "random": random,
    }
    return {name: made[name]() for name in names}


def _interaction(run: Opened, site: str) -> Basis:
    """The local interaction basis towards the logits, over the training text."""
    batch = min(run.job.collect.batch, len(run.tokens))

    def batches() -> Iterator[Array]:
        for start in range(0, len(run.tokens) - batch + 1, batch):
            yield jnp.asarray(run.tokens[start : start + batch])

    return local_interaction_basis(
        probed_of(run),
        run.model.params,
        batches,
        sites=[site],
        sources=run.job.decompose.sources,
        key=jax.random.key(run.job.collect.seed),
        mask=lambda tokens: jnp.asarray(readouts.next_token_loss(tokens).mask),
    )[site]
