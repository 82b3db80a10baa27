"""Circuit sizes of six tasks: how many latents keep a logit difference.

    python benchmarks/circuits.py --model small
    python benchmarks/circuits.py --model smollm2 --windows 256
    python benchmarks/circuits.py --model large --dictionary "shared 0"

A TopK dictionary is trained on the site of the study of ``functional.py`` with the text
of ``--windows`` windows, or is one that ``functional.py`` has fine-tuned and kept in
``--study``; a task's latents are ordered on half of its prompts, and the
share that they keep is measured on the other half.  Rows go to
``out/circuits/<model>.jsonl``; a run that was cut off goes on.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from circuit_prompts import TASKS, read_task
from functional import open_study, train_base
from functional_kept import kept_params
from functional_sizes import STUDIES, Sizes, make_sae, taps_folder
from functional_taps import stored_taps
from harness import bootstrap_interval, parse_command

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
from toyfeat.types import Array, Params

SHARES = (0.9, 0.95)
Method = Literal["attribution", "integrated", "mask"]


@dataclass(frozen=True)
class Settings:
    """What is run."""

    model: Literal["small", "smollm2", "large"] = "small"
    out: Path = Path("out/circuits")
    windows: int = 0
    """Of the dictionary's text; as many as the study has by default."""
    dictionary: str = ""
    """Row of the study whose dictionary is taken, ``topk`` before fine-tuning."""
    study: Path = Path("out/functional")
    """Folder of ``functional.py`` with that dictionary."""
    methods: tuple[Method, ...] = ("attribution", "integrated", "mask")
    tasks: tuple[str, ...] = tuple(TASKS)
    seed: int = 0
    steps: int = 10
    """Of the two last methods."""
    error: bool = False
    """Keep the reconstruction error, so that the model is the dictionary with it."""


def select(prompts: Prompts, rows: slice) -> Prompts:
    """Take some prompts."""
    return Prompts(*(x[rows] for x in prompts))


class Half(NamedTuple):
    """Half of the prompts of a task, and what the model does on each.

    Attributes:
      data: of an effect.
      own: ``[P]``, differences of the model itself.
      empty: ``[P]``, with every latent at the baseline.
    """

    data: Any
    own: np.ndarray
    empty: np.ndarray


def measure_model(halves: list[Half], run: Any, latents: int) -> dict[str, Any]:
    """Measure the task itself, and what the whole dictionary keeps of it."""
    both = np.concatenate([half.own for half in halves])
    other = halves[1]
    scale = (other.own - other.empty).mean()
    kept = np.asarray(run(other.data, jnp.ones(latents)), np.float64)
    return {
        "difference": float(both.mean()),
        "interval": bootstrap_interval(both),
        "right": float((both > 0).mean()),
        "none": float(other.empty.mean()),
        "whole_kept": float((kept - other.empty).mean() / scale),
    }


def measure_method(
    halves: list[Half], run: Any, effect: Any, latents: int, method: Method, steps: int
) -> dict[str, Any]:
    """Find circuits on the first half of the prompts, and test them on the second."""
    first, other = halves
    began = time.process_time()
    whole = float(first.own.mean())
    options: dict[str, Any] = {"method": method, "steps": steps, "precision": 0.05}
    circuit = find_circuit(
        effect, first.data, latents, whole=whole, shares=SHARES, **options
    )
    values: dict[str, Any] = {"cpu": time.process_time() - began}
    values["most_kept"] = float(circuit.kept.max())
    scale = (other.own - other.empty).mean()
    for share, size in zip(SHARES, circuit.sizes, strict=True):
        name = f"{100 * share:.0f}"
        values[f"size_{name}"] = size
        if size is not None:
            mask = jnp.asarray(keep_latents(circuit, share))
            there = np.asarray(run(other.data, mask), np.float64) - other.empty
            values[f"test_{name}"] = float(there.mean() / scale)
            values[f"test_{name}_interval"] = bootstrap_interval(there / scale)
    return values


def make_dictionary(
    settings: Settings, sizes: Sizes
) -> tuple[Workspace, Any, Params, Array]:
    """Train a dictionary, or read one of the study; return the mean codes as well."""
    row, kept = settings.dictionary, settings.study / settings.model
    folder = kept if row else settings.out / settings.model
    windows = settings.windows or (256 if row else sizes.base)
    study = sizes._replace(base=windows)
    work, part = open_study(study, folder), slice(0, windows)
    place = taps_folder(settings.study if row else settings.out, settings.model)
    taps = stored_taps(work, sizes.site, sizes.tap_batch, place, "acts", part)
    acts = jnp.asarray(taps["acts"][taps["weights"] > 0][:8192])
    if row:
        sae = make_sae(sizes, acts.shape[1])
        tensors = kept_params(kept, row, settings.seed)
    else:
        sae, tensors = train_base(study, taps, settings.seed, folder)
    return work, sae, tensors, jnp.mean(sae.encode(tensors, acts), axis=0)


def main(settings: Settings) -> None:
    """Train a dictionary, and find the circuits of the tasks."""
    sizes = STUDIES[settings.model]
    work, sae, tensors, baseline = make_dictionary(settings, sizes)
    rows = Rows(settings.out / f"{settings.model}.jsonl")
    config, params = work.model.config, work.model.params
    split, latents = split_at(config, sizes.site), sae.config.d_sae
    differences = task_differences(config, sizes.site, sae, error=settings.error)
    run, effect = jax.jit(differences), task_effect(differences)

    def tap_half(prompts: Prompts, first: int) -> Half:
        part = select(prompts, slice(first, None, 2))
        data = tap_task(split, params, part, sae, tensors, baseline)
        own, empty = run(data, None), run(data, jnp.zeros(latents))
        return Half(data, *(np.asarray(x, np.float64) for x in (own, empty)))

    for task in settings.tasks:
        key: dict[str, Any] = {"task": task, "seed": settings.seed}
        key["error"] = int(settings.error)
        if settings.dictionary:
            key["dictionary"] = settings.dictionary
        methods: list[Method] = [
            m for m in settings.methods if not rows.has({**key, "row": m})
        ]
        if not methods:
            continue
        text = read_task(task)
        prompts = encode_prompts(text, work.model.tokenizer, work.tokens[0, 0])
        halves = [tap_half(prompts, first) for first in (0, 1)]

        def add(name: str, values: dict[str, Any], key: Any = key) -> None:
            rows.add({**key, "row": name}, values)
            print(key, name, values, flush=True)

        add("model", measure_model(halves, run, latents))
        steps = settings.steps
        for method in methods:
            add(method, measure_method(halves, run, effect, latents, method, steps))


if __name__ == "__main__":
    main(parse_command(Settings, __doc__))
