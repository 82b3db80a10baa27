"""Trees of features as index arrays."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.data.config import HierarchyConfig
from toyfeat.types import Array


class Level(NamedTuple):
    """The features of one depth, under their parents.

    Attributes:
      features: ``[n]`` int32.
      parents: ``[n]`` int32, ``F`` where there is none.
      siblings: ``[G, S]`` int32, the sets of which at most one fires, filled up
        with ``F``.
    """

    features: Array
    parents: Array
    siblings: Array


class Hierarchy(NamedTuple):
    """Which feature fires only under which, and which exclude each other.

    Attributes:
      parents: ``[F]`` int32, -1 for none.
      groups: ``[F]`` int32, equal for features that exclude each other, -1 for none.
      scaled: ``[F]`` bool, whether the code is times ``parent's code / its mean``.
      levels: the same for computing, from the roots down.
      trees: where the trees are complete and alike, children exclude each other and
        features are numbered level by level, these numbers with shapes ``[T]``,
        ``[T, C]``, ``[T, C, C]`` ...; else ``None``.
    """

    parents: Array
    groups: Array
    scaled: Array
    levels: tuple[Level, ...]
    trees: tuple[Array, ...] | None


def grown(
    config: HierarchyConfig, num: int, seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Parents and groups, breadth first, until depth or features run out."""
    check_hierarchy(config)
    rng = random.Random(seed)
    parents, groups = np.full(num, -1), np.full(num, -1)
    level = list(range(min(config.total_root_nodes, num)))
    used, candidates = len(level), []
    for depth in range(config.max_depth + 1):
        below = []
        for parent in level:
            many = 0
            if depth < config.max_depth:
                factor = config.branching_factor
                many = factor if isinstance(factor, int) else rng.randint(*factor)
            children = range(used, min(used + many, num))
            used += len(children)
            parents[children.start : children.stop] = parent
            below += children
            if len(children) >= 2 and _may_exclude(config, depth):
                candidates.append(children)
        level = below
    count = int(len(candidates) * config.mutually_exclusive_portion)
    for group in rng.sample(range(len(candidates)), count) if count else ():
        children = candidates[group]
        groups[children.start : children.stop] = group
    return parents, groups


def _may_exclude(config: HierarchyConfig, depth: int) -> bool:
    last = config.mutually_exclusive_max_depth
    return (
        config.mutually_exclusive_min_depth
        <= depth
        <= (depth if last is None else last)
    )


def check_hierarchy(config: HierarchyConfig) -> None:
    """Name a setting that is out of range."""
    factor = config.branching_factor
    least, most = (factor, factor) if isinstance(factor, int) else factor
    wrong = {
        "total_root_nodes": config.total_root_nodes < 1,
        "branching_factor": not 2 <= least <= most,
        "max_depth": config.max_depth < 1,
        "mutually_exclusive_portion": not 0 <= config.mutually_exclusive_portion <= 1,
    }
    for name, bad in wrong.items():
        if bad:
            raise ValueError(
                f"synthetic_world: hierarchy has {name}={getattr(config, name)}; "
                "wanted 1 root, 2 children and depth 1 at least, a portion in [0, 1]"
            )


def hierarchy(parents: np.ndarray, groups: np.ndarray, scaled: np.ndarray) -> Hierarchy:
    """The arrays for computing.

    Raises:
      ValueError: if a feature is its own ancestor.
    """
    depth, levels = depths(parents), []
    members = np.flatnonzero(groups >= 0)  # numbered by their first members
    order = {g: i for i, g in enumerate(dict.fromkeys(groups[members].tolist()))}
    groups = np.array(groups)
    groups[members] = [order[group] for group in groups[members]]
    for at in range(int(depth.max(initial=0)) + 1):
        here = np.flatnonzero(depth == at)
        if at == 0:  # roots and features outside every tree
            here = here[groups[here] >= 0]
        sets = [here[groups[here] == g] for g in np.unique(groups[here]) if g >= 0]
        levels.append(_level(here, parents, sets))
    trees = _complete(parents, groups, depth)
    return Hierarchy(
        jnp.asarray(parents, jnp.int32),
        jnp.asarray(groups, jnp.int32),
        jnp.asarray(scaled, bool),
        tuple(levels),
        trees,
    )


def depths(parents: np.ndarray) -> np.ndarray:
    """How many ancestors each feature has."""
    depth, above = np.zeros(len(parents), int), np.array(parents)
    for _ in range(len(parents)):
        if not (above >= 0).any():
            return depth
        depth += above >= 0
        above = np.where(above >= 0, parents[above], -1)
    raise ValueError("hierarchy: a feature is its own ancestor")


def _level(here: np.ndarray, parents: np.ndarray, sets: Sequence[np.ndarray]) -> Level:
    num, widest = len(parents), max((len(s) for s in sets), default=1)
    siblings = np.full((len(sets), widest), num)
    for row, members in zip(siblings, sets, strict=True):
        row[: len(members)] = members
    above = np.where(parents[here] >= 0, parents[here], num)
    return Level(*(jnp.asarray(x, jnp.int32) for x in (here, above, siblings)))


def _complete(
    parents: np.ndarray, groups: np.ndarray, depth: np.ndarray
) -> tuple[Array, ...] | None:
    """Level by level, if every tree is complete, exclusive and in order."""
    last = int(depth.max(initial=0))
    first = np.flatnonzero(parents >= 0)
    if last == 0 or (groups[depth == 0] >= 0).any():
        return None
    roots, counts = first[0], [int((depth == at).sum()) for at in range(1, last + 1)]
    width = counts[0] // roots if roots else 0
    if roots < 1 or counts != [roots * width ** (i + 1) for i in range(last)]:
        return None
    shapes = [(int(roots),) + (int(width),) * at for at in range(last + 1)]
    found, start, above = [], 0, np.zeros(0, int)
    for at, shape in enumerate(shapes):
        index = start + np.arange(int(np.prod(shape))).reshape(shape)
        if at > 0:
            same = groups[index].reshape(-1, width)
            alone = width == 1 or ((same >= 0) & (same == same[:, :1])).all()
            in_order = (parents[index] == above[..., None]).all()
            if not (in_order and alone and len(np.unique(same[:, 0])) == len(same)):
                return None
        found.append(jnp.asarray(index, jnp.int32))
        start, above = start + index.size, index
    return tuple(found)


def compensation(
    base: np.ndarray, parents: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """``[F]``, times which the probabilities make up for what the trees take away.

    ``1 / p[parent]``, and in a set of exclusive siblings times
    ``1 + sum of the others' p / p[parent]``, as in SAELens.
    """
    above = np.where(parents >= 0, base[parents], 1.0)
    factor = 1 / above
    for group in np.unique(groups[groups >= 0]):
        members = groups == group
        if members.sum() >= 2:
            others = base[members].sum() - base[members]
            factor[members] *= 1 + np.maximum(others, 0) / above[members]
    return factor
