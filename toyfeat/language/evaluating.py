"""Judge the bases and dictionaries of a job, and keep what came of it."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.decompose.second_moments import covariance
from toyfeat.interop import load_saelens
from toyfeat.language.collecting import readout_of
from toyfeat.language.faithful import faithfulness
from toyfeat.language.halves import Halves, halves
from toyfeat.language.judging import Held, held_out, judge, losses_of
from toyfeat.language.methods import Method, of_basis, of_dictionary, of_readers
from toyfeat.language.opening import Opened, width_of
from toyfeat.language.results import Rows, own_folder
from toyfeat.language.site import Say, bases_of, check_collected, stats_of
from toyfeat.language.training import Run, finished
from toyfeat.linalg.precise import norm
from toyfeat.splicing import attribution_faithfulness
from toyfeat.types import Array, Moments, Params

_BASELINES = "pca", "gradient pca", "joint pca", "random"
_CHECKED = "pca", "random"  # baselines whose attributions are checked, too
_TOGETHER = 8  # methods that share the model's own predictions


class _Judge(NamedTuple):
    """A decoder cut at a site, and held-out text, tapped when it is first wanted."""

    cut: Halves
    held: Callable[[], Held]


def decomposed(run: Opened, say: Say = print) -> list[dict[str, Any]]:
    """Bases of a site, their spectra, and what is lost as directions are dropped.

    Args:
      run: with its stores collected.
      say: told of every result.

    Returns:
      Rows, which ``decompose.jsonl`` has too: a basis with its spectrum and its
      participation ratio, and the scores of its first directions.

    Raises:
      FileNotFoundError: if nothing was collected.
      ValueError: if a store is of other weights.
    """
    for site in run.job.collect.sites:
        check_collected(run.job, site)
    folder = own_folder(run.job, "collect", "decompose", "evaluate")
    job, rows = run.job, Rows(folder / "decompose.jsonl")
    for site in job.collect.sites:
        stats = stats_of(run, site, say)
        width = len(stats.mean)
        names = [n for n in job.decompose.bases if not _has_all(rows, site, n, run)]
        bases = bases_of(run, site, stats, names)
        for name, basis in bases.items():
            values = np.asarray(basis.spectrum, np.float64)
            ratio = float(values.sum() ** 2 / np.sum(values**2))
            if rows.add(
                {"site": site, "basis": name},
                {"spectrum": values.tolist(), "participation": ratio},
            ):
                say(f"{site}, {name}: participation ratio {ratio:.1f} of {width}")
        methods = {
            f"{name}, {rank}": of_basis(basis, rank)
            for name, basis in bases.items()
            for rank in (r for r in job.decompose.ranks if r < width)
        }
        _judged(run, _judge_of(run, site, stats), methods, rows, say)
    return rows.rows


def _has_all(rows: Rows, site: str, basis: str, run: Opened) -> bool:
    """Whether everything that :func:`decomposed` wants of a basis is known."""
    width = width_of(run.model.config, site)
    wanted: list[dict[str, Any]] = [{"site": site, "basis": basis}]
    wanted += [
        {"site": site, "method": f"{basis}, {rank}", "what": "scores"}
        for rank in run.job.decompose.ranks
        if rank < width
    ]
    return all(rows.has(where) for where in wanted)


def evaluated(run: Opened, say: Say = print) -> list[dict[str, Any]]:
    """Judge every finished dictionary of a job, and bases of as many directions.

    Args:
      run: with dictionaries trained.
      say: told of every result.

    Returns:
      Rows, which ``evaluation.jsonl`` has too.

    Raises:
      FileNotFoundError: if no dictionary is finished.
      ValueError: if the store is of other weights.
    """
    job, site = run.job, run.job.site
    check_collected(job, site)
    folder = own_folder(job, "collect", "train", "evaluate")
    rows = Rows(folder / "evaluation.jsonl")
    found = dict(finished(job.train, Path(job.out) / "train"))
    if not found:
        raise FileNotFoundError(
            f"job: {job.out} has no finished dictionary; run "
            "scripts/train_dictionary.py first"
        )
    stats = stats_of(run, site, say)
    methods: dict[str, Method] = {}
    for one, features in found.items():
        methods |= _methods_of(one, features, stats)
    baselines = {}
    for name, basis in bases_of(run, site, stats, _BASELINES).items():
        for k in (k for k in job.train.codes if k <= len(stats.mean)):
            baselines[f"{name}-k{k}"] = of_basis(basis, k)
    by = _judge_of(run, site, stats)
    _judged(run, by, methods | baselines, rows, say)
    middle = job.train.codes[len(job.train.codes) // 2]
    order = sorted(found, key=lambda one: one.k != middle)  # stable
    names = [one.name for one in order] + [f"{name}-k{middle}" for name in _CHECKED]
    every = methods | baselines
    if job.evaluate.uniform + job.evaluate.largest:
        _checked(run, by, {n: every[n] for n in names if n in every}, rows, say)
    return rows.rows


def _checked(
    run: Opened, by: _Judge, methods: dict[str, Method], rows: Rows, say: Say
) -> None:
    """Attributions of methods that were not yet compared with leaving latents out."""
    site, given = by.cut.site, run.job.evaluate
    for name, method in methods.items():
        where = {"site": site, "method": name, "what": "faithfulness"}
        if rows.has(where) or _is_dead(rows, site, name):
            continue
        begun = time.perf_counter()
        options = {"uniform": given.uniform, "largest": given.largest}
        options |= {"batch": given.pair_batch, "seed": given.seed}
        scores, effects, drawn = faithfulness(
            by.cut, run.model.params, by.held(), method, **options
        )
        parts = {"uniform": effects[:drawn], "largest": effects[drawn:]}
        more = {
            f"{part}_{score}": value
            for part, some in parts.items()
            if len(some)
            for score, value in attribution_faithfulness(*some.T)._asdict().items()
        }
        more |= {"seconds": time.perf_counter() - begun, "effects": effects.tolist()}
        rows.add(where, {**scores._asdict(), **more})
        say(
            f"{name}: attributions against leaving out, correlation "
            f"{scores.correlation:.3f}, slope {scores.slope:.2f}, error "
            f"{scores.error:.3f} over {scores.pairs} pairs"
        )


def _methods_of(run: Run, features: Path, stats: Moments) -> dict[str, Method]:
    """A dictionary, in every way in which it can choose its latents.

    By its name latents are chosen as in training.  What was trained on gradients is
    there once more with those of the loss against tokens that the model draws
    (``sampled``), and a paired dictionary by activations alone (``alone``).
    """
    sae, params = load_saelens(features)
    if "grad_scale" in params:  # of all draws together: here is one readout
        params["grad_scale"] = norm(params["grad_scale"])[None]

    def named(way: str) -> str:
        return run.name.replace(run.label, f"{run.label} {way}", 1)

    if run.kind == "gradients":
        args = sae, params, jnp.asarray(stats.mean), covariance(stats)
        return {
            run.name: of_readers(*args),
            named("sampled"): of_readers(*args, chooser=1),
        }
    found = {run.name: of_dictionary(sae, params, chooser=0)}
    if run.kind == "paired":
        alone = sae._replace(encode=_without_grads(sae.encode))
        found[named("sampled")] = of_dictionary(sae, params, chooser=1)
        found[named("alone")] = of_dictionary(alone, params)
    return found


def _without_grads(encode: Callable[..., Array]) -> Callable[..., Array]:
    def alone(params: Params, acts: Array, **options: Any) -> Array:
        return encode(params, acts, **{**options, "grads": None})

    return alone


def _is_dead(rows: Rows, site: str, method: str) -> bool:
    """Whether no latent was there at any held-out token."""
    where = {"site": site, "method": method, "what": "scores"}
    return any(
        where.items() <= row.items() and not row["l0"]
        for row in rows.rows
        if "l0" in row
    )


def _judged(
    run: Opened, by: _Judge, methods: dict[str, Method], rows: Rows, say: Say
) -> None:
    """Scores of methods that have none yet."""
    cut, site = by.cut, by.cut.site
    missing = {
        name: method
        for name, method in methods.items()
        if not rows.has({"site": site, "method": name, "what": "scores"})
    }
    if not missing:
        return
    held = by.held()
    params, batch = run.model.params, run.job.evaluate.batch
    losses = losses_of(cut, params, held, batch=batch)
    rows.add({"site": site, "what": "losses"}, losses._asdict())
    names = list(missing)
    for start in range(0, len(names), _TOGETHER):
        some = {name: missing[name] for name in names[start : start + _TOGETHER]}
        scores = judge(cut, params, held, some, losses=losses, batch=batch)
        for name, found in scores.items():
            where = {"site": site, "method": name, "what": "scores"}
            rows.add(where, found._asdict())
            say(
                f"{name}: recovered {found.recovered:.3f}, L0 {found.l0:.1f}, "
                f"attribution L0 {found.attribution_l0:.1f}, unexplained "
                f"{found.unexplained:.2f}"
            )


def _judge_of(run: Opened, site: str, stats: Moments) -> _Judge:
    cut, given = halves(run.model.config, site), run.job.evaluate

    @cache
    def held() -> Held:
        num = min(given.windows, len(run.held_out)) // given.batch * given.batch
        if not num:
            raise ValueError(
                f"job: {len(run.held_out)} held-out windows fill no batch of "
                f"{given.batch}"
            )
        return held_out(
            cut,
            run.model.params,
            run.held_out[:num],
            jnp.asarray(stats.mean),
            massive=run.job.collect.massive,
            batch=given.batch,
            beside=readout_of("sampled", seed=given.seed),
        )

    return _Judge(cut, held)
