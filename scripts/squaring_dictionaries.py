"""Dictionaries find what a squaring network writes and what it reads.

    python scripts/squaring_dictionaries.py

Twenty squares behind a rotation, sixty neurons.  A dictionary of activations finds
the writers, one of gradients (of half the squared norm of the output) the readers;
a paired dictionary finds both under one index, which two dictionaries trained apart
do not have.  Coverage, five networks, about a minute each on two CPU cores:

    median                                 writers  readers
    dictionary of activations                 .998
    dictionary of gradients                            .999
    paired, one assignment                    .998     .999
    the two apart, by index                   .630     .510
"""

import json
from dataclasses import dataclass

import _repository  # noqa: F401  (finds examples)
import numpy as np
import tyro

from examples.squaring import dictionaries


@dataclass(frozen=True)
class Config:
    """Settings of the training."""

    seeds: int = 5
    """Networks, each with dictionaries of its own."""
    steps: int = 3000
    """Optimizer steps per dictionary."""


def main(config: Config) -> None:
    """Train, score, print."""
    settings = dictionaries.Settings(steps=config.steps)
    rows = []
    for seed in range(config.seeds):
        net = dictionaries.train_network(seed)
        taps, truth = dictionaries.tap_network(seed, *net, settings.examples)
        rows.append(dictionaries.score_dictionaries(seed, taps, truth, settings))
        print(json.dumps({"seed": seed, **rows[-1]}), flush=True)
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    print(json.dumps({"median": medians}))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
