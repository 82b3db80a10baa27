"""Worst ablation of the latents that are said not to matter, of a study's dictionaries.

    python benchmarks/adversarial.py --model large --steps 20 --windows 16
    python benchmarks/adversarial.py --model large --steps 320 --windows 4

Of a token's active latents those of the smallest attributions, together a twentieth of
all, are said not to matter.  They get factors in [0, 1]: none of them is left out, all,
random ones, and those that projected gradient ascent finds
(``toyfeat.lm.adversarial``).  Dictionaries are what ``functional.py`` has kept in
``--study``.  Rows go to ``out/adversarial/<model>.jsonl``.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from functional import open_study
from functional_kept import kept_params
from functional_sizes import STUDIES, make_sae, taps_folder
from functional_taps import stored_taps
from harness import parse_command

from toyfeat.jobs.results import Rows
from toyfeat.lm.adversarial import adversarial_ablation
from toyfeat.lm.replacements import from_dictionary
from toyfeat.lm.split import split_at, tap_held_out


@dataclass(frozen=True)
class Settings:
    """What is run."""

    model: Literal["small", "smollm2", "large"] = "large"
    study: Path = Path("out/functional")
    """Folder of ``functional.py``."""
    out: Path = Path("out/adversarial")
    rows: tuple[str, ...] = ("topk", "mse", "kl", "shared 0")
    """Of the study."""
    seeds: tuple[int, ...] = (0,)
    windows: int = 16
    """Of held-out text, the first ones."""
    steps: int = 20
    """Of the ascent."""


def main(settings: Settings) -> None:
    """Tap held-out windows, and attack every dictionary on them."""
    sizes, folder = STUDIES[settings.model], settings.study / settings.model
    work = open_study(sizes, folder)
    model, split = work.model.params, split_at(work.model.config, sizes.site)
    first = slice(0, 4 * sizes.tap_batch)
    place = taps_folder(settings.study, settings.model)
    taps = stored_taps(work, sizes.site, sizes.tap_batch, place, "acts", first)
    mean = jnp.asarray(taps["acts"][taps["weights"] > 0].mean(0))
    batch = min(settings.windows, sizes.tap_batch)
    windows = work.held_out[: settings.windows]
    held = tap_held_out(split, model, windows, mean, batch=batch)
    rows = Rows(settings.out / f"{settings.model}.jsonl")
    sae = make_sae(sizes, len(mean))
    for seed in settings.seeds:
        for name in settings.rows:
            size = {"windows": settings.windows, "steps": settings.steps}
            key = {"row": name, "seed": seed, **size}
            if rows.has(key):
                continue
            replacement = from_dictionary(sae, kept_params(folder, name, seed))
            began = time.process_time()
            scores = adversarial_ablation(
                split, model, held, replacement, steps=settings.steps, batch=batch
            )
            rows.add(key, {**scores._asdict(), "cpu": time.process_time() - began})
            print(key, scores, flush=True)


if __name__ == "__main__":
    main(parse_command(Settings, __doc__))
