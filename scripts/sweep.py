"""Sweep the published attribution loss and the robust one, and draw both.

    python scripts/sweep.py

A squaring network (20 inputs, 60 neurons, rotated outputs), ReLU dictionaries of 40
latents, 7 coefficients (of the sparsity and of the attributions) times 5 learning
rates, one start.  Table, two pictures and ``out/sweep/sweep.html``; 47 s of CPU time,
two to six minutes on two cores that others shared.  Runs whose decoder rows cover the
writers to .9:

    published (L1, signed, everything robust off)    14 %
    robust (bounded, positive, controller to 2 codes)  80 %, all but the lowest rate

Between the two (same grid, not of this script): the published loss with robust
training 26 %, with the controller too 54 %; the bounded loss without one 40 %.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import _repository  # noqa: F401  (finds examples)
import tyro
from rich.console import Console

from examples import attribution_sweep
from examples.squaring import dictionaries
from toyfeat.files.atomic import output_folder
from toyfeat.report.tables import settings


@dataclass(frozen=True)
class Config:
    """Settings of the sweep."""

    out: Path = Path("out/sweep")
    """Folder of runs, table, pictures and page; the same command again goes on."""
    coefficients: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Coefficients, of the sparsity and of the attributions alike."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates of Adam."""
    steps: int = 2000
    """Optimizer steps of every member."""
    examples: int = 50_000
    """Activations of the network."""
    network_steps: int = 4000
    """Optimizer steps of the network."""
    seed: int = 0
    """Root of all randomness."""


def main(config: Config) -> None:
    """Train, score, draw."""
    sweep = attribution_sweep.Sweep(
        coefficients=config.coefficients,
        learning_rates=config.learning_rates,
        steps=config.steps,
    )
    attribution_sweep.check_sweep(sweep)
    output_folder(config.out)
    start, seed = time.perf_counter(), config.seed
    net = dictionaries.train_network(seed, steps=config.network_steps)
    taps, truth = dictionaries.tap_network(seed, *net, config.examples)
    families = attribution_sweep.run_sweep(config.out, taps, truth, sweep, seed=seed)
    header = settings(vars(config), seconds=time.perf_counter() - start)
    console = Console(width=max(120, Console().width))
    page = attribution_sweep.write_report(config.out, families, header, console)
    print(f"the page is {page}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
