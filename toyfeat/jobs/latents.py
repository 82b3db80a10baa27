"""Describe the latents of the dictionaries of a job, for its page and its records."""

from functools import partial
from pathlib import Path

from toyfeat.dictionary.latents import Latent, from_acts, from_grads
from toyfeat.interop import load_saelens
from toyfeat.jobs.kinds import KINDS
from toyfeat.jobs.results import finished_runs
from toyfeat.jobs.sites import held_out_taps, open_site
from toyfeat.jobs.taps import MAX_BYTES_IN_MEMORY
from toyfeat.jobs.workspace import Workspace
from toyfeat.lm.contexts import find_contexts


def inspect_latents(work: Workspace, *, num: int = 24) -> dict[str, list[Latent]]:
    """Describe latents of the finished dictionaries of the first seed and middle k.

    Effects are by the gradients that were collected, or, where activations were
    collected alone, by those of the loss on held-out text.

    Args:
      work: a job with trained dictionaries.
      num: latents of each.

    Returns:
      Name to :class:`toyfeat.dictionary.latents.Latent`, the largest effects first.
    """
    job = work.job
    site, tokens = open_site(work, job.site), work.tokens
    source = site.taps
    if not source.readouts:
        source, tokens = held_out_taps(work, job.site), work.held_out
    chunks = source.chunks
    size = source.bytes_per_token * tokens.size
    if job.source == "model" and size <= MAX_BYTES_IN_MEMORY:
        taps = [*source.chunks()]  # the model is run once for all dictionaries
        chunks = partial(iter, taps)
    seed, k = job.train.seeds[0], job.train.ks[len(job.train.ks) // 2]
    latents = {}
    for run, features in finished_runs(job.train, Path(job.out) / "train"):
        if (run.seed, run.k) != (seed, k):
            continue
        sae, params = load_saelens(features)
        if KINDS[run.kind].of_gradients:
            described = from_grads(sae, params, site.mean, site.covariance)
        else:
            described = from_acts(sae, params)
        latents[run.name] = find_contexts(
            described,
            chunks,
            tokens,
            work.model,
            residual=not site.name.endswith("mlp_hidden"),
            num=num,
        )
    return latents
