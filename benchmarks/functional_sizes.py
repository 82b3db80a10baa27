"""Sizes of the studies of ``functional.py``."""

from pathlib import Path
from typing import NamedTuple

from functional_expansion import POPULATION

import toyfeat as ft
from toyfeat.dictionary.types import Dictionary

LENGTH = 64
START = 1  # the token that SmolLM2's texts begin with


class Sizes(NamedTuple):
    """Sizes of a study: numbers of windows, latents, steps."""

    model: str
    site: str
    base: int
    tune: int
    held_out: int
    latents: int
    k: int
    batch: int
    base_batch: int
    base_epochs: int
    tap_batch: int
    draws: int
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    population: int = POPULATION
    genre: int = 0
    """Windows of mail that are scored as well."""
    kind: str = "topk"
    """Of the dictionaries: a function of ``toyfeat.dictionaries``."""
    text: str = ""
    """Study whose taps are used; its own by default."""


def make_sae(sizes: Sizes, dim: int) -> Dictionary:
    """Make a dictionary of a study for activations of so many dimensions."""
    return getattr(ft.dictionaries, sizes.kind)(dim, sizes.latents, sizes.k)


def taps_folder(out: Path, model: str) -> Path:
    """Return the folder of the taps of a study; studies of one text share it."""
    return out / (STUDIES[model].text or model) / "taps"


SMALL_ROWS = (
    "mse, kl, labels 8, labels 1, true 1, labels 4, quadratic, signs 8, "
    "labels 8 huber, window 8, labels 8 log, kl alone, kl clean prefix, expand 0, "
    "expand 4, expand 4 x4, mixed 4, borrowed 4, mean 4, mean 1, path slope 8, "
    "path value 8, expand 0 x4, shared 0, shared 1, shared 2"
)
SMOLLM2_ROWS = "mse, kl, shared 0, shared 1, shared 2, mean 2 w.03, mean 4 w.03, mean 4"
LARGE_ROWS = (
    "mse, shared 0, kl, shared 2, labels 8 w.03, labels 8 log w.1, labels 8, "
    "labels 8 w.3, labels 8 log, labels 8 huber w.1, labels 4, labels 1, true 1, "
    "quadratic"
)
STUDIES = {
    "small": Sizes(
        model="out/small_decoder",
        site="blocks_1/resid_post",
        base=4096,
        tune=2048,
        held_out=512,
        latents=512,
        k=8,
        batch=8,
        base_batch=512,
        base_epochs=3,
        tap_batch=32,
        draws=8,
        seeds=(0, 1, 2),
        rows=tuple(SMALL_ROWS.split(", ")),
    ),
    "smollm2": Sizes(
        model="smollm2",
        site="blocks_15/resid_post",
        base=2048,
        tune=512,
        held_out=96,
        latents=1152,
        k=16,
        batch=2,
        base_batch=256,
        base_epochs=6,
        tap_batch=8,
        draws=4,
        seeds=(0, 1),
        rows=tuple(SMOLLM2_ROWS.split(", ")),
    ),
}
LARGE = Sizes(
    model="smollm2",
    site="blocks_15/resid_post",
    base=16384,
    tune=1024,
    held_out=832,
    latents=4608,
    k=16,
    batch=4,
    base_batch=512,
    base_epochs=1,
    tap_batch=8,
    draws=8,
    seeds=(0, 1, 2),
    rows=tuple(LARGE_ROWS.split(", ")),
    population=3,
    genre=256,
)
# Rows of the main study at other settings: one change each.
OTHER = LARGE._replace(rows=("mse", "kl"), seeds=(0,), text="large")
STUDIES |= {
    "large": LARGE,
    "large_k8": OTHER._replace(k=8),
    "large_k32": OTHER._replace(k=32),
    "large_batch": OTHER._replace(kind="batch_topk"),
    "large_16k": OTHER._replace(latents=16384),
}
