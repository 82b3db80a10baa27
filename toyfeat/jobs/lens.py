"""Fit a lens to the model of a job, and read a text with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.jobs.config import Job
from toyfeat.jobs.several import (
    Spread,
    claim_together,
    lens_mesh,
    spread_prompts,
    to_local,
)
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
    output_divergence,
    second_moment,
    second_moment_lens,
    tuned_lens,
)
from toyfeat.lens.reading import make_lens
from toyfeat.processes import process_index, together
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
      estimate: the fit, with its errors; ``None`` of a tuned lens.
      tokens: ``T`` texts of the prompt.
      readings: by the lens, and by the logit lens beside it.
      divergences: of a tuned lens and the logit lens from the model's output, by site,
        on held-out windows; ``None`` of the other lenses.
    """

    lens: Lens
    estimate: Estimate | None
    tokens: list[str]
    readings: list[LensReading]
    divergences: dict[str, dict[str, float]] | None = None


def run_lens(
    work: Workspace, report: Callable[[FitProgress], Any] = lambda progress: None
) -> LensRun:
    """Fit the lens of a job, save it, and read the job's text.

    A fit goes on where it was stopped; the training of a tuned lens starts anew.
    Several processes, each of which calls this, split the windows of every batch over
    their devices; the first writes, and all return the same.

    Args:
      work: from :func:`toyfeat.jobs.open_job`.
      report: called with the progress of the fit.

    Returns:
      :class:`LensRun`; the lens is ``lens.safetensors`` in the folder of the job too.

    Raises:
      ValueError: for a job with fewer windows than prompts, windows that are not
        longer than what is skipped, a tuned lens without held-out windows, a folder
        with a lens of other settings, or devices of several processes that do not
        divide the windows of a batch.
    """
    settings, params = work.job.lens, work.model.params
    # Check the texts before the work.
    tokens, prompt = _prompts(work.job, work.tokens), _tokens_to_read(work)
    held_out = _held_out(work) if settings.kind == "tuned" else []
    dtype = jnp.dtype(work.job.collect.compute)
    model = from_decoder(work.model.config, dtype=dtype, frozen=settings.frozen)
    fitted = model.sites[:-1][:: settings.layer_step]
    model = model._replace(sites=(*fitted, model.sites[-1]))
    mesh = lens_mesh(work.job)
    folder = claim_together(work.job, "collect", "lens")
    spread = spread_prompts(work, settings.batch, mesh)
    plain = logit_lens(model, params)
    divergences = None
    if settings.kind == "tuned":
        lens, estimate = _train(work, model, tokens, spread, report), None
        batches = spread.lay_out(held_out)
        divergences = {
            x.kind: output_divergence(model, spread.params, x, batches)
            for x in (lens, plain)
        }
    else:
        lens, estimate = _fit(work, model, tokens, spread, folder / "lens", report)
    with together("lens"):
        if process_index() == 0:
            lens.save(folder / FILE)
    return LensRun(
        lens=lens,
        estimate=estimate,
        tokens=[_text(work, token) for token in prompt],
        readings=[_read(work, model, x, prompt) for x in (lens, plain)],
        divergences=divergences,
    )


def _fit(
    work: Workspace,
    model: LensModel,
    tokens: np.ndarray,
    spread: Spread,
    folder: Path,
    report: Callable[[FitProgress], Any],
) -> tuple[Lens, Estimate]:
    """Fit a lens by derivatives, with checkpoints."""
    settings = work.job.lens
    acc = _accumulator(work.job, model, work.model.config.dim)
    batches = spread.lay_out(_batches(tokens, settings.batch))
    state = fit(
        model,
        acc,
        spread.params,
        batches,
        directory=folder,
        checkpoint_every=settings.checkpoint_every,
        on_progress=report,
    )
    estimate = acc.finish(to_local(state))
    about = _about(work) | {
        "frozen": settings.frozen,
        "cotangents": settings.cotangents,
    }
    finish = jacobian_lens if settings.kind == "jacobian" else second_moment_lens
    return finish(model, work.model.params, estimate, about=about), estimate


def _train(
    work: Workspace,
    model: LensModel,
    tokens: np.ndarray,
    spread: Spread,
    report: Callable[[FitProgress], Any],
) -> Lens:
    """Train a tuned lens on the tokens that no fit skips."""
    settings, num = work.job.lens, len(tokens)
    batches = spread.lay_out(
        _batches(tokens, settings.batch, settings.skip_first, settings.skip_last)
    )

    def show(step: int, losses: Any) -> None:
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            jax.block_until_ready(losses)  # so that the progress is what is done
            rounds, rest = divmod(step, len(batches))
            prompts = rounds * num + rest * settings.batch
            report(FitProgress(step, settings.steps, prompts))

    seen = min(num, settings.steps * settings.batch)
    lens = tuned_lens(
        model,
        spread.params,
        batches,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        about=_about(work) | {"prompts": seen},
        on_step=show,
    )
    # Of this process alone, as the text is read.
    maps = to_local(lens.maps)
    return make_lens(model, work.model.params, lens.kind, maps, lens.about)


def _about(work: Workspace) -> dict[str, Any]:
    """Name the model of a lens and its weights, for the file."""
    return {"model": work.model.name, "revision": work.weights}


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


def _held_out(work: Workspace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of the held-out windows, with which a tuned lens is checked."""
    settings = work.job.lens
    if not len(work.held_out):
        raise ValueError(
            "job: collect.held_out must be tokens of one window or more for a tuned "
            f"lens, got {work.job.collect.held_out}; raise it"
        )
    skips = settings.skip_first, settings.skip_last
    return _batches(work.held_out, settings.batch, *skips)


def _batches(
    tokens: np.ndarray, size: int, skip_first: int = 0, skip_last: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut windows into batches with masks of the tokens that count."""
    places = np.arange(tokens.shape[1])
    stop = len(places) - skip_last
    counted = ((places >= skip_first) & (places < stop)).astype(np.float32)
    if not counted.any():
        raise ValueError(
            f"job: collect.length must be more than the {skip_first} + {skip_last} "
            f"tokens that lens.skip_first and lens.skip_last leave out, got "
            f"{len(places)}; raise it, or lower these"
        )
    return [
        (tokens[rows], counts[:, None] * counted)
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
