"""Features and edges that PCA and the local interaction basis need.

    for seed in 0 1 2 3 4; do
      python scripts/modular.py --seed $seed --out out/modular113-$seed.npz
    done
    python scripts/modular_lib.py out/modular113-*.npz

On transformers that add modulo a number: at each site, the fewest directions that
keep the accuracy within .001 of the full model's; between sites, the fewest edges
between those directions that do, strongest first, where each target feature is
computed from the sources that it keeps.  The last table is the mean over the models.

Measured on two CPU cores, modulus 113, seeds 0 to 4, 40 s each:

    site        features PCA  LIB    edges PCA    LIB
    resid_in             7.6  6.2         49.6   42.8
    resid_mid            9.8  9.4         41.2   32.0
    mlp_out              6.4  6.2        538.6  532.4

No model needed more features with the local interaction basis at any site; two of
the five needed more edges in all.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import _repository  # noqa: F401  (finds examples)
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from examples.modular import network
from examples.modular.compare import compare_bases, mean_table
from toyfeat.files.json import field, read_json


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Parameters, from scripts/modular.py."""
    tolerance: float = 1e-3
    """Accuracy that may be lost."""
    inputs: int = 4096
    """Pairs on which edges are removed (features are removed on all)."""
    batch: int = 512
    """Pairs per batch."""
    seed: int = 0
    """Seed of the choice of pairs."""


def compare_on_model(model: Path, config: Config) -> list[dict]:
    """Compare the bases on one model, and print a line for each basis and site."""
    settings = model.with_suffix(".json")
    for path in (model, settings):
        if not path.exists():
            raise ValueError(
                f"there is no {path}; python scripts/modular.py --out {model} makes it"
            )
    sizes = read_json(settings, "modular_lib")
    values = {
        name: field(sizes, name, int, settings, "modular_lib", low=1)
        for name in network.Modular._fields
    }
    task = network.Modular(**values)
    params = {name: jnp.asarray(array) for name, array in np.load(model).items()}
    print(f"{model}, accuracy {float(network.accuracy(params, *network.pairs(task)))}")
    return compare_bases(
        jax.random.key(config.seed),
        task,
        params,
        tolerance=config.tolerance,
        num=config.inputs,
        batch=config.batch,
        report=partial(print, flush=True),
    )


def main(config: Config) -> None:
    """Load, compare, print."""
    if not config.models:
        raise ValueError("name at least one .npz of scripts/modular.py")
    rows = [row for model in config.models for row in compare_on_model(model, config)]
    print(f"\n{mean_table(rows)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"modular_lib: {error}")
