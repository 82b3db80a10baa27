"""Features and edges that PCA and the local interaction basis need.

    python scripts/modular.py --out out/modular113.npz
    python scripts/modular_lib.py --model out/modular113.npz

On a transformer that adds modulo a number: at each site, the fewest directions with
accuracy within .001 of the full model; between sites, the fewest edges (strongest
first) with the same, when each target feature is computed from its kept sources.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from toyfeat.models import modular
from toyfeat.report.modular import compared


@dataclass(frozen=True)
class Config:
    """What is looked at."""

    model: Path = Path("out/modular113.npz")
    """Parameters, from scripts/modular.py."""
    tolerance: float = 1e-3
    """How much accuracy may be lost."""
    inputs: int = 4096
    """Pairs that edges are removed on (bases see them all)."""
    batch: int = 512
    """Pairs per batch."""
    seed: int = 0
    """Of the choice of pairs."""


def main(config: Config) -> None:
    """Load, compare, print."""
    settings = json.loads(config.model.with_suffix(".json").read_text())
    names = modular.Modular._fields
    task = modular.Modular(**{name: settings[name] for name in names})
    params = {k: jnp.asarray(v) for k, v in np.load(config.model).items()}
    rows = compared(
        jax.random.key(config.seed),
        task,
        params,
        tolerance=config.tolerance,
        num=config.inputs,
        batch=config.batch,
        report=partial(print, flush=True),
    )
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main(tyro.cli(Config))
