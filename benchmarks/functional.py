"""Fine-tune one dictionary by several losses: what each keeps of the model.

    python benchmarks/small_decoder.py                       # once, for the first line
    python benchmarks/functional.py --model small
    python benchmarks/functional.py --model smollm2
    python benchmarks/functional.py --model large    # SmolLM2, a million tokens
    python benchmarks/functional.py --model large_k8 # or _k32, _batch, _16k: one change

TopK dictionaries are trained on the activations of a site, then each is fine-tuned on
other tokens by its reconstruction error alone, with the second-order KL from gradients
(``losses.fisher``) and with the KL itself (``losses.spliced_kl``),
on the same tokens in the same order.  Scores on held-out text are rows of
``out/functional/<model>.jsonl``; a run that was cut off goes on.  ``docs/research.md``,
section 18, says what was expected, and ``docs/smollm2.md`` what came of it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from functional_expansion import EXPANSIONS, Expansions, compare_errors
from functional_genre import mail_windows
from functional_kept import keep_params
from functional_shared import population_tuner
from functional_sizes import (
    LENGTH,
    START,
    STUDIES,
    Sizes,
    make_sae,
    taps_folder,
)
from functional_taps import stored_taps
from functional_tools import error_sizes, quadratic, scorer
from harness import parse_command

import toyfeat as ft
from toyfeat.jobs.config import Collect, Evaluate, Job, Train
from toyfeat.jobs.results import Rows
from toyfeat.jobs.workspace import Workspace, open_job
from toyfeat.lm.finetune import WindowTaps, finetune, window_batches
from toyfeat.lm.split import HeldOut, SplitDecoder, split_at, tap_held_out
from toyfeat.types import Params

NUM_MAIN = 6


@dataclass(frozen=True)
class Settings:
    """What is run."""

    model: Literal[
        "small",
        "smollm2",
        "large",
        "large_k8",
        "large_k32",
        "large_batch",
        "large_16k",
    ] = "small"
    out: Path = Path("out/functional")
    seeds: tuple[int, ...] = ()
    """All of the study by default; others may run beside them."""
    rows: tuple[str, ...] = ()
    """In this order; those of the study by default."""
    only_taps: bool = False
    """Stop when activations and gradients are on disk."""


def open_study(sizes: Sizes, out: Path) -> Workspace:
    """Open the model, and cut the text into windows."""
    tokens = (sizes.base + sizes.tune) * LENGTH
    collect = Collect(
        sites=(sizes.site,),
        tokens=tokens,
        held_out=sizes.held_out * LENGTH,
        length=LENGTH,
        start=START if sizes.model == "smollm2" else 0,
    )
    return open_job(
        Job(
            model=sizes.model,
            out=str(out),
            collect=collect,
            train=Train(kinds=("acts",)),
            evaluate=Evaluate(),
        )
    )


def train_base(
    sizes: Sizes, acts: dict[str, np.ndarray], seed: int, folder: Path
) -> Any:
    """Train a TopK dictionary on the first part of the text."""
    rows = acts["weights"].reshape(-1) > 0
    values = acts["acts"].reshape(len(rows), -1)[rows]
    sae = make_sae(sizes, values.shape[1])
    steps = sizes.base_epochs * len(values) // sizes.base_batch
    run = ft.trainer(
        sae,
        ft.losses.default(sae),
        warm_up=1,
        dead_after=max(20, steps // 10),
        schedule=lambda step: jnp.minimum(1.0, 3 * (1 - step / steps)),
    )
    taps = ft.Taps(jnp.asarray(values), None, jnp.ones(len(values)))
    state = ft.fit(
        run,
        run.init(jax.random.key(seed), learning_rate=1e-3),
        ft.data.array_batches(taps, batch=sizes.base_batch, seed=seed),
        steps=steps,
        directory=folder / f"base {seed}",
        check_data=False,
        progress=False,
    )
    return sae, ft.denormalized(sae, state)


def make_term(row: str, split: SplitDecoder) -> Any:
    """Make the term of a row beside the reconstruction error, ``None`` for none."""
    kind, _, form = row.partition(" ")
    if kind == "mse":
        return None
    if kind == "kl":
        alone = split.run_alone if "clean" in row else None
        return ft.losses.spliced_kl(split.run, run_spliced=alone)
    if kind == "quadratic":
        return quadratic(split.run)
    words = [word for word in form.split(" ")[1:] if not word.startswith("w.")]
    length = LENGTH if kind == "window" else 0
    return ft.losses.fisher(words[0] if words else "square", length=length)


def tune_taps(
    row: str, tapped: Callable[[str], dict[str, np.ndarray]], draws: int
) -> WindowTaps:
    """Taps that a row is fine-tuned on; fewer draws are the first of more."""
    kind, _, rest = row.partition(" ")
    if kind in ("mse", "kl", "quadratic"):
        taps = tapped("acts")
        return WindowTaps(taps["acts"], taps["weights"])
    names = {"true": "loss", "window": "labels"}
    num = int(rest.split(" ")[0])
    name = names.get(kind, kind)
    taps = tapped(name if name == "loss" else f"{name} {draws}")
    grads = jax.lax.bitcast_convert_type(jnp.asarray(taps["grads"]), jnp.bfloat16)
    # Draws are divided by the root of their number.
    scale = (grads.shape[2] / num) ** 0.5
    part = (grads[:, :, :num].astype(jnp.float32) * scale).astype(jnp.bfloat16)
    return WindowTaps(taps["acts"], taps["weights"], part)


class Study(NamedTuple):
    """All that the rows of a study share."""

    sizes: Sizes
    work: Workspace
    split: SplitDecoder
    folder: Path
    rows: Rows
    tapped: Callable[[str], dict[str, np.ndarray]]
    expansions: Expansions
    scorers: dict[str, Callable[[Any, Params], dict[str, float]]]
    tune_member: Callable[..., Any]


def score(
    study: Study, name: str, seed: int, sae: Any, params: Any, **more: Any
) -> None:
    """Score a dictionary on held-out text, and write the row."""
    scores = {
        f"{text} {figure}".strip(): value
        for text, score_on in study.scorers.items()
        for figure, value in score_on(sae, params).items()
    }
    study.rows.add({"row": name, "seed": seed}, {**scores, **more})
    print(name, seed, scores, more, flush=True)


def run_seed(
    study: Study,
    seed: int,
    start: tuple[Any, Params],
    rate: float,
    names: tuple[str, ...],
) -> None:
    """Fine-tune a dictionary by every row that is not done."""
    sae, params = start
    if not study.rows.has({"row": "topk", "seed": seed}):
        keep_params(study.folder, "topk", seed, params)
        score(study, "topk", seed, sae, params)
    for name in names:
        own = name.startswith("borrowed") and seed == 0  # it would lend to itself
        if own or study.rows.has({"row": name, "seed": seed}):
            continue
        tuned, seconds = tune(study, name, seed, (sae, params), rate)
        keep_params(study.folder, name, seed, tuned)
        score(study, name, seed, sae, tuned, **seconds)


def weight_of(name: str) -> float:
    """Weight of a row's term beside the reconstruction error: .03 of "mean 4 w.03"."""
    given = [word[1:] for word in name.split(" ") if word.startswith("w.")]
    return float(given[0]) if given else 1.0


