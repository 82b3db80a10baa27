"""Fine-tune the dictionaries of a job on its store, and score them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from toyfeat.data.store import Store, shard_taps
from toyfeat.dictionary import losses
from toyfeat.dictionary.types import Config, Dictionary, Term
from toyfeat.files.json import read_json
from toyfeat.interop import load_saelens, save_saelens
from toyfeat.jobs.config import Job
from toyfeat.jobs.evaluate import open_held_out, score_methods
from toyfeat.jobs.results import Rows, claim_folder, require_store
from toyfeat.jobs.sites import open_site
from toyfeat.jobs.taps import MAX_BYTES_IN_MEMORY, open_collected
from toyfeat.jobs.tuning import Tuning
from toyfeat.jobs.workspace import Log, Workspace
from toyfeat.lm.expansion import expand_kl, reconstruct
from toyfeat.lm.finetune import WindowTaps, finetune, window_batches, window_order
from toyfeat.lm.replacements import Replacement, from_dictionary
from toyfeat.lm.split import split_at
from toyfeat.types import Params

_DRAWS = 4
"""Labels of an expansion by default; one has .8 of their gain (docs/research.md)."""

_SHARED_DRAWS = 1
"""Labels of a KL that a population shares, by default."""

_RUN_MODEL = "kl", "shared_kl"
"""Terms that run the model at every step."""

_MAX_LATENTS = 64
"""Latents of a token with parts in scores where the architecture has no ``k``: parts
take memory, and reconstructions are of all latents in any case."""


def finetune_job(work: Workspace, log: Log = print) -> list[dict[str, Any]]:
    """Fine-tune every dictionary with every loss, and score all on held-out text.

    Args:
      work: a job that was collected.
      log: called with a line for every result.

    Returns:
      Rows, also in ``finetune.jsonl``: the scores of the dictionaries before and after.

    Raises:
      FileNotFoundError: if nothing was collected, or a dictionary does not exist.
      ValueError: before anything is trained: for a dictionary of another site or width,
        a loss that the store has too few readouts for or that wants a residual site or
        dictionaries of one size, too few windows, or a store that does not fit into
        memory.
    """
    job = work.job
    require_store(job)
    store = open_collected(job, job.site)
    _check_losses(job, store)
    starts = [_load_dictionary(path, job, store) for path in job.finetune.dictionaries]
    _check_members(job, starts)
    folder = claim_folder(job, "collect", "finetune")
    taps = _read_windows(store, job)
    expand = _expander(work, taps, starts)
    rows = Rows(folder / "finetune.jsonl")
    held = open_held_out(open_site(work, job.site, log))
    for i, (sae, params) in enumerate(starts):
        score_methods(held, {f"start {i}": _method(sae, params)}, rows, log)
        for loss in job.finetune.losses:
            name = f"{loss.name} {i}"
            features = folder / "finetune" / name / "features"
            if not (features / "cfg.json").exists():
                chosen = _choose_taps(taps, loss, partial(expand, i, loss))
                together = loss.term == "shared_kl"
                members = range(len(starts)) if together else [i]
                tuned = _tune(work, [starts[m] for m in members], loss, chosen, members)
                about = {"tuned": asdict(loss), "site": job.site, **store.metadata}
                for member, found in zip(members, tuned, strict=True):
                    path = folder / "finetune" / f"{loss.name} {member}" / "features"
                    save_saelens(path, sae, found, metadata=about)
            tuned = load_saelens(features)
            score_methods(held, {name: _method(*tuned)}, rows, log)
    return rows.rows


def _tune(
    work: Workspace,
    starts: Sequence[tuple[Dictionary, Params]],
    loss: Tuning,
    taps: WindowTaps,
    numbers: Sequence[int],
) -> list[Params]:
    """Fine-tune one dictionary with one loss, or several of one size side by side.

    Args:
      work: the job.
      starts: the dictionaries.
      loss: how.
      taps: that have what the loss takes.
      numbers: of the dictionaries, for the folder.
    """
    settings = work.job.finetune
    several = loss.term == "shared_kl"
    # No other loss has this folder: theirs end in numbers.
    name = f"{loss.name} together" if several else f"{loss.name} {numbers[0]}"
    batches = window_batches(
        taps,
        windows=settings.windows,
        seed=settings.seed,
        steps=settings.steps,
        params=work.model.params if loss.term in _RUN_MODEL else None,
    )
    params = [tensors for _, tensors in starts]
    tuned = finetune(
        starts[0][0],
        params if several else params[0],
        batches,
        _make_term(work, loss),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight=loss.weight,
        directory=Path(work.job.out) / "finetune" / name,
    )
    return tuned if several else [tuned]


def _make_term(work: Workspace, loss: Tuning) -> Term | None:
    """Make the term of a loss beside the reconstruction error."""
    if loss.term == "mse":
        return None
    if loss.term == "fisher":
        return losses.fisher(loss.form, limit=loss.limit)
    if loss.term == "expanded_kl":
        return losses.expanded_kl()
    split = split_at(work.model.config, work.job.site)
    if loss.term == "shared_kl":
        return losses.shared_kl(split.run, draws=loss.draws or _SHARED_DRAWS)
    alone = split.run_alone if loss.clean_prefix else None
    return losses.spliced_kl(split.run, run_spliced=alone)


def _expander(
    work: Workspace, taps: WindowTaps, starts: list[tuple[Dictionary, Params]]
) -> Callable[[int, Tuning], losses.Expansion]:
    """Return a function that expands the KL for a dictionary, given by its index."""
    job, model = work.job, work.model

    def expand(point: np.ndarray, draws: int) -> losses.Expansion:
        run = split_at(model.config, job.site).run
        seed, batch = job.finetune.seed, job.collect.batch
        return expand_kl(
            run, model.params, taps, point, draws=draws, seed=seed, batch=batch
        )

    @cache  # one serves all dictionaries
    def expand_at_mean(draws: int) -> losses.Expansion:
        point = np.zeros(np.shape(taps.acts), np.float32)
        for start in starts:
            point += reconstruct(*start, taps.acts) / len(starts)
        return expand(point, draws)

    def expand_for(index: int, loss: Tuning) -> losses.Expansion:
        draws = _num_draws(loss)
        if loss.at == "mean":
            return expand_at_mean(draws)
        return expand(reconstruct(*starts[index], taps.acts), draws)

    return expand_for


def _num_draws(loss: Tuning) -> int:
    """Labels that an expansion draws for a token."""
    return loss.draws or _DRAWS


def _choose_taps(
    taps: WindowTaps, loss: Tuning, expand: Callable[[], losses.Expansion]
) -> WindowTaps:
    """Choose what a loss takes: readouts, an expansion, or neither."""
    if loss.term == "fisher":
        return _select_draws(taps, loss.draws)
    expansion = expand() if loss.term == "expanded_kl" else None
    return taps._replace(grads=None, expansion=expansion)


def _select_draws(taps: WindowTaps, draws: int) -> WindowTaps:
    """Select the first readouts, scaled to be alone; all of them for 0."""
    num = 0 if taps.grads is None else taps.grads.shape[2]
    if draws in (0, num):
        return taps
    # Draws are divided by the root of their number.
    grads = jnp.asarray(taps.grads)[:, :, :draws]
    scale = jnp.asarray((num / draws) ** 0.5, grads.dtype)
    return taps._replace(grads=grads * scale)


def _read_windows(store: Store, job: Job) -> WindowTaps:
    """Read the windows that training takes from a store, in its own dtype."""
    shards = [shard_taps(store, index) for index in range(len(store.shards))]
    settings, length = job.finetune, job.collect.length
    order = window_order(
        store.rows // length,
        windows=settings.windows,
        seed=settings.seed,
        steps=settings.steps,
    )

    def by_window(read: Callable[[Any], Any]) -> np.ndarray:
        whole = np.concatenate([np.asarray(read(shard)) for shard in shards])
        return whole.reshape(-1, length, *whole.shape[1:])[np.sort(order.ravel())]

    return WindowTaps(
        by_window(lambda taps: taps.acts),
        by_window(lambda taps: taps.weights),
        by_window(lambda taps: taps.grads) if store.readouts else None,
    )


def _check_losses(job: Job, store: Store) -> None:
    """Refuse what cannot be trained, before anything is."""
    settings = job.finetune
    names = [loss.name for loss in settings.losses]
    if len(set(names)) < len(names) or "start" in names:
        raise ValueError(
            f"finetune: losses must have names of their own other than 'start', got "
            f"{names}; rename one"
        )
    size = sum((store.path / shard.file).stat().st_size for shard in store.shards)
    if size > MAX_BYTES_IN_MEMORY:
        raise ValueError(
            f"finetune: the store must fit into {MAX_BYTES_IN_MEMORY / 1e9:.1f} GB of "
            f"memory, got {size / 1e9:.1f}; lower collect.tokens or collect.draws, or "
            'set collect.dtype = "bfloat16"'
        )
    windows = store.rows // job.collect.length
    # Point, slope and bfloat16 draws of every token; that at the mean is kept.
    expanding = [loss for loss in settings.losses if loss.term == "expanded_kl"]
    draws = [_num_draws(loss) for loss in expanding]
    tokens = min(settings.steps * settings.windows, windows) * job.collect.length
    expanded = tokens * store.dim * (8 + 2 * max(draws, default=0))
    expanded *= len({loss.at for loss in expanding})
    if draws and size + expanded > MAX_BYTES_IN_MEMORY:
        raise ValueError(
            f"finetune: the store and an expansion of {max(draws)} draws must fit into "
            f"{MAX_BYTES_IN_MEMORY / 1e9:.1f} GB of memory, got "
            f"{(size + expanded) / 1e9:.1f}; lower finetune.steps or draws"
        )
    if settings.steps * settings.windows > windows:
        raise ValueError(
            f"finetune: steps x windows must be at most the {windows} windows that "
            f"were collected, got {settings.steps} x {settings.windows}; a token is "
            "not seen twice: collect more, or lower finetune.steps"
        )
    for loss in settings.losses:
        _check_loss(loss, job.site, store)


def _check_loss(loss: Tuning, site: str, store: Store) -> None:
    """Refuse a loss that wants more draws, or another site."""
    wanted = max(loss.draws, 1) if loss.term == "fisher" else 0
    if wanted > (store.readouts or 0):
        raise ValueError(
            f"finetune: {loss.name} wants {wanted} draws, got a store with "
            f"{store.readouts or 0}; raise collect.draws (in another folder)"
        )
    is_residual = site.endswith(("resid_pre", "resid_post"))
    if loss.term in (*_RUN_MODEL, "expanded_kl") and not is_residual:
        raise ValueError(
            f"finetune: {loss.name} runs the model from a residual site, got "
            f"{site}; leave it out, or take another site"
        )


def _check_members(job: Job, starts: Sequence[tuple[Dictionary, Params]]) -> None:
    """Refuse dictionaries that cannot be trained side by side, where a loss does so."""
    configs = [sae.config for sae, _ in starts]
    shared = [loss.name for loss in job.finetune.losses if loss.term == "shared_kl"]
    values = {name: [getattr(x, name) for x in configs] for name in Config._fields}
    several = {name: x for name, x in values.items() if len(set(x)) > 1}
    if shared and several:
        raise ValueError(
            f"finetune: {shared[0]} trains dictionaries side by side, which must be of "
            f"one architecture, size and k, and alike in all else, got {several}; name "
            "those that are alike in a job of their own"
        )


def _load_dictionary(path: str, job: Job, store: Store) -> tuple[Dictionary, Params]:
    """Load a dictionary, and refuse one of another width, site or model."""
    sae, params = load_saelens(path)
    if sae.config.d_in != store.dim or sae.config.d_out not in (None, store.dim):
        raise ValueError(
            f"finetune: {path} must be a dictionary of width {store.dim}, that of "
            f"{job.site}, got {sae.config.d_in}; give one of this site"
        )
    # What the file says of its model; those of other libraries name no weights.
    source = Path(path) / "cfg.json"
    about = read_json(source, "finetune") if source.exists() else {}
    known = {**about, **(about.get("metadata") or {})}
    wanted = {"site": job.site, "weights": store.metadata.get("weights")}
    for name, value in wanted.items():
        if name in known and known[name] != value:
            raise ValueError(
                f"finetune: {path} is of {name} {known[name]!r}, and the job of "
                f"{value!r}; give a dictionary of this model and site"
            )
    return sae, params


def _method(sae: Dictionary, params: Params) -> Replacement:
    """Make a method of a dictionary, by activations alone."""
    chooses = sae.architecture.selects == "example"
    most = sae.config.k if chooses else min(_MAX_LATENTS, sae.config.d_sae)
    return from_dictionary(sae, params, max_latents=most, gradient_index=0)
