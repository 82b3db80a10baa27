"""Open the sites of a job: taps of a store or straight from the model, and moments."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.decompose.second_moments import covariance
from toyfeat.files.atomic import write_whole
from toyfeat.files.json import field, read_json
from toyfeat.jobs.config import Job
from toyfeat.jobs.several import open_together
from toyfeat.jobs.taps import (
    TapSource,
    from_model,
    from_store,
    open_collected,
    open_moments,
)
from toyfeat.jobs.workspace import (
    Log,
    Workspace,
    cached_readout,
    num_readouts,
    open_job,
    probed_from,
    provenance,
    readout_from,
    site_width,
)
from toyfeat.lm.collect import ReadoutOf, tap_windows
from toyfeat.types import Array, Moments, Params, Taps


class Site(NamedTuple):
    """All that is known of a site of a model.

    Attributes:
      work: the job that it belongs to, with the model.
      name: ``"blocks_<i>/<name>"``.
      width: ``D``.
      stats: second moments of the training text.
      mean: ``[D]``, of the activations.
      covariance: ``[D, D]``, of the activations.
      taps: source of activations and gradients of the training text.
    """

    work: Workspace
    name: str
    width: int
    stats: Moments
    mean: Array
    covariance: Array
    taps: TapSource


def open_site(work: Workspace, name: str, log: Log = print) -> Site:
    """Open what is known of a site, made by the very weights that are open.

    Second moments of a job without a store are computed once and kept in its folder.

    Args:
      work: from :func:`open_job`.
      name: of a site of the job.
      log: called with a line if moments have to be computed.

    Returns:
      :class:`Site`.

    Raises:
      FileNotFoundError: if nothing was collected, of a job with a store.
      ValueError: as :func:`open_taps`.
    """
    source = open_taps(work, name)

    def compute() -> Moments:
        kind = "the store" if work.job.source == "store" else "the model"
        log(f"{name}: {work.tokens.size:,} tokens straight from {kind}")
        return source.moments()

    stats = open_moments(work.job, name, source.dim, compute, log)
    return Site(
        work=work,
        name=name,
        width=source.dim,
        stats=stats,
        mean=jnp.asarray(stats.mean),
        covariance=covariance(stats),
        taps=source,
    )


def open_taps(work: Workspace, name: str) -> TapSource:
    """Open the taps of a site, made by the very weights that are open.

    A job without a store keeps which weights and text it was begun with.

    Args:
      work: from :func:`open_job`.
      name: of a site of the job.

    Returns:
      :class:`TapSource`.

    Raises:
      FileNotFoundError: if nothing was collected, of a job with a store.
      ValueError: if what was kept is of other weights or another text, or a batch of a
        job without a store is not of whole windows.
    """
    if work.job.source == "model":
        source = model_taps(work, name)
        _claim_model_and_text(work)
        return source
    store = open_collected(work.job, name)
    weights = field(store.metadata, "weights", str, store.path / "store.json", "job")
    _check_weights(work, store.path, weights)
    return from_store(store, work.job.train.batch)


def open_training_taps(job: Job) -> TapSource:
    """Open the taps that the dictionaries of a job are trained on.

    A store is opened without the model; without a store, the model is opened.

    Raises:
      FileNotFoundError: if nothing was collected, of a job with a store.
      ValueError: if a shard is damaged, and as :func:`open_job` and :func:`open_taps`.
    """
    if job.source == "store":
        return open_together(job)
    return open_taps(open_job(job), job.site)


def model_taps(work: Workspace, name: str) -> TapSource:
    """Make taps of the training text straight from the model of a job."""
    job = work.job
    readout, num = readout_from(job), num_readouts(job)
    return _taps_of(work, name, work.tokens, readout, num, job.train.batch)


def held_out_taps(work: Workspace, name: str) -> TapSource:
    """Make taps of the held-out text, with gradients of the loss, from the model."""
    if not len(work.held_out):
        raise ValueError(
            "job: collect.held_out must be tokens of one window or more where "
            f"activations are collected alone, got {work.job.collect.held_out}; raise "
            "it, or collect with another readout"
        )
    # Nothing is trained on them, whatever train.batch is.
    tokens = work.held_out
    return _taps_of(work, name, tokens, cached_readout("loss"), 1, tokens.size)


def _taps_of(
    work: Workspace,
    name: str,
    tokens: np.ndarray,
    readout: ReadoutOf,
    num: int,
    train_batch: int,
) -> TapSource:
    """Make taps of windows straight from the model of a job."""
    job = work.job
    tap_site = partial(
        tap_windows, probed_from(work), (name,), readout, job.collect.massive
    )

    def tap_one(params: Params, tokens: Array, index: Array | int) -> Taps:
        return tap_site(params, tokens, index)[name]

    return from_model(
        tap_one,
        work.model.params,
        tokens,
        dim=site_width(work.model.config, name),
        readouts=num,
        metadata=provenance(work, name),
        train_batch=train_batch,
        chunk_windows=job.collect.batch,
    )


def _claim_model_and_text(work: Workspace) -> None:
    """Keep which weights and text the folder of a job without a store is of."""
    path = Path(work.job.out) / "model and text.json"
    text = hashlib.sha256(np.ascontiguousarray(work.tokens, np.int32).data).hexdigest()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"weights": work.weights, "tokens": text}) + "\n")
    saved = read_json(path, "job", advice="give another folder as out")
    _check_weights(work, path.parent, field(saved, "weights", str, path, "job"))
    if field(saved, "tokens", str, path, "job") != text:
        raise ValueError(
            f"job: {path.parent} has work on another text than {work.job.text} is now; "
            "give another folder as out"
        )


def _check_weights(work: Workspace, path: Path, saved: str) -> None:
    """Refuse what other weights than those of the open model wrote."""
    if saved != work.weights:
        raise ValueError(
            f"job: {path} was written by other weights than those of {work.job.model} "
            f"in {work.job.weights}; give the model it was, or another folder as out"
        )
