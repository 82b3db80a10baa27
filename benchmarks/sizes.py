"""Sizes of the leaderboard: which tasks, with which knobs, budget and draws."""

from typing import NamedTuple

from method_tools import Budget
from tasks import FULL, SCALE, SHAPES, TASKS, PlantedTask


class Size(NamedTuple):
    """A size of the leaderboard.

    Attributes:
      tasks: name to task, with the knobs of this size.
      budget: of every method.
      seeds: how many draws of every task, by default.
    """

    tasks: dict[str, PlantedTask]
    budget: Budget
    seeds: int


def _resized(changes: str) -> dict[str, PlantedTask]:
    """Tasks with the knobs of the column ``changes``, without those that have none."""
    return {
        name: task._replace(knobs={**task.knobs, **getattr(task, changes)})
        for name, task in TASKS.items()
        if getattr(task, changes) is not None
    }


# Badly conditioned, though squares of singular values, 1e4 apart, are well above 1e-7.
CONDITION = 100.0

SIZES = {
    "full": Size(tasks=FULL, budget=Budget(), seeds=20),
    "conditioned": Size(
        tasks={n: t._replace(condition=CONDITION) for n, t in FULL.items()},
        budget=Budget(),
        seeds=20,
    ),
    "shapes": Size(tasks=SHAPES, budget=Budget(), seeds=1),
    # A reader of 2000 is active in one of a thousand examples, and wants twenty.
    "scale": Size(tasks=SCALE, budget=Budget(examples=60_000), seeds=1),
    "quick": Size(
        tasks=_resized("quick"),
        budget=Budget(examples=6000, steps=500, batch=256),
        seeds=1,
    ),
    "tiny": Size(
        tasks=_resized("tiny"),
        budget=Budget(examples=400, steps=20, batch=64),
        seeds=1,
    ),
}
"""The sizes by name; ``conditioned`` has the draws of ``full`` in other coordinates."""
