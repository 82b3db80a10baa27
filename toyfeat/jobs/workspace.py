"""Open a job: its model, its text and its readout."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.jobs.config import Job
from toyfeat.jobs.hub import hub_commit, is_hub
from toyfeat.jobs.results import check_gradients, list_runs
from toyfeat.jobs.sources import locate, read_texts
from toyfeat.lm.collect import (
    ReadoutOf,
    fingerprint,
    make_readout,
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
from toyfeat.types import Probed

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
    return cached_readout(
        settings.readout, settings.draws, settings.seed, settings.temperature
    )


# The same objects for the same settings, so that what they are in is compiled once.
@cache
def _cached_probed(config: DecoderConfig, compute: str) -> Probed:
    return from_linen(Decoder(config, dtype=jnp.dtype(compute)))


@cache
def cached_readout(
    kind: str, draws: int = 1, seed: int = 0, temperature: float = 1.0
) -> ReadoutOf:
    """Make a readout, as :func:`toyfeat.lm.collect.make_readout`."""
    return make_readout(kind, draws=draws, seed=seed, temperature=temperature)


def num_readouts(job: Job) -> int:
    """``K``, gradients per token; 0 for activations alone."""
    fixed = {"loss": 1, "none": 0}
    return fixed.get(job.collect.readout, job.collect.draws)


def site_width(config: DecoderConfig, site: str) -> int:
    """``D`` of a site."""
    return config.hidden if site.endswith("mlp_hidden") else config.dim
