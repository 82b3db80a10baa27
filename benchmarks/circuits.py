"""Circuit sizes of six tasks: how many latents keep a logit difference.

    python benchmarks/circuits.py --model small
    python benchmarks/circuits.py --model smollm2 --windows 256

A TopK dictionary is trained on the site of the study of ``functional.py`` with the text
of ``--windows`` windows; a task's latents are ordered on half of its prompts, and the
share that they keep is measured on the other half.  Rows go to
``out/circuits/<model>.jsonl``; a run that was cut off goes on.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from circuit_prompts import TASKS, read_task
from functional import STUDIES, open_study, train_base
from functional_taps import stored_taps
from harness import parse_command

from toyfeat.discover.circuits import find_circuit, keep_latents
from toyfeat.jobs.results import Rows
from toyfeat.jobs.workspace import Workspace
from toyfeat.lm.circuits import (
    Prompts,
    encode_prompts,
    tap_task,
    task_differences,
    task_effect,
)
from toyfeat.lm.split import split_at

SHARES = (0.9, 0.95)


@dataclass(frozen=True)
class Settings:
    """What is run."""

    model: Literal["small", "smollm2"] = "small"
    out: Path = Path("out/circuits")
    windows: int = 0
    """Of the dictionary's text; as many as the study has by default."""
    methods: tuple[str, ...] = ("attribution", "integrated", "mask")
    tasks: tuple[str, ...] = tuple(TASKS)
    seed: int = 0
    steps: int = 10
    """Of the two last methods."""
    error: bool = False
    """Keep the reconstruction error, so that the model is the dictionary with it."""


def interval(values: np.ndarray) -> list[float]:
    """Compute the 95 % bootstrap interval of a mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


def select(prompts: Prompts, rows: slice) -> Prompts:
    """Take some prompts."""
    return Prompts(*(x[rows] for x in prompts))


def measure_task(
    work: Workspace, site: str, sae: Any, tensors: Any, baseline: Any, prompts: Prompts,
    settings: Settings, add: Any,
) -> None:  # fmt: skip
    """Find circuits on every other prompt, and test them on the others."""
    split, params = split_at(work.model.config, site), work.model.params
    differences = task_differences(work.model.config, site, sae, error=settings.error)
    run = jax.jit(differences)
    halves = [
        tap_task(
            split, params, select(prompts, slice(i, None, 2)), sae, tensors, baseline
        )
        for i in (0, 1)
    ]
    own = [np.asarray(run(half, None), np.float64) for half in halves]
    both = np.concatenate(own)
    none, whole = jnp.zeros(sae.config.d_sae), jnp.ones(sae.config.d_sae)
    empty = np.asarray(run(halves[1], none), np.float64)
    kept = np.asarray(run(halves[1], whole), np.float64)
    add("model", {
        "difference": float(both.mean()),
        "interval": interval(both),
        "right": float((both > 0).mean()),
        "none": float(empty.mean()),
        "whole_kept": float((kept - empty).mean() / (own[1] - empty).mean()),
    })  # fmt: skip
    for method in settings.methods:
        began = time.process_time()
        circuit = find_circuit(
            task_effect(differences), halves[0], sae.config.d_sae,
            whole=own[0].mean(), shares=SHARES, method=method, steps=settings.steps,
            precision=0.05,
        )  # fmt: skip
        values: dict[str, Any] = {"cpu": time.process_time() - began}
        values["most_kept"] = float(circuit.kept.max())
        for share, size in zip(SHARES, circuit.sizes, strict=True):
            name = f"{100 * share:.0f}"
            values[f"size_{name}"] = size
            if size is None:
                continue
            mask = jnp.asarray(keep_latents(circuit, share))
            there = np.asarray(run(halves[1], mask), np.float64) - empty
            scale = (own[1] - empty).mean()
            values[f"test_{name}"] = float(there.mean() / scale)
            values[f"test_{name}_interval"] = interval(there / scale)
        add(method, values)


def main(settings: Settings) -> None:
    """Train a dictionary, and find the circuits of the tasks."""
    sizes, folder = STUDIES[settings.model], settings.out / settings.model
    windows = settings.windows or sizes.base
    study = sizes._replace(base=windows)
    work = open_study(study, folder)
    taps = stored_taps(
        work, sizes.site, sizes.tap_batch, folder / "taps", "acts", slice(0, windows)
    )
    sae, tensors = train_base(study, taps, settings.seed, folder)
    acts = jnp.asarray(taps["acts"][taps["weights"] > 0][:8192])
    baseline = jnp.mean(sae.encode(tensors, acts), axis=0)
    rows = Rows(settings.out / f"{settings.model}.jsonl")
    start = work.tokens[0, 0]
    for task in settings.tasks:
        key = {"task": task, "seed": settings.seed, "error": int(settings.error)}
        if all(rows.has({**key, "row": name}) for name in settings.methods):
            continue

        def add(name: str, values: dict[str, Any], key: Any = key) -> None:
            rows.add({**key, "row": name}, values)
            print(key, name, values, flush=True)

        prompts = encode_prompts(read_task(task), work.model.tokenizer, start)
        measure_task(work, sizes.site, sae, tensors, baseline, prompts, settings, add)


if __name__ == "__main__":
    main(parse_command(Settings, __doc__))