def tune(
    study: Study, name: str, seed: int, start: tuple[Any, Params], rate: float
) -> tuple[Params, dict[str, float]]:
    """Fine-tune a dictionary by a row, and tell the seconds of a processor."""
    sizes, kind = study.sizes, name.split(" ")[0]
    steps = sizes.tune // sizes.batch
    options = {"windows": sizes.batch, "seed": 100 + seed, "steps": steps}
    refreshes, tapping = 1, {}
    if kind == "shared":
        return study.tune_member(name, seed, rate, weight_of(name))
    if kind in EXPANSIONS:
        plan = study.expansions(name, seed, start, options)
        batches, term, refreshes, tapping = plan
    else:
        runs_model = kind in ("kl", "quadratic")
        taps = tune_taps(name, study.tapped, sizes.draws)
        params = study.work.model.params if runs_model else None
        batches = window_batches(taps, params=params, **options)
        term = make_term(name, study.split)
    times: list[float] = [time.process_time()]
    tuned = finetune(
        *start,
        batches,
        term,
        steps=steps,
        refreshes=refreshes,
        learning_rate=rate,
        weight=weight_of(name),
        reconstruction=0.0 if "alone" in name else 1.0,
        on_chunk=lambda *_: times.append(time.process_time()),
    )
    # The first chunk compiles, and the first of a refresh waits for its taps, so that
    # the others tell the time.
    chunks = np.diff(times[1:])
    seconds = {"train_cpu": float(np.median(chunks)) * (len(times) - 1)}
    if tapping:
        seconds["expand_cpu"] = sum(tapping.values())
    return tuned, seconds


