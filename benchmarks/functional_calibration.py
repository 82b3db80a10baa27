"""Cross-entropy by temperature with the dictionaries of a study: are they too sure?

    python benchmarks/functional_calibration.py --model large

The KL from the model's predictions and the cross-entropy of the text part ways where
the model is too sure of itself on that text: flatter predictions are then better ones.
For the model and for every dictionary that ``functional.py`` has kept in ``--study``:
mean entropy, and cross-entropy with logits divided by each of some temperatures.  Rows
go to ``out/calibration/<model>.jsonl``.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from functional import open_study
from functional_kept import kept_params
from functional_sizes import STUDIES, make_sae, taps_folder
from functional_taps import stored_taps
from harness import parse_command

from toyfeat.jobs.results import Rows
from toyfeat.lm.split import split_at, tap_held_out
from toyfeat.types import Array

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75)


@dataclass(frozen=True)
class Settings:
    """What is run."""

    model: Literal["small", "smollm2", "large"] = "large"
    study: Path = Path("out/functional")
    """Folder of ``functional.py``."""
    out: Path = Path("out/calibration")
    rows: tuple[str, ...] = ("clean", "topk", "mse", "kl", "shared 0")
    """Of the study; ``clean`` is the model itself."""
    seeds: tuple[int, ...] = (0,)
    windows: int = 256
    """Of held-out text, the first ones."""


def sums_of(run: Any, model: Any, part: Any, value: Array) -> Array:
    """Sum the entropy, and the cross-entropy at each temperature, over the tokens."""
    entry, acts, weights, tokens = part
    logits = run(model, entry, jnp.where(weights[:, :, None] > 0, value, acts))
    targets = jnp.roll(tokens, -1, axis=1)[:, :, None]
    own = jax.nn.log_softmax(logits)
    found = [-jnp.sum(jnp.exp(own) * own, axis=2)]
    for temperature in TEMPERATURES:
        log_probs = jax.nn.log_softmax(logits / temperature)
        found.append(-jnp.take_along_axis(log_probs, targets, 2)[..., 0])
    return jnp.stack([jnp.sum(weights * x) for x in found])


def main(settings: Settings) -> None:
    """Tap held-out windows, and compute the curve of every dictionary."""
    sizes, folder = STUDIES[settings.model], settings.study / settings.model
    work, batch = open_study(sizes, folder), sizes.tap_batch
    model, split = work.model.params, split_at(work.model.config, sizes.site)
    first = slice(0, 4 * batch)
    place = taps_folder(settings.study, settings.model)
    taps = stored_taps(work, sizes.site, batch, place, "acts", first)
    mean = jnp.asarray(taps["acts"][taps["weights"] > 0].mean(0))
    held = tap_held_out(
        split, model, work.held_out[: settings.windows], mean, batch=batch
    )
    sae = make_sae(sizes, len(mean))
    sums = jax.jit(partial(sums_of, split.run))
    reconstruct = jax.jit(lambda p, acts: sae.decode(p, sae.encode(p, acts)))
    rows = Rows(settings.out / f"{settings.model}.jsonl")
    for seed in settings.seeds:
        for name in settings.rows:
            key = {"row": name, "seed": seed, "windows": settings.windows}
            if rows.has(key):
                continue
            is_clean = name == "clean"
            params = None if is_clean else kept_params(folder, name, seed)
            total = np.zeros(1 + len(TEMPERATURES))
            for i in range(0, len(held.tokens), batch):
                part = slice(i, i + batch)
                acts = held.acts[part]
                value = acts
                if not is_clean:
                    flat = reconstruct(params, acts.reshape(-1, acts.shape[2]))
                    value = flat.reshape(acts.shape)
                text = held.entry[part], acts, held.weights[part], held.tokens[part]
                total += np.asarray(sums(model, text, value), np.float64)
            entropy, *curve = (total / held.weights.sum(dtype=np.float64)).tolist()
            names = [f"ce at {temperature}" for temperature in TEMPERATURES]
            values = {"entropy": entropy, **dict(zip(names, curve, strict=True))}
            rows.add(key, values)
            print(key, values, flush=True)


if __name__ == "__main__":
    main(parse_command(Settings, __doc__))
