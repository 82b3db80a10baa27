"""The steps of a job on a language model, each of which goes on where it stopped."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint import load_tree, save_tree
from toyfeat.data.store import Store, open_store, shard_taps, store_size
from toyfeat.decompose import gradient_pca, joint_pca, pca
from toyfeat.decompose.second_moments import covariance
from toyfeat.interop import load_saelens
from toyfeat.language.collecting import (
    ReadoutOf,
    collect,
    fingerprint,
    readout_of,
    site_folder,
    store_moments,
    tapped,
)
from toyfeat.language.contexts import Latent, latents_of, of_acts, of_grads
from toyfeat.language.halves import Halves, checked_site, halves
from toyfeat.language.jobs import Job
from toyfeat.language.judging import Held, faithfulness, held_out, judge, losses_of
from toyfeat.language.methods import Method, of_basis, of_dictionary, of_readers
from toyfeat.language.results import Rows, own_folder
from toyfeat.language.sources import located, texts_of
from toyfeat.language.training import finished, runs_of, train_one
from toyfeat.linalg.precise import norm
from toyfeat.models.decoder import (
    Decoder,
    DecoderConfig,
    Pretrained,
    load_decoder,
    token_windows,
)
from toyfeat.splicing import attribution_faithfulness
from toyfeat.tap import from_linen
from toyfeat.types import Array, Basis, Moments, Params, Probed

Say = Callable[[str], None]
RANKS = (1, 4, 16, 64, 256)
_TOGETHER = 8  # methods that share the model's own predictions


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


class _Judge(NamedTuple):
    """A decoder cut at a site, and held-out text, tapped when it is first wanted."""

    cut: Halves
    held: Callable[[], Held]


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
    model = load_decoder(located(job.model))
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
    widths = [_width(config, site) for site in given.sites]
    total = sum(
        store_size(
            run.tokens.size,
            dim=width,
            readouts=_readouts(run.job),
            dtype=given.dtype,
            rows_per_shard=given.rows_per_shard,
        )
        for width in widths
    )
    return f"{run.tokens.size:,} tokens at {len(widths)} sites, {total / 1e6:,.0f} MB"


def seconds_per_token(run: Opened) -> float:
    """Measured on one batch, after one that compiles what collecting runs."""
    given = run.job.collect
    place = _probed(run), given.sites, _readout(run.job), given.massive
    part = jnp.asarray(run.tokens[: given.batch])
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        jax.block_until_ready(tapped(*place, run.model.params, part, 0))
        times.append(time.perf_counter() - begun)
    return times[-1] / part.size


def collected(
    run: Opened, report: Callable[[int, int], None] = lambda done, rows: None
) -> dict[str, Store]:
    """Store activations and gradients of the training text, and their moments.

    Args:
      run: from :func:`opened`.
      report: called with the tokens done and all of them.

    Returns:
      Site to store.
    """
    given, folder = run.job.collect, own_folder(run.job, "collect")
    metadata = {
        "model_name": run.model.name,
        "weights": fingerprint(run.model.params),
        "readout": given.readout,
        "draws": given.draws if given.readout == "sampled" else 1,
        "compute": given.compute,
    }
    stores = collect(
        _probed(run),
        run.model.params,
        run.tokens,
        given.sites,
        folder / "stores",
        readout=_readout(run.job),
        batch=given.batch,
        dtype=given.dtype,
        rows_per_shard=given.rows_per_shard,
        massive=given.massive,
        metadata=metadata,
        report=report,
    )
    for site, store in stores.items():
        path = folder / "moments" / site_folder(site)
        if not path.exists():
            save_tree(path, store_moments(store))
    return stores


def left_out(store: Store) -> int:
    """Tokens between the first and the last of a window that do not count.

    Their activations are massive (``collect.massive``).
    """
    num = 0
    for index in range(len(store.shards)):
        num += int(np.sum(np.asarray(shard_taps(store, index).weights) == 0))
    return num - 2 * (store.rows // store.metadata["length"])


def store_of(job: Job, site: str) -> tuple[Store, Moments]:
    """A site's store and moments.

    Raises:
      FileNotFoundError: if nothing was collected there.
    """
    folder, name = Path(job.out), site_folder(site)
    if not (folder / "moments" / name).exists():
        raise FileNotFoundError(
            f"job: {job.out} has nothing of {site!r} yet; run scripts/collect.py first"
        )
    store = open_store(folder / "stores" / name)
    shapes = jax.eval_shape(lambda: store_moments_like(store.dim))
    return store, load_tree(folder / "moments" / name, shapes)


def store_moments_like(dim: int) -> Moments:
    """The shape of a store's moments."""
    zeros = jnp.zeros((dim, dim))
    return Moments(jnp.zeros(()), zeros[0], zeros, zeros[0], zeros)


def trained(job: Job, say: Say = print) -> None:
    """Train every dictionary of a job that is not finished.

    Args:
      job: with its store collected.
      say: told of every one.
    """
    into = own_folder(job, "collect", "train") / "train"
    store, _ = store_of(job, job.site)
    for run in runs_of(job.train):
        folder = into / run.name
        if (folder / "features" / "cfg.json").exists():
            continue
        begun, last = time.perf_counter(), {}

        def keep(step: int, means: Any, *_: Any, last: dict = last) -> None:
            last.update(means)

        train_one(run, job.train, store, folder, on_chunk=keep)
        shown = ", ".join(
            f"{name} {float(np.mean(last[name])):.3g}"
            for name in ("fvu", "l0", "dead")
            if name in last
        )
        say(f"{run.name}: {shown}, {time.perf_counter() - begun:.0f} s")


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
    folder = own_folder(run.job, "collect", "evaluate")
    job, rows = run.job, Rows(folder / "decompose.jsonl")
    for site in job.collect.sites:
        _, stats = _own_store(run, site)
        width = len(stats.mean)
        bases = bases_of(stats)
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
            for rank in (r for r in RANKS if r < width)
        }
        _judged(run, _judge_of(run, site, stats), methods, rows, say)
    return rows.rows