def needed_taps(rows: tuple[str, ...], draws: int) -> set[str]:
    """Name the taps that rows are trained on."""
    kinds, needed = {name.split(" ")[0] for name in rows}, {"acts"}
    needed |= {"loss"} if "true" in kinds else set()
    needed |= {f"signs {draws}"} if "signs" in kinds else set()
    needed |= {f"labels {draws}"} if kinds & {"labels", "window", "mixed"} else set()
    return needed


def held_texts(
    sizes: Sizes, work: Workspace, split: SplitDecoder, mean: Any
) -> dict[str, Callable[[], HeldOut]]:
    """Name the held-out texts, each tapped when it is first asked for."""
    texts = {"": work.held_out}
    if sizes.genre:
        texts["mail"] = mail_windows(work.model, sizes.genre, LENGTH)
    tap = partial(tap_held_out, split, work.model.params, batch=sizes.tap_batch)
    return {name: cache(partial(tap, x, mean)) for name, x in texts.items()}


def main(settings: Settings) -> None:
    """Tap, train, fine-tune and score."""
    sizes = STUDIES[settings.model]
    folder = settings.out / settings.model
    work = open_study(sizes, folder)
    parts = slice(0, sizes.base), slice(sizes.base, sizes.base + sizes.tune)
    place = taps_folder(settings.out, settings.model)
    tap_part = partial(stored_taps, work, sizes.site, sizes.tap_batch, place)
    base = tap_part("acts", parts[0])
    rows_of = settings.rows or sizes.rows
    needed = needed_taps(rows_of, sizes.draws)
    seconds = {n: tap_part(n, parts[1])["seconds"].sum() for n in sorted(needed)}
    if settings.only_taps:
        return
    split = split_at(work.model.config, sizes.site)
    mean = jnp.asarray(base["acts"][base["weights"] > 0].mean(0))
    rows = Rows(settings.out / f"{settings.model}.jsonl")
    for name, cpu in seconds.items():
        rows.add({"row": "tap cpu", "taps": name, "seed": -1}, {"cpu": float(cpu)})

    model, held = work.model.params, held_texts(sizes, work, split, mean)
    tapped = cache(lambda n: tap_part(n, parts[1]))
    starts = cache(lambda seed: train_base(sizes, base, seed, folder))
    study = Study(
        sizes,
        work,
        split,
        folder,
        rows,
        tapped,
        Expansions(split.run, model, tapped, sizes.draws, starts),
        {n: scorer(split, model, x, sizes.tap_batch) for n, x in held.items()},
        population_tuner(
            split.run, model, tapped, starts, sizes.batch, sizes.population
        ),
    )
    # Rows of the main question at all seeds before those that isolate a fault.
    for names in (rows_of[:NUM_MAIN], rows_of[NUM_MAIN:]):
        for seed in settings.seeds or sizes.seeds:
            run_seed(study, seed, starts(seed), 5e-4, names)
    compare_errors(tapped("acts"), starts, settings.seeds or sizes.seeds, rows)
    if 0 not in (settings.seeds or sizes.seeds):
        return
    sae, params = starts(0)
    error_sizes(split, model, held[""](), sae, params, rows)


if __name__ == "__main__":
    main(parse_command(Settings, __doc__))
