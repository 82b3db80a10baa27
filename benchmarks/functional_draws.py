"""What a fine-tune by stored gradients has learned: the KL, or its draws?

    python benchmarks/functional_draws.py --model large

For dictionaries that ``functional.py`` has kept in ``--study``, in nats per token: the
quadratic of each token alone, from eight sampled labels, at the windows and draws of
the fine-tune, at the same windows with fresh draws, and at held-out windows; there also
the exact quadratic of all tokens of a window together, and the KL itself.  Rows go to
``out/draws/<model>.jsonl``.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from functional import open_study
from functional_kept import kept_params
from functional_sizes import STUDIES, make_sae, taps_folder
from functional_taps import stored_taps
from functional_tools import second_order_kl
from harness import parse_command

from toyfeat.jobs.results import Rows
from toyfeat.lm.collect import make_readout
from toyfeat.lm.split import split_at, tap_held_out
from toyfeat.types import Array

FRESH = 991  # seed of the draws that no fine-tune has seen


@dataclass(frozen=True)
class Settings:
    """What is run."""

    model: Literal["large"] = "large"
    study: Path = Path("out/functional")
    """Folder of ``functional.py``."""
    out: Path = Path("out/draws")
    rows: tuple[str, ...] = (
        "mse",
        "labels 8",
        "labels 8 w.03",
        "labels 8 log w.1",
        "quadratic",
        "kl",
    )
    """Of the study."""
    seeds: tuple[int, ...] = (0,)
    windows: int = 32
    """Of either text, the first ones; a multiple of the 32 in a stored file."""


class Text(NamedTuple):
    """Windows with the gradients of eight draws, ``[W, T, 8, D]``."""

    acts: np.ndarray
    weights: np.ndarray
    grads: np.ndarray


def mean_over(text: Text, sums: Any, batch: int) -> np.ndarray:
    """Means over the tokens that count of what ``sums`` adds up."""
    parts = [
        np.asarray(sums(*(x[i : i + batch] for x in text)), np.float64)
        for i in range(0, len(text.acts), batch)
    ]
    return np.sum(parts, axis=0) / text.weights.sum(dtype=np.float64)


def quadratic_alone(error: Any, acts: Array, weights: Array, grads: Array) -> Array:
    """Sum the quadratics of single tokens; draws are divided by the root of 8."""
    effects = jnp.einsum("wtkd,wtd->wtk", grads.astype(jnp.float32), error(acts))
    return jnp.sum(weights * jnp.sum(effects**2, axis=2)) / 2


def exact(run: Any, model: Any, error: Any, *part: Array) -> Array:
    """Sum the exact quadratic of whole windows, and the KL."""
    acts, weights, _ = part
    change = jnp.where(weights[:, :, None] > 0, error(acts), 0)
    clean = jax.nn.log_softmax(run(model, acts, acts))
    spliced = jax.nn.log_softmax(run(model, acts + change, acts + change))
    kl = jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2)
    joint = second_order_kl(run, model, acts, change)
    return jnp.stack([jnp.sum(weights * joint), jnp.sum(weights * kl)])


def tapped_texts(work: Any, sizes: Any, settings: Settings) -> dict[str, Text]:
    """Tap the windows of the fine-tune, with its draws and fresh ones, and others."""
    split, model = split_at(work.model.config, sizes.site), work.model.params
    part = slice(sizes.base, sizes.base + settings.windows)
    place = taps_folder(settings.study, settings.model)
    stored = stored_taps(
        work, sizes.site, sizes.tap_batch, place, f"labels {sizes.draws}", part
    )
    grads = jax.lax.bitcast_convert_type(jnp.asarray(stored["grads"]), jnp.bfloat16)
    texts = {"its draws": Text(stored["acts"], stored["weights"], np.asarray(grads))}
    readout = make_readout("labels", draws=sizes.draws, seed=FRESH)
    windows = {
        "fresh draws": work.tokens[part],
        "held out": work.held_out[: settings.windows],
    }
    mean = jnp.zeros(texts["its draws"].acts.shape[-1])
    for name, tokens in windows.items():
        held = tap_held_out(
            split, model, tokens, mean, batch=sizes.tap_batch, extra_readout=readout
        )
        texts[name] = Text(held.acts, held.weights, held.grads[:, :, 1:])
    return texts


def main(settings: Settings) -> None:
    """Tap the texts, and measure every dictionary on them."""
    sizes = STUDIES[settings.model]
    work = open_study(sizes, settings.study / settings.model)
    texts = tapped_texts(work, sizes, settings)
    split, model = split_at(work.model.config, sizes.site), work.model.params
    rows = Rows(settings.out / f"{settings.model}.jsonl")
    sae = make_sae(sizes, texts["held out"].acts.shape[-1])

    def error(params: Any, acts: Array) -> Array:
        flat = acts.reshape(-1, acts.shape[2])
        return sae.decode(params, sae.encode(params, flat)).reshape(acts.shape) - acts

    alone = jax.jit(lambda p, *part: quadratic_alone(partial(error, p), *part))
    whole = jax.jit(lambda m, p, *part: exact(split.run, m, partial(error, p), *part))
    for seed in settings.seeds:
        for name in settings.rows:
            key = {"row": name, "seed": seed, "windows": settings.windows}
            if rows.has(key):
                continue
            params = kept_params(settings.study / settings.model, name, seed)
            batch, of_row = sizes.tap_batch, partial(alone, params)
            values = {
                name: float(mean_over(text, of_row, batch))
                for name, text in texts.items()
            }
            both = mean_over(texts["held out"], partial(whole, model, params), batch)
            values |= dict(zip(("joint", "kl"), both.tolist(), strict=True))
            rows.add(key, values)
            print(key, values, flush=True)


if __name__ == "__main__":
    main(parse_command(Settings, __doc__))
