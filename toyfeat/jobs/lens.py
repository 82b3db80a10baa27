"""Fit a lens to the model of a job, and read a text with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.jobs.config import Job
from toyfeat.jobs.results import claim_folder
from toyfeat.jobs.windows import full_batches
from toyfeat.jobs.workspace import Workspace
from toyfeat.lens import (
    Estimate,
    FitProgress,
    Lens,
    LensModel,
    fit,
    from_decoder,
    jacobian_lens,
    logit_lens,
    mean_jacobian,
    second_moment,
    second_moment_lens,
)
from toyfeat.types import Accumulator

FILE = "lens.safetensors"
"""Name of the lens in the folder of a job."""

_MAX_TOKENS = 512  # of a prompt: what a person looks through on a page


class LensReading(NamedTuple):
    """Top tokens of a prompt at every site, by a lens.

    Attributes:
      name: of the lens.
      sites: ``S`` names, the final stream last.
      tops: ``[S, T, k]`` texts, the likeliest first.
      shares: ``[S, T, k]``, probabilities.
    """

    name: str
    sites: tuple[str, ...]
    tops: np.ndarray
    shares: np.ndarray


class LensRun(NamedTuple):
    """A fitted lens with what it reads.

    Attributes:
      lens: the lens.
      estimate: the fit, with its errors.
      tokens: ``T`` texts of the prompt.
      readings: by the lens, and by the logit lens beside it.
    """

    lens: Lens
    estimate: Estimate
    tokens: list[str]
    readings: list[LensReading]


def run_lens(
    work: Workspace, report: Callable[[FitProgress], Any] = lambda progress: None
) -> LensRun:
    """Fit the lens of a job, save it, and read the job's text.

    The fit goes on where it was stopped.

    Args:
      work: from :func:`toyfeat.jobs.open_job`.
      report: called with the progress of the fit.

    Returns:
      :class:`LensRun`; the lens is ``lens.safetensors`` in the folder of the job too.

    Raises:
      ValueError: for a job with fewer windows than prompts, windows that are not
        longer than what is skipped, or a folder with a lens of other settings.
    """
    settings, params = work.job.lens, work.model.params
    # Check the texts before the work.
    tokens, prompt = _prompts(work.job, work.tokens), _tokens_to_read(work)
    dtype = jnp.dtype(work.job.collect.compute)
    model = from_decoder(work.model.config, dtype=dtype, frozen=settings.frozen)
    folder = claim_folder(work.job, "collect", "lens")
    acc = _accumulator(work.job, model, work.model.config.dim)
    batches = _batches(tokens, settings.batch)
    saved = {"folder": folder / "lens", "every": settings.every}
    state = fit(model, acc, params, batches, report=report, **saved)
    # Save the lens, and read the prompt with it and with the logit lens.
    estimate = acc.finish(state)
    about = {"model": work.model.name, "revision": work.weights}
    about |= {"frozen": settings.frozen, "cotangents": settings.cotangents}
    make_lens = jacobian_lens if settings.kind == "jacobian" else second_moment_lens
    lens = make_lens(model, params, estimate, about=about)
    lens.save(folder / FILE)
    plain = logit_lens(model, params)
    return LensRun(
        lens=lens,
        estimate=estimate,
        tokens=[_text(work, token) for token in prompt],
        readings=[_read(work, model, x, prompt) for x in (lens, plain)],
    )


def _accumulator(job: Job, model: LensModel, dim: int) -> Accumulator:
    """Make the accumulator that the settings of a job name."""
    settings = job.lens
    make = mean_jacobian if settings.kind == "jacobian" else second_moment
    return make(
        model,
        dim,
        skip_first=settings.skip_first,
        skip_last=settings.skip_last,
        cotangents=settings.cotangents or None,
        key=jax.random.key(settings.seed),
        chunk=settings.chunk,
        chain=settings.chain,
    )


def _prompts(job: Job, tokens: np.ndarray) -> np.ndarray:
    """Take the windows of a job's text that the lens is fitted on."""
    num = job.lens.prompts
    if len(tokens) < num:
        raise ValueError(
            f"job: lens.prompts must be windows of the training text, of which there "
            f"are {len(tokens)}, got {num}; raise collect.tokens or lower lens.prompts"
        )
    return tokens[:num]


def _batches(tokens: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut windows into batches with masks of the tokens that count."""
    ones = np.ones(tokens.shape[1], np.float32)
    return [
        (tokens[rows], counts[:, None] * ones)
        for rows, counts in full_batches(len(tokens), size)
    ]


def _tokens_to_read(work: Workspace) -> np.ndarray:
    """Encode the text to read, or take the first held-out window."""
    text = work.job.read.text
    if not text:
        if not len(work.held_out):
            raise ValueError(
                "job: read.text must be a text where no window is held out, got none; "
                "give one, or raise collect.held_out"
            )
        return work.held_out[0]
    ids = work.model.tokenizer.encode(text, add_special_tokens=False).ids
    start = work.job.collect.start
    ids = np.asarray(([] if start < 0 else [start]) + ids, np.int32)
    if not 0 < len(ids) <= _MAX_TOKENS:
        raise ValueError(
            f"job: read.text must have 1 .. {_MAX_TOKENS} tokens, got {len(ids)}; give "
            "another text"
        )
    return ids


def _text(work: Workspace, token: int) -> str:
    """Text of one token."""
    return work.model.tokenizer.decode([int(token)], skip_special_tokens=False)


def _read(
    work: Workspace, model: LensModel, lens: Lens, tokens: np.ndarray
) -> LensReading:
    """Read a prompt at every site."""
    num = min(work.job.read.top, work.model.config.vocab)

    @jax.jit
    def streams(params: Any, tokens: Any) -> dict[str, Any]:
        acts = model.probed(params, tokens, {})[1]
        return {site: acts[site][0] for site in model.sites}

    tops, shares = [], []
    acts = streams(work.model.params, tokens[None])
    # What comes out of jit is in the order of the alphabet, block 10 before block 2.
    for site in model.sites:
        logits = lens.read(site, acts[site])
        share, index = jax.lax.top_k(jax.nn.softmax(logits), num)
        ids = np.asarray(index)
        tops.append([[_text(work, token) for token in row] for row in ids])
        shares.append(np.asarray(share))
    return LensReading(
        name=lens.kind,
        sites=model.sites,
        tops=np.array(tops, object),
        shares=np.stack(shares),
    )
