"""Jacobians of single prompts of a language model, in a folder, for all that follows.

Every prompt's file has the rows of its mean Jacobian at every layer, cluster by cluster
of activations, so that fits of any of the prompts are sums of files.  The same command
goes on where it was stopped.

    python benchmarks/lens_prompts.py --out out/lens/rows --rows 16 --clusters 8
    python benchmarks/lens_prompts.py --out out/lens/whole --length 40 --skip-first 8

``benchmarks/lens_error.py`` and ``benchmarks/lens_recall.py`` read the folders.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import parse_command

import toyfeat as ft
from toyfeat.jobs.config import read_job
from toyfeat.jobs.workspace import Workspace, open_job
from toyfeat.lens.averages import add_prompts, empty_means
from toyfeat.lens.clusters import nearest
from toyfeat.lens.fits import JacobianState
from toyfeat.lens.pullbacks import valid_positions


@dataclass(frozen=True)
class PromptsConfig:
    """Options of this command."""

    out: Path
    """Folder of the prompts."""
    job: Path = Path("examples/smollm2_lens.toml")
    """Model and text."""
    num: int = 64
    """Prompts to fit."""
    length: int = 128
    """Tokens of a prompt."""
    skip_first: int = 16
    """Tokens left out at the start."""
    rows: int = 0
    """Rows of a random orthonormal basis, the same for all prompts; 0: all, exactly."""
    clusters: int = 2
    """Clusters of activations at every layer."""
    population: int = 400
    """Prompts of the population, by whose activations clusters are made and weighed."""
    seed: int = 0
    """Of the basis and the clusters."""


class Text(NamedTuple):
    """A model and prompts.

    Attributes:
      work: the job.
      model: lens model.
      tokens: ``[num, T]``, those that are fitted and then the rest of the population.
    """

    work: Workspace
    model: ft.lenses.LensModel
    tokens: np.ndarray


def open_text(config: PromptsConfig) -> Text:
    """Open the model, and cut the text of the job into prompts."""
    job = read_job(config.job)
    most = max(config.num, config.population)
    collect = replace(job.collect, tokens=most * config.length, length=config.length)
    work = open_job(replace(job, collect=collect))
    return Text(work, ft.lenses.from_decoder(work.model.config), work.tokens)


def measure_clusters(
    config: PromptsConfig, text: Text
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Make centres ``{site: [E, D]}``, and shares of the prompts ``[num, L, E]``."""
    sites = text.model.sites[:-1]
    valid = np.asarray(
        valid_positions(jnp.ones((1, config.length)), config.skip_first, 1)
    )
    start, stop = np.flatnonzero(valid[0])[[0, -1]]

    @jax.jit
    def streams(params: Any, tokens: Any) -> dict[str, Any]:
        acts = text.model.probed(params, tokens, {})[1]
        return {site: acts[site][:, start : stop + 1] for site in sites}

    parts = [
        jax.tree.map(np.asarray, streams(text.work.model.params, tokens[None]))
        for tokens in text.tokens[: config.population]
    ]
    centres, shares = {}, []
    keys = jax.random.split(jax.random.key(config.seed), len(sites))
    for key, site in zip(keys, sites, strict=True):
        acts = np.concatenate([part[site] for part in parts])
        # Every eighth activation is enough for a centre.
        rows = jnp.asarray(acts.reshape(-1, acts.shape[-1])[::8])
        centres[site] = ft.lenses.cluster_centres(key, rows, config.clusters)
        shares.append(
            np.asarray(nearest(jnp.asarray(acts), centres[site])).mean(axis=1)
        )
    return jax.tree.map(np.asarray, centres), np.stack(shares, axis=1)


def fit_prompts(config: PromptsConfig, text: Text, centres: dict[str, Any]) -> None:
    """Write the rows of every prompt that has no file yet."""
    dim = text.work.model.config.dim
    acc = ft.lenses.mean_jacobian(
        text.model,
        dim,
        skip_first=config.skip_first,
        cotangents=config.rows or None,
        key=jax.random.key(config.seed),
        centres=centres,
    )
    # An empty state every time: each prompt is given the first rows of the basis.
    empty = acc.init()
    update = jax.jit(acc.update)
    if empty.basis is not None:
        np.save(config.out / "basis.npy", np.asarray(empty.basis[: config.rows]))
    for number in range(config.num):
        path = config.out / f"prompt_{number:04d}.npz"
        if path.exists():
            continue
        start, used = time.perf_counter(), time.process_time()
        state = update(empty, text.work.model.params, text.tokens[number : number + 1])
        means = [state.means[site] for site in text.model.sites[:-1]]
        rows = np.stack([np.asarray(mean.mean[0, :, 0]) for mean in means])
        weights = np.stack([np.asarray(mean.weight[0, :, 0]) for mean in means])
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, rows=rows, weights=weights)
        part.rename(path)
        seconds = time.perf_counter() - start, time.process_time() - used
        print(
            f"{path.name}: {seconds[0]:.1f} s, {seconds[1]:.1f} s of cores", flush=True
        )


def read_state(folder: Path, sites: Sequence[str], numbers: Sequence[int]) -> Any:
    """Make the state of a fit of the prompts of a folder, without clusters."""
    matrices = []
    for number in numbers:
        with np.load(folder / f"prompt_{number:04d}.npz") as file:
            matrices.append(np.einsum("le,leij->lij", file["weights"], file["rows"]))
    # One program for all sites.
    add = jax.jit(add_prompts)
    half, group = np.arange(len(numbers)) % 2, np.zeros(len(numbers), int)
    weights = np.ones((len(numbers), 1), np.float32)
    means = {}
    for layer, site in enumerate(sites):
        rows = np.stack([x[layer] for x in matrices])[:, None]
        empty = empty_means(1, 1, rows.shape[-1])
        means[site] = add(empty, rows, weights, half, group)
    return JacobianState(jnp.asarray(len(numbers)), None, means)


def list_prompts(folder: Path) -> list[int]:
    """List the numbers of the prompts of a folder."""
    return sorted(int(path.stem[-4:]) for path in folder.glob("prompt_*.npz"))


def main() -> None:
    """Measure the clusters, then prompt after prompt."""
    config = parse_command(PromptsConfig, __doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    text = open_text(config)
    settings = {k: str(v) for k, v in vars(config).items() if k not in ("num", "out")}
    about = config.out / "settings.json"
    if about.exists() and json.loads(about.read_text("utf-8")) != settings:
        raise SystemExit(f"lens_prompts: {config.out} has prompts of other settings")
    about.write_text(json.dumps(settings), encoding="utf-8")
    if not (config.out / "centres.npz").exists():
        centres, shares = measure_clusters(config, text)
        np.save(config.out / "shares.npy", shares)
        arrays: dict[str, Any] = dict(centres)
        np.savez(config.out / "centres.npz", **arrays)
    centres = {
        site: jnp.asarray(x) for site, x in np.load(config.out / "centres.npz").items()
    }
    fit_prompts(config, text, centres)


if __name__ == "__main__":
    main()
