"""The steps of a job on a language model, each of which goes on where it stopped."""

import time
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint import save_tree
from toyfeat.data.store import Store
from toyfeat.decompose.second_moments import covariance
from toyfeat.interop import load_saelens
from toyfeat.language.collecting import collect, site_folder, store_moments
from toyfeat.language.contexts import Latent, latents_of, of_acts, of_grads
from toyfeat.language.evaluating import decomposed, evaluated
from toyfeat.language.jobs import Job
from toyfeat.language.opening import (
    Opened,
    about,
    asked_of,
    opened,
    probed_of,
    seconds_per_token,
    size_of,
)
from toyfeat.language.results import own_folder
from toyfeat.language.site import Say, left_out, stats_of, store_of, supply_of
from toyfeat.language.supply import IN_MEMORY, of_store
from toyfeat.language.training import (
    finished,
    is_finished,
    runs_of,
    train_one,
    train_together,
)

__all__ = [
    "Opened",
    "check_stored",
    "collected",
    "decomposed",
    "evaluated",
    "left_out",
    "looked_at",
    "opened",
    "seconds_per_token",
    "size_of",
    "trained",
]


def collected(
    run: Opened, report: Callable[[int, int], None] = lambda done, rows: None
) -> dict[str, Store]:
    """Store activations and gradients of the training text, and their moments.

    Args:
      run: from :func:`opened`.
      report: called with the tokens done and all of them.

    Returns:
      Site to store.

    Raises:
      ValueError: for a job without a store, or one whose store is of other settings.
    """
    check_stored(run.job)
    given, folder = run.job.collect, own_folder(run.job, "collect")
    stores = collect(
        probed_of(run),
        run.model.params,
        run.tokens,
        given.sites,
        folder / "stores",
        readout=asked_of(run.job),
        batch=given.batch,
        dtype=given.dtype,
        rows_per_shard=given.rows_per_shard,
        massive=given.massive,
        metadata=about(run),
        report=report,
    )
    for site, store in stores.items():
        path = folder / "moments" / site_folder(site)
        if not path.exists():
            save_tree(path, store_moments(store))
    return stores


def check_stored(job: Job) -> None:
    """Whether there is anything to collect.

    Raises:
      ValueError: for a job without a store.
    """
    if job.source != "store":
        raise ValueError(
            f"job: source is {job.source!r}, so that nothing is stored; leave this "
            'step out, or set source = "store"'
        )


def trained(job: Job, say: Say = print) -> None:
    """Train every dictionary of a job that is not finished.

    Args:
      job: with its store collected, or without one.
      say: told of every one.

    Raises:
      FileNotFoundError: if nothing was collected.
      ValueError: for a batch of a job without a store that is not of whole windows.
    """
    into = Path(job.out) / "train"
    runs = [r for r in runs_of(job.train) if not is_finished(into, r)]
    if job.source == "store":
        supply = of_store(store_of(job, job.site)[0], job.train.batch)
    elif runs:
        supply = supply_of(opened(job), job.site)
    own_folder(job, "collect", "train")
    if not runs:
        return
    into.mkdir(exist_ok=True)
    groups = [[run] for run in runs]
    if job.train.population:
        runs = sorted(runs, key=lambda run: run.label)  # stable
        groups = [list(some) for _, some in groupby(runs, lambda run: run.label)]
    for some in groups:
        begun, last = time.perf_counter(), {}

        def keep(step: int, means: Any, *_: Any, last: dict = last) -> None:
            last.update(means)

        if job.train.population:
            train_together(some, job.train, supply, into, on_chunk=keep)
        else:
            train_one(some[0], job.train, supply, into, on_chunk=keep)
        seconds = time.perf_counter() - begun
        for i, run in enumerate(some):
            shown = ", ".join(
                f"{name} {float(np.ravel(last[name])[i]):.3g}"
                for name in ("fvu", "l0", "dead")
                if name in last
            )
            say(f"{run.name}: {shown}, {seconds:.0f} s")


def looked_at(run: Opened, *, num: int = 24) -> dict[str, list[Latent]]:
    """Latents of the finished dictionaries of a job, of one seed and number of codes.

    Args:
      run: with dictionaries trained.
      num: latents of each.

    Returns:
      Name to :class:`Latent`, those with the largest effects.
    """
    job, site = run.job, run.job.site
    stats, supply = stats_of(run, site), supply_of(run, site)
    spread, mean = covariance(stats), jnp.asarray(stats.mean)
    first = job.train.seeds[0], job.train.codes[len(job.train.codes) // 2]
    residual, chunks = not site.endswith("mlp_hidden"), supply.chunks
    if job.source != "store" and supply.size * run.tokens.size <= IN_MEMORY:
        held = [*supply.chunks()]  # the model is run once
        chunks = partial(iter, held)
    found = {}
    for one, features in finished(job.train, Path(job.out) / "train"):
        if (one.seed, one.k) != first:
            continue
        sae, params = load_saelens(features)
        described = of_acts(sae, params)
        if one.kind == "gradients":
            described = of_grads(sae, params, mean, spread)
        found[one.name] = latents_of(
            described, chunks, run.tokens, run.model, residual=residual, num=num
        )
    return found
