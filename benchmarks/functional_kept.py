"""Dictionaries of a study in files, for what is measured of them afterwards."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from toyfeat.files.atomic import open_draft
from toyfeat.types import Params


def keep_params(folder: Path, row: str, seed: int, params: Params) -> None:
    """Keep the parameters of a fine-tuned dictionary, a dictionary of arrays."""
    path = _path(folder, row, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in params.items()}
    with open_draft(path) as file:
        np.savez(file, **arrays)


def kept_params(folder: Path, row: str, seed: int) -> Params:
    """Read parameters that :func:`keep_params` kept."""
    path = _path(folder, row, seed)
    if not path.exists():
        raise SystemExit(f"there is no {path}; run benchmarks/functional.py first")
    with np.load(path) as held:
        return {name: jnp.asarray(x) for name, x in held.items()}


def _path(folder: Path, row: str, seed: int) -> Path:
    return folder / "tuned" / f"{row} {seed}.npz"
