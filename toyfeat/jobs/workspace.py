"""Open a job and its sites: model, text and taps."""

import hashlib
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.decompose.second_moments import covariance
from toyfeat.files.atomic import write_whole
from toyfeat.files.json import field, read_json
from toyfeat.jobs.config import Job
from toyfeat.jobs.hub import hub_commit, is_hub
from toyfeat.jobs.results import check_gradients, list_runs
from toyfeat.jobs.several import open_together
from toyfeat.jobs.sources import locate, read_texts
from toyfeat.jobs.taps import (
    TapSource,
    from_model,
    from_store,
    open_collected,
    open_moments,
)
from toyfeat.lm.collect import (
    ReadoutOf,
    fingerprint,
    make_readout,
    tap_windows,
)
from toyfeat.lm.split import check_site
from toyfeat.models.decoder import (
    Decoder,
    DecoderConfig,
    Pretrained,
    load_decoder,
    token_windows,
)
from toyfeat.tap import from_linen
from toyfeat.types import Array, Moments, Params, Probed, Taps

Log = Callable[[str], None]


class Workspace(NamedTuple):
    """A job with its model and its text.

    Attributes:
      job: settings.
      model: as it was released.
      tokens: ``[num, T]``, windows to train on.
      held_out: ``[num, T]``, windows of other texts.
      weights: :func:`toyfeat.lm.fingerprint` of the model's parameters.
    """

    job: Job
    model: Pretrained
    tokens: np.ndarray
    held_out: np.ndarray
    weights: str


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


def open_job(job: Job) -> Workspace:
    """Read the model of a job and cut its text into windows.

    Args:
      job: settings.

    Returns:
      :class:`Workspace`.

    Raises:
      FileNotFoundError: if the model or the text does not exist.
      ValueError: for a model that cannot be read or has no tokenizer, a site or a
        token that it does not have, or too little text.
    """
    path = locate(job.model)
    model = load_decoder(path, dtype=jnp.dtype(job.weights))
    if is_hub(job.model):  # the folder is named after a commit
        model = model._replace(name=hub_commit(job.model, path))
    _check_job(job, model)
    tokens, held_out = _cut_windows(job, model)
    return Workspace(
        job=job,
        model=model,
        tokens=tokens,
        held_out=held_out,
        weights=fingerprint(model.params),
    )


def _check_job(job: Job, model: Pretrained) -> None:
    """Refuse a job that its model cannot do."""
    settings, vocab = job.collect, model.config.vocab
    if model.tokenizer is None:
        raise ValueError(f"job: {job.model} has no tokenizer")
    for site in settings.sites:
        check_site(model.config, site)
    if job.site not in settings.sites:
        raise ValueError(
            f"job: train.site {job.site!r} is not one of collect.sites, "
            f"{', '.join(settings.sites)}"
        )
    list_runs(job.train)
    check_gradients(job)
    if settings.readout in ("labels", "signs") and model.config.logit_cap is not None:
        raise ValueError(
            f"job: collect.readout must be 'loss' or 'sampled', got "
            f"{settings.readout!r}; {job.model} bends its logits behind their matrix"
        )
    if settings.start >= vocab:
        raise ValueError(
            f"job: collect.start must be a token of the model, 0 .. {vocab - 1}, or -1 "
            f"for none, got {settings.start}"
        )


def _cut_windows(job: Job, model: Pretrained) -> tuple[np.ndarray, np.ndarray]:
    """Cut the texts of a job into windows to train on and held-out windows.

    One text of every ``job.collect.every`` is held out; the windows of either part are
    in random order, the same for the same seed.
    """
    settings = job.collect
    texts = [text for _, text in read_texts(locate(job.text))]
    if settings.every < 2 or len(texts) < settings.every:
        raise ValueError(
            f"job: one of every {settings.every} texts is to be held out, there are "
            f"{len(texts)}; give more of them, or set collect.every from 2 to that"
        )
    # The middle one of every group, so that neither end of a sorted series is missing.
    held_out = set(range(settings.every // 2, len(texts), settings.every))
    start = None if settings.start < 0 else settings.start
    parts = []
    for skip, num_tokens, part in (
        (
            settings.skip,
            settings.tokens,
            [t for i, t in enumerate(texts) if i not in held_out],
        ),
        (0, settings.held_out, [t for i, t in enumerate(texts) if i in held_out]),
    ):
        windows = token_windows(model.tokenizer, part, settings.length, start=start)
        first, num = (-(-n // settings.length) for n in (skip, num_tokens))
        if len(windows) < first + num:
            raise ValueError(
                f"job: wanted {skip + num_tokens} tokens in windows of "
                f"{settings.length}, the text has {windows.size}; lower collect.tokens "
                "or collect.held_out"
            )
        order = np.random.default_rng(settings.seed).permutation(len(windows))
        parts.append(windows[order[first : first + num]])
    return parts[0], parts[1]


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
    readout, num = readout_from(work.job), num_readouts(work.job)
    return _taps_of(work, name, work.tokens, readout, num)


def held_out_taps(work: Workspace, name: str) -> TapSource:
    """Make taps of the held-out text, with gradients of the loss, from the model."""
    if not len(work.held_out):
        raise ValueError(
            "job: collect.held_out must be tokens of one window or more where "
            f"activations are collected alone, got {work.job.collect.held_out}; raise "
            "it, or collect with another readout"
        )
    readout = _cached_readout("loss", 1, 0, 1.0)
    return _taps_of(work, name, work.held_out, readout, 1)


def _taps_of(
    work: Workspace, name: str, tokens: np.ndarray, readout: ReadoutOf, num: int
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
        train_batch=job.train.batch,
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


def provenance(work: Workspace, site: str | None = None) -> dict[str, Any]:
    """JSON values that say which model and settings made the taps of a job."""
    settings = work.job.collect
    values: dict[str, Any] = {
        "model_name": work.model.name,
        "weights": work.weights,
        "readout": settings.readout,
        "draws": num_readouts(work.job),
        "compute": settings.compute,
    }
    return (
        values if site is None else values | {"site": site, "length": settings.length}
    )


def probed_from(work: Workspace) -> Probed:
    """Make the probed model, with products in the dtype of the job."""
    return _cached_probed(work.model.config, work.job.collect.compute)


def readout_from(job: Job) -> ReadoutOf:
    """Make the readout of a job."""
    settings = job.collect
    return _cached_readout(
        settings.readout, settings.draws, settings.seed, settings.temperature
    )


# The same objects for the same settings, so that what they are in is compiled once.
@cache
def _cached_probed(config: DecoderConfig, compute: str) -> Probed:
    return from_linen(Decoder(config, dtype=jnp.dtype(compute)))


@cache
def _cached_readout(kind: str, draws: int, seed: int, temperature: float) -> ReadoutOf:
    return make_readout(kind, draws=draws, seed=seed, temperature=temperature)


def num_readouts(job: Job) -> int:
    """``K``, gradients per token; 0 for activations alone."""
    fixed = {"loss": 1, "none": 0}
    return fixed.get(job.collect.readout, job.collect.draws)


def site_width(config: DecoderConfig, site: str) -> int:
    """``D`` of a site."""
    return config.hidden if site.endswith("mlp_hidden") else config.dim
