"""Compute the bases of a site, and score them and dictionaries on held-out text."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.decompose import (
    gradient_pca,
    joint_pca,
    local_interaction_basis,
    pca,
)
from toyfeat.interop import load_saelens
from toyfeat.jobs.kinds import KINDS
from toyfeat.jobs.results import Rows, Run
from toyfeat.jobs.sites import Site
from toyfeat.jobs.windows import full_batches
from toyfeat.jobs.workspace import Log, probed_from
from toyfeat.linalg.precision import norm
from toyfeat.lm.collect import make_readout
from toyfeat.lm.evaluate import evaluate_replacements, reference_losses
from toyfeat.lm.leave_one_out import faithfulness
from toyfeat.lm.replacements import (
    Replacement,
    from_basis,
    from_dictionary,
    from_readers,
)
from toyfeat.lm.split import HeldOut, SplitDecoder, split_at, tap_held_out
from toyfeat.metrics import attribution_faithfulness
from toyfeat.types import Acts, Array, Basis, Params

# Methods that share the model's own predictions, whose log-probabilities are computed
# once for all of them; more of them would be lost at once when a run is cut off.
_METHODS_AT_ONCE = 8


def compute_bases(site: Site, names: Sequence[str]) -> dict[str, Basis]:
    """Compute bases of a site, with as many directions as it has.

    Args:
      site: from :func:`toyfeat.jobs.sites.open_site`.
      names: of :data:`toyfeat.jobs.config.BASES`.

    Returns:
      Name to basis.
    """
    stats, width = site.stats, site.width
    compute_pca = cache(lambda: pca(stats, width))
    rows = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (width, width)))[0]
    random = {"readers": rows, "writers": rows.T, "spectrum": jnp.ones(width)}
    recipes: dict[str, Callable[[], Basis]] = {
        "pca": compute_pca,
        "gradient pca": lambda: gradient_pca(stats, width),
        "joint pca": lambda: joint_pca(stats, width),
        "lib": lambda: _interaction_basis(site),
        "random": lambda: compute_pca()._replace(**random),
    }
    return {name: recipes[name]() for name in names}


def _interaction_basis(site: Site) -> Basis:
    """Local interaction basis towards the logits, over the tokens that count."""
    work, tokens = site.work, site.work.tokens
    probed, batch = probed_from(work), min(work.job.collect.batch, len(tokens))
    weights = np.concatenate([taps.weights for taps in site.taps.chunks()])
    weights = weights.reshape(tokens.shape)

    def batches() -> Iterator[tuple[Array, Array]]:
        for rows, counts in full_batches(len(tokens), batch):
            inside = weights[rows] * counts[:, None]
            yield jnp.asarray(tokens[rows]), jnp.asarray(inside)

    def probed_tokens(params: Params, inputs: Any, probes: Any) -> tuple[Any, Acts]:
        return probed(params, inputs[0], probes)

    return local_interaction_basis(
        probed_tokens,
        work.model.params,
        batches,
        sites=[site.name],
        sources=work.job.decompose.sources,
        key=jax.random.key(work.job.collect.seed),
        mask=lambda inputs: inputs[1],
    )[site.name]


class HeldOutSite(NamedTuple):
    """A site with the held-out text that methods are scored on.

    Attributes:
      site: from :func:`toyfeat.jobs.sites.open_site`.
      split: the decoder, split at the site.
      taps: taps of the held-out text, computed at the first call.
    """

    site: Site
    split: SplitDecoder
    taps: Callable[[], HeldOut]


def open_held_out(site: Site) -> HeldOutSite:
    """Split the decoder at a site, and tap held-out text when it is first needed."""
    work = site.work
    split, settings = split_at(work.model.config, site.name), work.job.evaluate

    @cache
    def tap_once() -> HeldOut:
        # Whole batches only.
        num = min(settings.windows, len(work.held_out))
        num = num // settings.batch * settings.batch
        if not num:
            raise ValueError(
                f"job: {len(work.held_out)} held-out windows fill no batch of "
                f"{settings.batch}"
            )
        return tap_held_out(
            split,
            work.model.params,
            work.held_out[:num],
            site.mean,
            massive=work.job.collect.massive,
            batch=settings.batch,
            extra_readout=make_readout("sampled", seed=settings.seed),
        )

    return HeldOutSite(site, split, tap_once)


def methods_from_bases(
    bases: Mapping[str, Basis], ranks: Mapping[str, int]
) -> dict[str, Replacement]:
    """Make methods of the first directions of bases.

    Args:
      bases: name to basis.
      ranks: how a rank is added to the name of a basis, to the rank.

    Returns:
      Name to method, basis by basis.
    """
    return {
        f"{name}{suffix}": from_basis(basis, rank)
        for name, basis in bases.items()
        for suffix, rank in ranks.items()
    }


def methods_from_run(run: Run, features: Path, site: Site) -> dict[str, Replacement]:
    """Make a method of a dictionary for every way in which it can choose its latents.

    The method with the name of the run chooses latents as in training.  What was
    trained on gradients is evaluated once more with the gradients of the loss against
    tokens that the model draws (``sampled``), and a paired dictionary by activations
    alone (``alone``).

    Args:
      run: which dictionary.
      features: its folder, in SAELens' format.
      site: where it was trained.

    Returns:
      Name to method.
    """
    sae, params = load_saelens(features)
    if "grad_scale" in params:  # of all draws together; one readout is evaluated
        params["grad_scale"] = norm(params["grad_scale"])[None]

    def name_of(way: str) -> str:
        return run.name.replace(run.label, f"{run.label} {way}", 1)

    if KINDS[run.kind].of_gradients:
        mean, covariance = site.mean, site.covariance
        return {
            name: from_readers(sae, params, mean, covariance, gradient_index=index)
            for index, name in enumerate((run.name, name_of("sampled")))
        }
    methods = {run.name: from_dictionary(sae, params, gradient_index=0)}
    if sae.architecture.reads_gradients:
        by_acts = sae._replace(encode=_ignore_grads(sae.encode))
        methods[name_of("sampled")] = from_dictionary(sae, params, gradient_index=1)
        methods[name_of("alone")] = from_dictionary(by_acts, params)
    return methods


def _ignore_grads(encode: Callable[..., Array]) -> Callable[..., Array]:
    """Hide the gradients from an encoder."""

    def encode_acts(params: Params, acts: Array, **options: Any) -> Array:
        return encode(params, acts, **{**options, "grads": None})

    return encode_acts


def score_methods(
    held: HeldOutSite, methods: Mapping[str, Replacement], rows: Rows, log: Log
) -> None:
    """Score the methods that have no scores yet.

    Args:
      held: from :func:`open_held_out`.
      methods: by name.
      rows: results so far; scores are added.
      log: called with a line for every method.
    """
    site = held.site.name
    missing = {
        name: method
        for name, method in methods.items()
        if not rows.has(_scores_key(site, name))
    }
    if not missing:
        return
    # Losses of the model itself, and of the site's mean in its place.
    params = held.site.work.model.params
    batch = held.site.work.job.evaluate.batch
    taps = held.taps()
    losses = reference_losses(held.split, params, taps, batch=batch)
    rows.add({"site": site, "what": "losses"}, losses._asdict())
    # A few methods at once, whose scores are written before the next ones begin.
    names = list(missing)
    for start in range(0, len(names), _METHODS_AT_ONCE):
        part = {n: missing[n] for n in names[start : start + _METHODS_AT_ONCE]}
        scores = evaluate_replacements(
            held.split, params, taps, part, losses=losses, batch=batch
        )
        for name, score in scores.items():
            rows.add(_scores_key(site, name), score._asdict())
            log(
                f"{name}: recovered {score.recovered:.3f}, L0 {score.l0:.1f}, "
                f"attribution L0 {score.attribution_l0:.1f}, unexplained "
                f"{score.unexplained:.2f}"
            )


def check_attributions(
    held: HeldOutSite, methods: Mapping[str, Replacement], rows: Rows, log: Log
) -> None:
    """Compare attributions with leaving latents out, where that was not yet done.

    Methods without an active latent at any held-out token are skipped.

    Args:
      held: from :func:`open_held_out`.
      methods: by name, with scores.
      rows: results so far; the comparisons are added.
      log: called with a line for every method.
    """
    work, site = held.site.work, held.site.name
    settings = work.job.evaluate
    for name, method in methods.items():
        key = {"site": site, "method": name, "what": "faithfulness"}
        if rows.has(key) or _is_dead(rows, site, name):
            continue
        start = time.perf_counter()
        scores, effects, num_uniform = faithfulness(
            held.split,
            work.model.params,
            held.taps(),
            method,
            uniform=settings.uniform,
            largest=settings.largest,
            batch=settings.pair_batch,
            seed=settings.seed,
        )
        values = scores._asdict()
        # The same scores over the pairs of either draw.
        for part, pairs in (
            ("uniform", effects[:num_uniform]),
            ("largest", effects[num_uniform:]),
        ):
            if len(pairs):
                part_scores = attribution_faithfulness(*pairs.T)._asdict()
                values |= {f"{part}_{n}": score for n, score in part_scores.items()}
        values["seconds"] = time.perf_counter() - start
        values["effects"] = effects.tolist()
        rows.add(key, values)
        log(
            f"{name}: attributions against leaving out, correlation "
            f"{scores.correlation:.3f}, slope {scores.slope:.2f}, error "
            f"{scores.error:.3f} over {scores.pairs} pairs"
        )


def _is_dead(rows: Rows, site: str, method: str) -> bool:
    """Check whether a method has no active latent at any held-out token."""
    key = _scores_key(site, method)
    return any(
        key.items() <= row.items() and not row["l0"] for row in rows.rows if "l0" in row
    )


def _scores_key(site: str, method: str) -> dict[str, Any]:
    """Entries of the row with the scores of a method."""
    return {"site": site, "method": method, "what": "scores"}
