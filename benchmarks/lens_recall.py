"""Whether lenses find intermediate answers in a language model.

Six sets of prompts (``benchmarks/data/lens``), each with the one token of an
intermediate answer and a position where it should show.  Recall is the share of items
whose intermediate answer is among the ``k`` likeliest tokens of a lens, at every layer,
and at the best layer of each item.  Intervals are by the bootstrap over items, of a
lens and of its difference from the logit lens.  Controls: a Jacobian lens whose
``J - I`` is turned at random, of the same spectrum, and the intermediate answers of
other items.

    python benchmarks/lens_prompts.py --out out/lens/whole --length 40 --skip-first 8
    python benchmarks/lens_recall.py --folder out/lens/whole --json rows.jsonl
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, bootstrap_interval, finish, parse_command, row
from lens_prompts import list_prompts, read_state
from lens_sets import KINDS, LENGTH, Items, others, read_items

import toyfeat as ft
from toyfeat.jobs.config import read_job
from toyfeat.jobs.workspace import Workspace, open_job
from toyfeat.lens.maps import LensMap
from toyfeat.lens.reading import Lens, make_lens

KS = (1, 10)


@dataclass(frozen=True)
class OpenConfig(BenchmarkConfig):
    """What is opened."""

    folder: Path | None = None
    """Jacobians of single prompts, of ``lens_prompts.py``."""
    files: tuple[Path, ...] = ()
    """Lens files, read too."""
    job: Path = Path("examples/smollm2_lens.toml")
    """Model and text."""
    batch: int = 16
    """Items at a time."""


@dataclass(frozen=True)
class RecallConfig(OpenConfig):
    """Options of this benchmark."""

    every: int = 4
    """One of so many layers is read, from the first one on."""
    full: bool = False
    """Whether to read with the shrunken, least-squares and clustered lenses too."""


class Setup(NamedTuple):
    """Model, lenses and test sets.

    Attributes:
      work: the job.
      model: lens model.
      lenses: by name.
      sets: by kind.
    """

    work: Workspace
    model: ft.lenses.LensModel
    lenses: dict[str, Lens]
    sets: dict[str, Items]


def least_squares_lens(
    model: ft.lenses.LensModel, params: Any, tokens: np.ndarray, skip: int
) -> Lens:
    """Fit the affine map from every stream to the final one by least squares."""
    streams = jax.jit(lambda p, x: model.probed(p, x, {})[1])
    parts: dict[str, list[np.ndarray]] = {site: [] for site in model.sites}
    for start in range(0, len(tokens), 8):
        acts = streams(params, tokens[start : start + 8])
        for site in model.sites:
            parts[site].append(
                np.asarray(acts[site][:, skip:]).reshape(-1, acts[site].shape[-1])
            )
    final = np.concatenate(parts.pop(model.sites[-1])).astype(np.float64)
    maps = {}
    for site, blocks in parts.items():
        acts = np.concatenate(blocks).astype(np.float64)
        mean, goal = acts.mean(axis=0), final.mean(axis=0)
        gram = (acts - mean).T @ (acts - mean)
        # A ridge of 1e-3 of the mean variance, for directions that hardly vary.
        ridge = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        matrix = np.linalg.solve(gram + ridge, (acts - mean).T @ (final - goal)).T
        bias = goal - matrix @ mean
        maps[site] = LensMap(
            jnp.asarray(matrix, jnp.float32)[None], bias=jnp.asarray(bias, jnp.float32)
        )
    return make_lens(model, params, "tuned", maps, {"estimator": "least squares"})


def turned(key: Any, estimate: ft.lenses.Estimate) -> ft.lenses.Estimate:
    """Turn ``J - I`` at random: the same spectrum, other directions."""
    matrices = {}
    for site, matrix in estimate.matrices.items():
        key, *keys = jax.random.split(key, 3)
        eye = np.eye(len(matrix), dtype=np.float32)
        left, right = (
            np.linalg.qr(np.asarray(jax.random.normal(k, eye.shape)))[0] for k in keys
        )
        matrices[site] = jnp.asarray(eye + left @ (np.asarray(matrix) - eye) @ right)
    return estimate._replace(matrices=matrices)


def open_lenses(
    config: OpenConfig, work: Workspace, model: Any, *, every_lens: bool
) -> dict[str, Lens]:
    """Make the logit lens, those of files, the Jacobian lens and its control, or all.

    A tuned lens of one of so many layers is read where it has maps.
    """
    params, sites = work.model.params, model.sites[:-1]
    lenses = {"logit": ft.lenses.logit_lens(model, params)}
    for path in config.files:
        lens = ft.lenses.load(path, model, params)
        lenses["frozen " * bool(lens.about.get("frozen")) + lens.kind] = lens
    if config.folder is None:
        return lenses
    state = read_state(config.folder, sites, list_prompts(config.folder))
    acc = ft.lenses.mean_jacobian(model, work.model.config.dim)
    estimate = jax.jit(acc.finish)(state)
    random = turned(jax.random.key(0), estimate)
    lenses |= {
        "jacobian": ft.lenses.jacobian_lens(model, params, estimate),
        "jacobian, turned": ft.lenses.jacobian_lens(model, params, random),
    }
    if every_lens:
        shrunken = ft.lenses.shrunken(state)
        lenses |= {
            "jacobian, shrunken": ft.lenses.jacobian_lens(model, params, shrunken),
            "least squares": least_squares_lens(model, params, work.tokens, 8),
            **clustered_lenses(config.folder, model, params),
        }
    return lenses


def clustered_lenses(folder: Path, model: Any, params: Any) -> dict[str, Lens]:
    """Make the lenses of the clusters of a folder of prompts."""
    sums: Any = 0.0
    total: Any = 0.0
    for number in list_prompts(folder):
        with np.load(folder / f"prompt_{number:04d}.npz") as file:
            weights = file["weights"]
            sums = sums + weights[:, :, None, None] * file["rows"]
            total = total + weights
    sites = model.sites[:-1]
    experts = sums / np.maximum(total, 1e-9)[:, :, None, None]
    matrices = {s: jnp.asarray(x) for s, x in zip(sites, experts, strict=True)}
    nan = dict.fromkeys(sites, jnp.full(total.shape[1], jnp.nan))
    found = ft.lenses.Estimate(
        matrices, nan, nan, nan, jnp.asarray(len(list_prompts(folder)))
    )
    with np.load(folder / "centres.npz") as file:
        centres = {site: jnp.asarray(file[site]) for site in sites}
    shares = {s: jnp.asarray(x) for s, x in zip(sites, total, strict=True)}
    return {
        "clustered": ft.lenses.clustered_lens(model, params, found, centres),
        "contrast": ft.lenses.contrast_lens(model, params, found, shares),
    }


class Compiled(NamedTuple):
    """Two steps of reading, compiled once for all sets.

    Attributes:
      streams: ``(tokens [B, T], at [B]) -> {site: [B, D]}``.
      ranks: ``(final streams [B, D], tokens [B, n]) -> [B, n]``, 0 the likeliest.
    """

    streams: Any
    ranks: Any


def compile_reading(setup: Setup) -> Compiled:
    """Compile the two steps of reading."""
    model, params = setup.model, setup.work.model.params

    @jax.jit
    def streams(params: Any, tokens: Any, at: Any) -> Any:
        acts = model.probed(params, tokens, {})[1]
        return {s: acts[s][jnp.arange(len(at)), at] for s in model.sites}

    @jax.jit
    def ranks(params: Any, moved: Any, tokens: Any) -> Any:
        logits = model.unembed(params, moved)  # [B, V]
        chosen = jnp.take_along_axis(logits, tokens, axis=1)  # [B, n]
        return jnp.sum(logits[:, None] > chosen[:, :, None], axis=2)

    return Compiled(partial(streams, params), partial(ranks, params))


def measure_ranks(
    setup: Setup, compiled: Compiled, config: RecallConfig, items: Items
) -> dict[str, np.ndarray]:
    """Ranks ``[num, layers, 4]`` of intermediate answers by every lens.

    The first of the four is the item's own, the others those of other items.
    """
    model = setup.model
    sites = [*model.sites[:-1][:: config.every], model.sites[-1]]
    # Later positions change nothing at earlier ones.
    stop = max(int(x.at.max()) for x in setup.sets.values()) + 1
    num = len(items.at)
    other = np.stack([others(items.intermediate, shift) for shift in range(3)], 1)
    wanted = np.concatenate([items.intermediate[:, None], other], axis=1)
    found: dict[str, list] = {name: [] for name in setup.lenses}
    for start in range(0, num, config.batch):
        index = np.minimum(np.arange(start, start + config.batch), num - 1)
        acts = compiled.streams(items.tokens[index, :stop], items.at[index])
        for name, lens in setup.lenses.items():
            parts = [
                np.asarray(
                    compiled.ranks(lens.transport(site, acts[site]), wanted[index])
                )
                for site in sites
            ]
            found[name].append(np.stack(parts, axis=1))  # [B, L, n]
    return {name: np.concatenate(parts)[:num] for name, parts in found.items()}


def recall_rows(
    kind: str, ranks: dict[str, np.ndarray], size: Mapping[str, int]
) -> list[dict]:
    """Make a row per lens and ``k``; the final stream is the model, no lens."""
    rows = []
    for k in KS:
        hits = {name: x[:, :-1, 0] < k for name, x in ranks.items()}
        best = {name: x.any(axis=1).astype(float) for name, x in hits.items()}
        for name, x in ranks.items():
            chance = (x[:, :-1, 1:] < k).any(axis=1).mean(axis=1)
            margin = best[name] - best["logit"]
            rows.append(
                row(
                    kind,
                    size,
                    name,
                    k=k,
                    recall=float(best[name].mean()),
                    interval=bootstrap_interval(best[name]),
                    over_logit=float(margin.mean()),
                    over_logit_interval=bootstrap_interval(margin),
                    other_answers=float(chance.mean()),
                    model_output=float((x[:, -1, 0] < k).mean()),
                    layers=[round(float(v), 4) for v in hits[name].mean(axis=0)],
                )
            )
    return rows


def open_setup(config: OpenConfig, *, every_lens: bool) -> Setup:
    """Open the model, the lenses and the test sets."""
    job = read_job(config.job)
    collect = replace(job.collect, tokens=128 * LENGTH, length=LENGTH)
    work = open_job(replace(job, collect=collect))
    model = ft.lenses.from_decoder(work.model.config)
    kinds = KINDS[:1] if config.tiny else KINDS
    sets = {k: read_items(k, work.model.tokenizer, job.collect.start) for k in kinds}
    lenses = open_lenses(config, work, model, every_lens=every_lens)
    return Setup(work, model, lenses, sets)


def main() -> None:
    """Read all sets by all lenses."""
    config = parse_command(RecallConfig, __doc__)
    setup = open_setup(config, every_lens=config.full)
    rows, compiled = [], compile_reading(setup)
    for kind, items in setup.sets.items():
        ranks = measure_ranks(setup, compiled, config, items)
        prompts = len(list_prompts(config.folder)) if config.folder else 0
        size = {"items": len(items.at), "prompts": prompts}
        rows += recall_rows(kind, ranks, {**size, "every": config.every})
        for line in rows[-len(ranks) * len(KS) :]:
            names = "case", "method", "k", "recall", "interval", "other_answers"
            print(*(line[name] for name in names), flush=True)
    finish(rows, [], config.json)


if __name__ == "__main__":
    main()
