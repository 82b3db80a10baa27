"""Rows of a study in which a population shares the run of the model."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

import toyfeat as ft
from toyfeat.lm.finetune import WindowTaps, finetune, window_batches
from toyfeat.types import Params

Member = tuple[Params, dict[str, float]]


def population_tuner(
    run: Any,
    model: Params,
    tapped: Callable[[str], dict[str, np.ndarray]],
    starts: Callable[[int], tuple[Any, Params]],
    windows: int,
    population: int,
) -> Callable[..., Member]:
    """Return a function that fine-tunes a population once, for all of its members.

    Args:
      run: the model behind the site.
      model: its parameters.
      tapped: name of taps to taps of all windows.
      starts: seed to dictionary and parameters before fine-tuning.
      windows: of a step; every window is used once.
      population: how many dictionaries are tuned together.

    Returns:
      ``(row, seed, rate, weight) -> (params, seconds)`` of a member, for rows named
      ``"shared K"``, with ``K`` draws; seconds of a processor are those of one of them.
    """

    @cache
    def tune_all(row: str, rate: float, weight: float) -> tuple[list[Params], float]:
        taps = tapped("acts")
        steps = len(taps["weights"]) // windows
        batches = window_batches(
            WindowTaps(taps["acts"], taps["weights"]),
            windows=windows,
            seed=100,
            steps=steps,
            params=model,
        )
        times = [time.process_time()]
        tuned = finetune(
            starts(0)[0],
            [starts(seed)[1] for seed in range(population)],
            batches,
            ft.losses.shared_kl(run, draws=int(row.split(" ")[1])),
            steps=steps,
            learning_rate=rate,
            weight=weight,
            on_chunk=lambda *_: times.append(time.process_time()),
        )
        chunks = np.diff(times[1:])  # the first compiles
        return tuned, float(np.median(chunks)) * (len(times) - 1) / population

    def tune_member(row: str, seed: int, rate: float, weight: float) -> Member:
        members, seconds = tune_all(row, rate, weight)
        return members[seed], {"train_cpu": seconds}

    return tune_member
