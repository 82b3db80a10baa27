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

import numpy as np
import tyro

from toyfeat.report import dictionaries


@dataclass(frozen=True)
class Config:
    """What is trained."""

    seeds: int = 5
    steps: int = 3000


def main(config: Config) -> None:
    """Train, score, print."""
    setting = dictionaries.Setting(steps=config.steps)
    rows = []
    for seed in range(config.seeds):
        params, rotation = dictionaries.trained(seed)
        taps, truth = dictionaries.tapped(seed, params, rotation, setting.examples)
        rows.append(dictionaries.scores(seed, taps, truth, setting))
        print(json.dumps({"seed": seed, **rows[-1]}), flush=True)
    middle = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    print(json.dumps({"median": middle}))


if __name__ == "__main__":
    main(tyro.cli(Config))