def bases_of(stats: Moments) -> dict[str, Basis]:
    """PCA of activations, of gradients and of both, and random directions."""
    width = len(stats.mean)
    random = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (width, width)))[0]
    plain = pca(stats, width)
    return {
        "pca": plain,
        "gradient pca": gradient_pca(stats, width),
        "joint pca": joint_pca(stats, width),
        "random": plain._replace(
            readers=random, writers=random.T, spectrum=jnp.ones(width)
        ),
    }


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
    folder = own_folder(run.job, "collect", "train", "evaluate")
    job, rows = run.job, Rows(folder / "evaluation.jsonl")
    site = job.site
    _, stats = _own_store(run, site)
    found = dict(finished(job.train, Path(job.out) / "train"))
    if not found:
        raise FileNotFoundError(
            f"job: {job.out} has no finished dictionary; run "
            "scripts/train_dictionary.py first"
        )
    methods: dict[str, Method] = {}
    for one, features in found.items():
        sae, params = load_saelens(features)
        if "grad_scale" in params:  # of all draws together: here is one readout
            params["grad_scale"] = norm(params["grad_scale"])[None]
        if one.kind == "gradients":
            methods[one.name] = of_readers(
                sae, params, jnp.asarray(stats.mean), covariance(stats)
            )
        else:
            methods[one.name] = of_dictionary(sae, params)
        if one.kind == "paired":  # chosen by activations alone
            alone = sae._replace(encode=_without_grads(sae.encode))
            methods[one.name.replace("paired", "paired alone")] = of_dictionary(
                alone, params
            )
    for name, basis in bases_of(stats).items():
        for k in (k for k in job.train.codes if k <= len(stats.mean)):
            methods[f"{name}-k{k}"] = of_basis(basis, k)
    by = _judge_of(run, site, stats)
    _judged(run, by, methods, rows, say)
    given = job.evaluate
    for one in found:
        where = {"site": site, "method": one.name, "what": "faithfulness"}
        if rows.has(where) or _is_dead(rows, site, one.name):
            continue
        begun = time.perf_counter()
        options = {"uniform": given.uniform, "largest": given.largest}
        options |= {"batch": given.pair_batch, "seed": given.seed}
        scores, effects, drawn = faithfulness(
            by.cut, run.model.params, by.held(), methods[one.name], **options
        )
        parts = {"uniform": effects[:drawn], "largest": effects[drawn:]}
        more = {
            f"{name}_{score}": value
            for name, some in parts.items()
            if len(some)
            for score, value in attribution_faithfulness(*some.T)._asdict().items()
        }
        more |= {"seconds": time.perf_counter() - begun, "effects": effects.tolist()}
        rows.add(where, {**scores._asdict(), **more})
        say(
            f"{one.name}: attributions against leaving out, correlation "
            f"{scores.correlation:.3f}, slope {scores.slope:.2f}, error "
            f"{scores.error:.3f} over {scores.pairs} pairs"
        )
    return rows.rows


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


def looked_at(run: Opened, *, num: int = 24) -> dict[str, list[Latent]]:
    """Latents of the finished dictionaries of a job, of one seed and number of codes.

    Args:
      run: with dictionaries trained.
      num: latents of each.

    Returns:
      Name to :class:`Latent`, those with the largest effects.
    """
    job, site = run.job, run.job.site
    store, stats = _own_store(run, site)
    spread, mean = covariance(stats), jnp.asarray(stats.mean)
    first = job.train.seeds[0], job.train.codes[len(job.train.codes) // 2]
    residual = not site.endswith("mlp_hidden")
    found = {}
    for one, features in finished(job.train, Path(job.out) / "train"):
        if (one.seed, one.k) != first:
            continue
        sae, params = load_saelens(features)
        described = of_acts(sae, params)
        if one.kind == "gradients":
            described = of_grads(sae, params, mean, spread)
        found[one.name] = latents_of(
            described, store, run.tokens, run.model, residual=residual, num=num
        )
    return found


def _own_store(run: Opened, site: str) -> tuple[Store, Moments]:
    """:func:`store_of` a job, of the very weights that are open."""
    store, stats = store_of(run.job, site)
    if store.metadata["weights"] != fingerprint(run.model.params):
        raise ValueError(
            f"job: {store.path} was written by other weights than those of "
            f"{run.job.model}; give the model it was, or another folder as out"
        )
    return store, stats


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
        )

    return _Judge(cut, held)


def _probed(run: Opened) -> Probed:
    return _decoder(run.model.config, run.job.collect.compute)


def _readout(job: Job) -> ReadoutOf:
    given = job.collect
    return _named(given.readout, given.draws, given.seed)


# The same objects for the same settings, so that what they are in is compiled once.
@cache
def _decoder(config: DecoderConfig, compute: str) -> Probed:
    return from_linen(Decoder(config, dtype=jnp.dtype(compute)))


@cache
def _named(kind: str, draws: int, seed: int) -> ReadoutOf:
    return readout_of(kind, draws=draws, seed=seed)


def _readouts(job: Job) -> int:
    return job.collect.draws if job.collect.readout == "sampled" else 1


def _width(config: DecoderConfig, site: str) -> int:
    return config.hidden if site.endswith("mlp_hidden") else config.dim
