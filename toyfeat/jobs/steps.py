"""Run the steps of a job on a language model; each goes on where it stopped."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data.store import Store, store_size
from toyfeat.jobs.config import GRADIENT_BASES, Job
from toyfeat.jobs.evaluate import (
    check_attributions,
    compute_bases,
    methods_from_bases,
    methods_from_run,
    open_held_out,
    score_methods,
)
from toyfeat.jobs.results import (
    Rows,
    Run,
    check_gradients,
    claim_folder,
    finished_runs,
    is_finished,
    list_runs,
    require_collected,
    require_store,
)
from toyfeat.jobs.several import claim_together, training_mesh
from toyfeat.jobs.sites import Site, open_site, open_training_taps
from toyfeat.jobs.taps import (
    TapSource,
    open_moments,
    verify_once,
)
from toyfeat.jobs.train import train_one, train_together
from toyfeat.jobs.workspace import (
    Log,
    Workspace,
    num_readouts,
    probed_from,
    provenance,
    readout_from,
    site_width,
)
from toyfeat.lm.collect import collect, store_moments, tap_windows
from toyfeat.processes import gather, num_processes, process_index, together

_BASELINES = "pca", "gradient pca", "joint pca", "random"
_CHECKED_BASELINES = "pca", "random"  # an upper and a lower bound of what is linear


def collect_taps(
    work: Workspace,
    report: Callable[[int, int], None] = lambda done, total: None,
    log: Log = print,
) -> dict[str, Store]:
    """Store activations and gradients of the training text, and their moments.

    Args:
      work: from :func:`toyfeat.jobs.workspace.open_job`.
      report: called with the tokens done and all of them.
      log: called with a line if moments were damaged.

    Returns:
      Site to store.

    Raises:
      ValueError: for a job without a store, or one whose store is of other settings or
        damaged.
    """
    job, settings = work.job, work.job.collect
    require_store(job)
    stores = collect(
        probed_from(work),
        work.model.params,
        work.tokens,
        settings.sites,
        claim_together(job, "collect") / "stores",
        readout=readout_from(job),
        batch=settings.batch,
        dtype=settings.dtype,
        rows_per_shard=settings.rows_per_shard,
        massive=settings.massive,
        metadata=provenance(work),
        report=report,
        several=num_processes() > 1,
    )
    # Shards of earlier calls may have been damaged since: moments are of whole ones.
    with together("job"):
        for site, store in stores.items() if process_index() == 0 else ():
            verify_once(store)
            open_moments(job, site, store.dim, partial(store_moments, store), log)
    return stores


def describe_size(work: Workspace) -> str:
    """Say how many tokens collecting stores, and how much disk that takes."""
    settings, config = work.job.collect, work.model.config
    total = sum(
        store_size(
            work.tokens.size,
            dim=site_width(config, site),
            readouts=num_readouts(work.job) or None,
            dtype=settings.dtype,
            rows_per_shard=settings.rows_per_shard,
        )
        for site in settings.sites
    )
    return (
        f"{work.tokens.size:,} tokens at {len(settings.sites)} sites, "
        f"{total / 1e6:,.0f} MB"
    )


def measure_seconds_per_token(work: Workspace) -> float:
    """Time one batch of collecting, after one that compiles what collecting runs."""
    settings = work.job.collect
    tap_sites = partial(
        tap_windows,
        probed_from(work),
        settings.sites,
        readout_from(work.job),
        settings.massive,
    )
    tokens = jnp.asarray(work.tokens[: settings.batch])
    times = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(tap_sites(work.model.params, tokens, 0))
        times.append(time.perf_counter() - start)
    return times[-1] / tokens.size


def decompose_job(work: Workspace, log: Log = print) -> list[dict[str, Any]]:
    """Compute bases of every site, their spectra, and scores of their first directions.

    Args:
      work: a job that was collected, or one without a store.
      log: called with a line for every result.

    Returns:
      Rows, also in ``decompose.jsonl``: a basis with its spectrum and its participation
      ratio, and the scores of its first directions.

    Raises:
      FileNotFoundError: if nothing was collected.
      ValueError: if a store is of other weights.
    """
    job = work.job
    missing = [name for name in job.decompose.bases if name in GRADIENT_BASES]
    if missing and not num_readouts(job):
        raise ValueError(
            f"job: decompose.bases must be without {' and '.join(GRADIENT_BASES)} "
            f"where collect.readout is 'none', got {missing[0]!r}; name the bases, or "
            "collect with another readout"
        )
    for name in job.collect.sites:
        require_collected(job, name)
    folder = claim_folder(job, "collect", "decompose", "evaluate")
    rows = Rows(folder / "decompose.jsonl")
    for name in job.collect.sites:
        _decompose_site(open_site(work, name, log), rows, log)
    return rows.rows


def _decompose_site(site: Site, rows: Rows, log: Log) -> None:
    """Add the rows of a site that are missing."""
    settings = site.work.job.decompose
    ranks = {f", {rank}": rank for rank in settings.ranks if rank < site.width}

    def is_done(basis: str) -> bool:
        keys: list[dict[str, Any]] = [{"site": site.name, "basis": basis}]
        keys += [
            {"site": site.name, "method": f"{basis}{suffix}", "what": "scores"}
            for suffix in ranks
        ]
        return all(rows.has(key) for key in keys)

    bases = compute_bases(site, [name for name in settings.bases if not is_done(name)])
    for name, basis in bases.items():
        values = np.asarray(basis.spectrum, np.float64)
        energy = float(np.sum(values**2))  # 0 where all gradients are
        ratio = float(values.sum() ** 2 / energy) if energy > 0 else float("nan")
        if rows.add(
            {"site": site.name, "basis": name},
            {"spectrum": values.tolist(), "participation": ratio},
        ):
            log(f"{site.name}, {name}: participation ratio {ratio:.1f} of {site.width}")
    score_methods(open_held_out(site), methods_from_bases(bases, ranks), rows, log)


def train_job(
    job: Job,
    log: Log = print,
    *,
    open_source: Callable[[Job], TapSource] = open_training_taps,
) -> None:
    """Train every dictionary of a job that is not finished.

    A job with a store is trained without opening its model.

    Args:
      job: that was collected, or one without a store.
      log: called with a line for every dictionary.
      open_source: opens what is trained on.  Where the model of a job without a store
        is open already, ``lambda job: open_taps(work, job.site)`` trains on that one
        instead of reading it and hashing its weights once more.

    Raises:
      FileNotFoundError: if nothing was collected.
      ValueError: for a batch of a job without a store that is not of whole windows.
    """
    check_gradients(job)
    training_mesh(job)  # raises if there can be none
    folder = Path(job.out) / "train"
    runs = [r for r in list_runs(job.train) if not is_finished(folder, r)]
    # As the first of several processes sees the folder.
    names = gather([run.name for run in runs])[0]
    runs = [run for run in list_runs(job.train) if run.name in names]
    # A damaged store is refused even if nothing is left to train.
    source = open_source(job) if runs or job.source == "store" else None
    claim_together(job, "collect", "train")
    if source is None or not runs:
        return
    folder.mkdir(exist_ok=True)
    groups = [[run] for run in runs]
    if job.train.population:
        runs = sorted(runs, key=lambda run: run.label)  # stable
        groups = [list(group) for _, group in groupby(runs, lambda run: run.label)]
    for group in groups:
        _train_group(group, job, source, folder, log)


def _train_group(
    runs: Sequence[Run], job: Job, source: TapSource, folder: Path, log: Log
) -> None:
    """Train one dictionary, or a population of them, and log its last means."""
    start, last = time.perf_counter(), {}

    def keep_means(step: int, means: Any, *_: Any) -> None:
        last.update(means)

    if job.train.population:
        train_together(runs, job.train, source, folder, on_chunk=keep_means)
    else:
        train_one(runs[0], job.train, source, folder, on_chunk=keep_means)
    seconds = time.perf_counter() - start
    for i, run in enumerate(runs):
        means = ", ".join(
            f"{name} {float(np.ravel(last[name])[i]):.3g}"
            for name in ("fvu", "l0", "dead")
            if name in last
        )
        log(f"{run.name}: {means}, {seconds:.0f} s")


def evaluate_job(work: Workspace, log: Log = print) -> list[dict[str, Any]]:
    """Score every finished dictionary of a job, and bases of as many directions.

    Args:
      work: a job with trained dictionaries.
      log: called with a line for every result.

    Returns:
      Rows, also in ``evaluation.jsonl``.

    Raises:
      FileNotFoundError: if no dictionary is finished.
      ValueError: if the store is of other weights.
    """
    job = work.job
    require_collected(job, job.site)
    folder = claim_folder(job, "collect", "train", "evaluate")
    rows = Rows(folder / "evaluation.jsonl")
    runs = dict(finished_runs(job.train, folder / "train"))
    if not runs:
        raise FileNotFoundError(
            f"job: {job.out} has no finished dictionary; run toyfeat train first"
        )
    site = open_site(work, job.site, log)
    held = open_held_out(site)
    # Scores of all dictionaries, and of bases with as many directions as latents.
    methods = {}
    for run, features in runs.items():
        methods |= methods_from_run(run, features, site)
    ranks = {f"-k{k}": k for k in job.train.ks if k <= site.width}
    methods |= methods_from_bases(compute_bases(site, _baselines(job)), ranks)
    score_methods(held, methods, rows, log)
    # Attributions, which take longest, of the middle k first.
    middle = job.train.ks[len(job.train.ks) // 2]
    order = sorted(runs, key=lambda run: run.k != middle)  # stable
    names = [run.name for run in order]
    names += [f"{name}-k{middle}" for name in _CHECKED_BASELINES]
    if job.evaluate.uniform + job.evaluate.largest:
        checked = {name: methods[name] for name in names if name in methods}
        check_attributions(held, checked, rows, log)
    return rows.rows


def _baselines(job: Job) -> list[str]:
    """Name the bases that dictionaries are compared with, of what was collected."""
    without = () if num_readouts(job) else GRADIENT_BASES
    return [name for name in _BASELINES if name not in without]
