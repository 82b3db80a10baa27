"""The table of planted tasks, and how to make them.

A new task is one row: its name, a function of ``toyfeat.models.planted`` and that
function's arguments.  Its random key comes from its name, so a new row changes no other
task.  Raise a task's ``version`` where its model or its truth changes: rows that were
measured before are refused then.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from toyfeat.models import planted
from toyfeat.models.planted import Task
from toyfeat.types import Array


class PlantedTask(NamedTuple):
    """A row of the table.

    Attributes:
      name: of the task, without a comma; never changed, as its key comes from it.
      make: ``(key, **knobs) -> Task``.
      knobs: arguments of ``make`` at full size.
      quick: changes of the knobs in the quick size; ``None`` leaves the task out.
      tiny: changes of the knobs in the tiny size; ``None`` leaves the task out.
      hard: whether methods that read activations alone must not solve it.
      beats_published: whether the consensus has to beat all published methods here,
        instead of reaching the ceiling that the oracle sets.
      key: number of the task's random key, written down for the tasks whose rows were
        measured before keys came from names; a new task has none.
      limit: most mechanisms that may be returned, for a control that has fewer than it
        seems to have; how much of the truth is covered is no bar there.
      condition: of random coordinates in which the site is seen, see
        :func:`toyfeat.models.planted.recondition`; ``None`` leaves it as it is.
      version: of the task, raised where its model or its truth changes.
    """

    name: str
    make: Callable[..., Task]
    knobs: Mapping[str, Any] = {}
    quick: Mapping[str, Any] | None = None
    tiny: Mapping[str, Any] | None = None
    hard: bool = False
    beats_published: bool = False
    key: int | None = None
    limit: int | None = None
    condition: float | None = None
    version: int = 1


def _by_name(rows: Iterable[PlantedTask]) -> dict[str, PlantedTask]:
    return {task.name: task for task in rows}


TASKS = _by_name(
    [
        PlantedTask(
            name="ignored structure",
            make=planted.ignored_structure,
            quick={},
            hard=True,
            key=0,
        ),
        PlantedTask(
            name="tiled curve",
            make=planted.tiled_curve,
            quick={},
            hard=True,
            key=1,
        ),
        PlantedTask(
            name="product space",
            make=planted.product_space,
            quick={},
            tiny={"colours": 2, "shapes": 2, "dim": 6},
            hard=True,
            key=2,
        ),
        PlantedTask(
            name="x²",
            make=planted.squares,
            quick={},
            hard=True,
            key=3,
        ),
        PlantedTask(
            name="circuits 20/60",
            make=planted.circuits,
            knobs={"features": 20},
            quick={"steps": 1500},
            hard=True,
            key=4,
        ),
        PlantedTask(
            name="circuits 60/60",
            make=planted.circuits,
            knobs={"features": 60},
            hard=True,
            key=5,
        ),
        PlantedTask(
            name="circuits 90/60",
            make=planted.circuits,
            knobs={"features": 90},
            hard=True,
            key=6,
        ),
        PlantedTask(
            name="quiet but strong",
            make=planted.quiet_and_loud,
            quick={},
            hard=True,
            key=7,
        ),
        PlantedTask(
            name="superposition 5-2",
            make=planted.superposition,
            quick={"steps": 1500},
            key=8,
        ),
        PlantedTask(
            name="superposition 40-10",
            make=planted.superposition,
            knobs={"features": 40, "hidden": 10},
            key=9,
        ),
        PlantedTask(
            name="5-2 with identity",
            make=planted.superposition,
            knobs={"identity": True},
            key=10,
        ),
        PlantedTask(
            name="40-10 with identity",
            make=planted.superposition,
            knobs={"features": 40, "hidden": 10, "identity": True},
            key=11,
        ),
        PlantedTask(
            name="cross-layer",
            make=planted.cross_layer,
            key=12,
        ),
        PlantedTask(
            name="modular addition",
            make=planted.modular_addition,
            quick={},
            key=13,
        ),
        PlantedTask(
            name="world with a head",
            make=planted.world_with_head,
            quick={"features": 128, "dim": 48, "read": 24, "composed": 8},
            beats_published=True,
            key=14,
        ),
    ]
)
"""Name to task of the leaderboard; a new one is one row, anywhere in the list."""

SHAPES = _by_name(
    [
        PlantedTask(
            name="ignored structure 12 x 3",
            make=planted.ignored_structure,
            knobs={"features": 12, "parts": 3, "manifold": 10},
            key=15,
        ),
        PlantedTask(
            name="curve of 10 harmonics",
            make=planted.tiled_curve,
            knobs={"harmonics": 10},
            key=16,
        ),
        PlantedTask(
            name="product space 5 x 13",
            make=planted.product_space,
            knobs={"colours": 5, "shapes": 13},
            key=17,
        ),
        PlantedTask(
            name="three squares",
            make=planted.squares,
            knobs={"features": 3, "neurons": 40},
            key=18,
        ),
        PlantedTask(
            name="circuits 30/40",
            make=planted.circuits,
            knobs={"features": 30, "neurons": 40},
            key=19,
        ),
        PlantedTask(
            name="20 quiet and 40 loud",
            make=planted.quiet_and_loud,
            knobs={"dim": 48, "quiet": 20, "loud": 40},
            key=20,
        ),
        PlantedTask(
            name="superposition 20-6",
            make=planted.superposition,
            knobs={"features": 20, "hidden": 6},
            key=21,
        ),
        PlantedTask(
            name="superposition 6-2",
            make=planted.superposition,
            knobs={"features": 6, "hidden": 2},
            key=22,
        ),
        PlantedTask(
            name="cross-layer 12",
            make=planted.cross_layer,
            knobs={"features": 12},
            key=23,
        ),
        PlantedTask(
            name="addition mod 71",
            make=planted.modular_addition,
            knobs={"modulus": 71},
            key=24,
        ),
        PlantedTask(
            name="world of 2048",
            make=planted.world_with_head,
            knobs={"features": 2048, "dim": 256},
            key=25,
        ),
    ]
)
"""The same kinds of tasks, of sizes that no method was made with."""


_PUBLISHED = {"published": True, "steps": 10_000}
_WIDE = _PUBLISHED | {"features": 40, "hidden": 10}
_THREE_LAYERS = {"layers": 3, "features": 102, "neurons": 17, "steps": 3000}
MECHANISMS = {
    name: PlantedTask(name, make, knobs)
    for make, rows in {
        planted.gated_units: {
            "bilinear units": {},
            "SwiGLU units": {"kind": "silu"},
            "SwiGLU 24 in 32": {"kind": "silu", "units": 24},
            "ReLU-gated units": {"kind": "relu"},
            "sigmoid-gated units": {"kind": "sigmoid"},
        },
        planted.attention_reads: {
            "attention reads": {},
            "attention of 6 heads": {"heads": 6},
        },
        planted.resid_mlp: {
            "residual 1 layer": {},
            "residual 2 layers": {"layers": 2, "neurons": 25},
            "residual 3 layers": _THREE_LAYERS,
        },
        planted.superposition: {
            "TMS 5-2": _PUBLISHED,
            "TMS 40-10": _WIDE,
            "TMS 5-2 with identity": _PUBLISHED | {"identity": True},
            "TMS 40-10 with identity": _WIDE | {"identity": True},
        },
        planted.compressed_computation: {"compressed computation": {}},
        planted.random_network: {"random network": {}},
        planted.unrelated_labels: {"unrelated labels": {}},
    }.items()
    for name, knobs in rows.items()
}
_COMPRESSED = "compressed computation"
MECHANISMS[_COMPRESSED] = MECHANISMS[_COMPRESSED]._replace(limit=50)
"""Tasks of planes and subspaces, and controls in which there is nothing to find."""

SCALE = {
    name: PlantedTask(name, planted.overcomplete, knobs)
    for name, knobs in {
        "160 readers in 64": {},
        "512 readers in 256": {
            "dim": 256,
            "features": 512,
            "most": 0.02,
            "least": 0.002,
        },
        "2000 readers in 576": {
            "dim": 576,
            "features": 2000,
            "most": 0.03,
            "least": 0.001,
        },
    }.items()
}
"""Sites with many rare readers; the first one is in the full size, too."""

FULL = TASKS | MECHANISMS | {"160 readers in 64": SCALE["160 readers in 64"]}
ALL = FULL | SHAPES | SCALE
"""Every task by its name."""


def task_key(task: PlantedTask, *, root: int = 0, seed: int = 0) -> Array:
    """Random key of a draw of a task.

    Args:
      task: row of the table; only its name and its written key count.
      root: root of all keys.
      seed: number of the draw.

    Returns:
      A random key that no other task has.
    """
    key = jax.random.key(root)
    if task.key is not None:
        return jax.random.fold_in(key, 1000 * seed + task.key)
    # CRC-32 is the same on every machine, which Python's hash of a string is not.
    key = jax.random.fold_in(key, zlib.crc32(task.name.encode()))
    return jax.random.fold_in(key, seed)


def make_task(task: PlantedTask, *, root: int = 0, seed: int = 0) -> Task:
    """Make a draw of a task, with its own random key, in the coordinates asked for."""
    key = task_key(task, root=root, seed=seed)
    draw = task.make(key, **task.knobs)
    if task.condition is None:
        return draw
    key = jax.random.fold_in(key, zlib.crc32(b"condition"))
    return planted.recondition(key, draw, condition=task.condition)
