"""A job with its model and its text, and what taps of it are."""

import time
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data.store import store_size
from toyfeat.language.collecting import ReadoutOf, fingerprint, readout_of, tapped
from toyfeat.language.halves import checked_site
from toyfeat.language.hub import hub_commit, is_hub
from toyfeat.language.jobs import Job
from toyfeat.language.sources import located, texts_of
from toyfeat.language.training import runs_of
from toyfeat.models.decoder import (
    Decoder,
    DecoderConfig,
    Pretrained,
    load_decoder,
    token_windows,
)
from toyfeat.tap import from_linen
from toyfeat.types import Probed


class Opened(NamedTuple):
    """A job with its model and its text.

    Attributes:
      job: what is done.
      model: as it was released.
      tokens: ``[num, T]``, windows to train on.
      held_out: ``[num, T]``, windows of other texts.
    """

    job: Job
    model: Pretrained
    tokens: np.ndarray
    held_out: np.ndarray


def opened(job: Job) -> Opened:
    """Read the model of a job and cut its text into windows.

    One text of every ``job.collect.every`` is held out; windows of either part are
    in random order, the same for the same seed.

    Args:
      job: what is done.

    Returns:
      :class:`Opened`.

    Raises:
      FileNotFoundError: if the model or the text is not there.
      ValueError: for a model that cannot be read or has no tokenizer, a site or a
        token that it does not have, or too little text.
    """
    given = job.collect
    path = located(job.model)
    model = load_decoder(path, dtype=jnp.dtype(job.weights))
    if is_hub(job.model):  # the folder there is named after a commit
        model = model._replace(name=hub_commit(job.model, path))
    if model.tokenizer is None:
        raise ValueError(f"job: {job.model} has no tokenizer")
    for site in given.sites:
        checked_site(model.config, site)
    if job.site not in given.sites:
        raise ValueError(
            f"job: train.site {job.site!r} is not one of collect.sites, "
            f"{', '.join(given.sites)}"
        )
    runs_of(job.train)
    if given.start >= model.config.vocab:
        raise ValueError(
            "job: collect.start must be a token of the model, 0 .. "
            f"{model.config.vocab - 1}, or -1 for none, got {given.start}"
        )
    texts = [text for _, text in texts_of(located(job.text))]
    if given.every < 2 or len(texts) < given.every:
        raise ValueError(
            f"job: one of every {given.every} texts is to be held out, there are "
            f"{len(texts)}; give more of them, or set collect.every from 2 to that"
        )
    away = set(range(given.every // 2, len(texts), given.every))
    start = None if given.start < 0 else given.start
    parts = []
    for wanted, chosen in (
        (given.tokens, [t for i, t in enumerate(texts) if i not in away]),
        (given.held_out, [t for i, t in enumerate(texts) if i in away]),
    ):
        windows = token_windows(model.tokenizer, chosen, given.length, start=start)
        num = -(-wanted // given.length)
        if len(windows) < num:
            raise ValueError(
                f"job: wanted {wanted} tokens in windows of {given.length}, the text "
                f"has {windows.size}; lower collect.tokens or collect.held_out"
            )
        order = np.random.default_rng(given.seed).permutation(len(windows))
        parts.append(windows[order[:num]])
    return Opened(job, model, *parts)


def size_of(run: Opened) -> str:
    """Disk that collecting takes, in words."""
    given, config = run.job.collect, run.model.config
    widths = [width_of(config, site) for site in given.sites]
    total = sum(
        store_size(
            run.tokens.size,
            dim=width,
            readouts=readouts_of(run.job),
            dtype=given.dtype,
            rows_per_shard=given.rows_per_shard,
        )
        for width in widths
    )
    return f"{run.tokens.size:,} tokens at {len(widths)} sites, {total / 1e6:,.0f} MB"


def seconds_per_token(run: Opened) -> float:
    """Measured on one batch, after one that compiles what collecting runs."""
    given = run.job.collect
    place = probed_of(run), given.sites, asked_of(run.job), given.massive
    part = jnp.asarray(run.tokens[: given.batch])
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        jax.block_until_ready(tapped(*place, run.model.params, part, 0))
        times.append(time.perf_counter() - begun)
    return times[-1] / part.size


def about(run: Opened, site: str | None = None) -> dict[str, Any]:
    """JSON values that say what taps of a job are of."""
    given = run.job.collect
    found: dict[str, Any] = {
        "model_name": run.model.name,
        "weights": fingerprint(run.model.params),
        "readout": given.readout,
        "draws": readouts_of(run.job),
        "compute": given.compute,
    }
    return found if site is None else found | {"site": site, "length": given.length}


def probed_of(run: Opened) -> Probed:
    """The model, with products in the dtype of the job."""
    return _decoder(run.model.config, run.job.collect.compute)


def asked_of(job: Job) -> ReadoutOf:
    """The readout of a job."""
    given = job.collect
    return _named(given.readout, given.draws, given.seed)


# The same objects for the same settings, so that what they are in is compiled once.
@cache
def _decoder(config: DecoderConfig, compute: str) -> Probed:
    return from_linen(Decoder(config, dtype=jnp.dtype(compute)))


@cache
def _named(kind: str, draws: int, seed: int) -> ReadoutOf:
    return readout_of(kind, draws=draws, seed=seed)


def readouts_of(job: Job) -> int:
    """``K``, gradients per token."""
    return job.collect.draws if job.collect.readout == "sampled" else 1


def width_of(config: DecoderConfig, site: str) -> int:
    """``D`` of a site."""
    return config.hidden if site.endswith("mlp_hidden") else config.dim
