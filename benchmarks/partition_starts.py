"""Start decompositions from directions that gradients give, and count the right ones.

Readers of the narrow layer become the rows of ``U``; each row of the weight is written
by the reader that is nearest to it (by all of them for gradient PCA, which has no more
than there are dimensions).  Gradients of weights give both sides of a part.  Parts that
are left over start at a tenth of their random factors.  All starts share targets, data
and importance functions.

    python benchmarks/partition_starts.py --toy 5-2 --seeds 5 --json rows.jsonl
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from method_tools import Budget
from methods import METHODS
from partition_methods import CASES, gradient_parts
from partition_scores import correct, make_judge, score
from partition_toys import TOYS, Targets, batches_of, decomposition_of

import toyfeat as ft
from toyfeat.models import planted
from toyfeat.models.planted import Task

REST = 0.1
"""Size of the parts that are left over, as a share of the published start."""
DATA_SEED = 7


@dataclass(frozen=True)
class StartsConfig(BenchmarkConfig):
    """Options of this benchmark."""

    toy: str = "5-2"
    """A superposition."""
    seeds: int = 5
    """Targets."""
    stages: tuple[int, ...] = (500, 1000, 2000, 4000)
    """Steps after which all is scored; the last is the length of the training."""
    batch: int = 256
    """Examples per step."""
    learning_rate: float = 1e-3
    """Of Adam at the start."""
    starts: tuple[str, ...] = (
        "random",
        "gradient PCA",
        "consensus",
        "gradients of weights",
    )
    """Which starts."""


def parts_from_readers(
    weight: np.ndarray, readers: np.ndarray, nearest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Write a weight ``[F, D]`` by readers ``[R, D]``, as ``V [F, R], U [R, D]``.

    Args:
      weight: what is written.
      readers: directions of its second axis.
      nearest: whether each row is written by the nearest reader alone.
    """
    unit = readers / np.linalg.norm(readers, axis=1, keepdims=True)
    if not nearest:
        return weight @ np.linalg.pinv(unit), unit
    inner = weight @ unit.T
    own = np.arange(len(unit)) == np.abs(inner).argmax(1)[:, None]
    return np.where(own, inner, 0), unit


def start_of(
    name: str, key: jax.Array, task: Task, case: Any, budget: Budget
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the first parts ``V, U`` of a start, or ``None`` for random ones."""
    weight = np.asarray(task.params["weight"])
    if name == "random":
        return None
    if name == "gradients of weights":
        left, right = gradient_parts(key, task, case, budget=budget)
        # The sizes with which these directions add up to the weight.
        products = np.einsum("rf,rd->rfd", left, right).reshape(len(left), -1)
        sizes = np.linalg.lstsq(products.T, weight.ravel(), rcond=None)[0]
        return left.T * sizes, right
    run = METHODS[name].run
    found = run(key, planted.subject_of(task), budget=budget)
    return parts_from_readers(
        weight, np.asarray(found.readers), nearest=name != "gradient PCA"
    )


def put_parts(
    components: dict[str, jax.Array], first: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """Put parts in front of a random start, the longest first, at equal lengths."""
    v, u = (np.asarray(components[name]) for name in ("V", "U"))
    lengths = np.linalg.norm(first[0], axis=0), np.linalg.norm(first[1], axis=1)
    sizes = lengths[0] * lengths[1]
    order = np.argsort(-sizes)[: v.shape[1]]
    order = order[sizes[order] > 0]
    scale = np.sqrt(lengths[0][order] / lengths[1][order])
    v, u = REST * v, REST * u
    v[:, : len(order)] = first[0][:, order] / scale
    u[: len(order)] = first[1][order] * scale[:, None]
    return {"V": v, "U": u}


def measure(config: StartsConfig) -> list[dict[str, Any]]:
    """Train all starts and seeds together, and score them at every stage."""
    case, toy = CASES[config.toy], TOYS[config.toy]
    seeds = range(config.seeds)
    short = {"steps": 20} if config.tiny else {}
    tasks = [case.make(jax.random.key(seed), **short) for seed in seeds]
    params = jax.tree.map(lambda *x: jnp.stack(x), *[task.params for task in tasks])
    fits = np.array([task.fit for task in tasks])
    targets = Targets(tasks[0].probed, params, fits < 1, fits)
    split = decomposition_of(config.toy, targets, 4 if config.tiny else None)
    steps = config.stages[-1]
    trainer = ft.population(
        toy.preset.trainer(
            split,
            params,
            networks=True,
            steps=steps,
            learning_rate=config.learning_rate,
        )
    )
    members = [(start, seed) for start in config.starts for seed in seeds]
    keys = jnp.stack([jax.random.key(1000 + seed) for _, seed in members])
    state = trainer.init(keys, network=jnp.array([seed for _, seed in members]))
    state, seconds = _with_starts(state, members, tasks, case, config)
    judge = make_judge(config.toy, split)
    batches = batches_of(config.toy, jax.random.key(DATA_SEED), config.batch)
    rows = []
    for stage in config.stages:
        state = ft.fit(
            trainer, state, batches, steps=stage, chunk=stage // 2, progress=False
        )
        for member, (start, seed) in enumerate(members):
            figures = score(config.toy, judge, state, member)
            figures["correct"] = correct(config.toy, figures)
            size = {"seed": seed, "done": stage, "steps": steps, "batch": config.batch}
            figures["seconds_of_start"] = seconds[member]
            rate = {"learning_rate": config.learning_rate}
            rows.append(row(f"{config.toy} starts", size, start, **rate, **figures))
    return rows


def _with_starts(
    state: ft.TrainState,
    members: list[tuple[str, int]],
    tasks: list[Task],
    case: Any,
    config: StartsConfig,
) -> tuple[ft.TrainState, list[float]]:
    """Replace the parts of each member; processor seconds that its start took."""
    budget = Budget(examples=500, steps=20, batch=32) if config.tiny else Budget()
    parts = jax.tree.map(np.array, state.params["components"]["weight"])
    seconds = []
    for member, (start, seed) in enumerate(members):
        began = time.process_time()
        key = jax.random.fold_in(jax.random.key(1), seed)
        first = start_of(start, key, tasks[seed], case, budget)
        seconds.append(time.process_time() - began)
        if first is not None:
            random = {name: x[member] for name, x in parts.items()}
            for name, x in put_parts(random, first).items():
                parts[name][member] = x
    components = jax.tree.map(jnp.asarray, {"weight": parts})
    params = {**state.params, "components": components}
    return state._replace(params=params), seconds


if __name__ == "__main__":
    options = parse_command(StartsConfig, __doc__)
    finish(measure(options), [], options.json)
