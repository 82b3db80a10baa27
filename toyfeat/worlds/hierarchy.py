"""Hierarchies of features: trees grown from a configuration, as index arrays."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.types import Array
from toyfeat.worlds.config import HierarchyConfig


class Level(NamedTuple):
    """Features of one depth with their parents.

    Attributes:
      features: ``[n]`` int32.
      parents: ``[n]`` int32, ``F`` for roots.
      siblings: ``[G, S]`` int32, sets of mutually exclusive features, padded with
        ``F``.
    """

    features: Array
    parents: Array
    siblings: Array


class Hierarchy(NamedTuple):
    """Hierarchy of features: parents, and sets of mutually exclusive siblings.

    Attributes:
      parents: ``[F]`` int32, -1 for roots.
      groups: ``[F]`` int32, equal for mutually exclusive features, -1 for others.
      scaled: ``[F]`` bool, whether a code is multiplied by the code of its parent
        over that parent's mean.
      levels: the same hierarchy, level by level from the roots down.
      trees: indices of the features by level, ``[T]``, ``[T, C]``, ``[T, C, C]`` ...,
        if all trees are complete and alike, siblings exclude each other and features
        are numbered level by level; else ``None``.
    """

    parents: Array
    groups: Array
    scaled: Array
    levels: tuple[Level, ...]
    trees: tuple[Array, ...] | None


def grow_trees(
    config: HierarchyConfig, num: int, seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Grow trees breadth first, until depth or features are exhausted.

    Returns:
      Parents and exclusion groups, ``[F]`` int each, -1 for none.
    """
    check_hierarchy(config)
    rng = random.Random(seed)
    parents, groups = np.full(num, -1), np.full(num, -1)
    # Number the features level by level, the roots first.
    level = list(range(min(config.total_root_nodes, num)))
    used, candidates = len(level), []
    for depth in range(config.max_depth + 1):
        next_level = []
        for parent in level:
            count = 0
            if depth < config.max_depth:
                factor = config.branching_factor
                count = factor if isinstance(factor, int) else rng.randint(*factor)
            # Children are the next numbers; the last parents may get fewer or none.
            children = range(used, min(used + count, num))
            used += len(children)
            parents[children.start : children.stop] = parent
            next_level += children
            if len(children) >= 2 and _may_exclude(config, depth):
                candidates.append(children)
        level = next_level
    # Draw the sets of siblings that exclude each other.
    count = int(len(candidates) * config.mutually_exclusive_portion)
    for group in rng.sample(range(len(candidates)), count) if count else ():
        children = candidates[group]
        groups[children.start : children.stop] = group
    return parents, groups


def _may_exclude(config: HierarchyConfig, depth: int) -> bool:
    """Tell whether children of a depth are in the range of mutual exclusion."""
    last = config.mutually_exclusive_max_depth
    return (
        config.mutually_exclusive_min_depth
        <= depth
        <= (depth if last is None else last)
    )


def check_hierarchy(config: HierarchyConfig) -> None:
    """Raise a ValueError that names a setting out of range."""
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
    """Build a hierarchy from parents, exclusion groups and scaled features.

    Raises:
      ValueError: if a feature is its own ancestor.
    """
    depth, levels = depths(parents), []
    # Number the groups by their first members.
    members = np.flatnonzero(groups >= 0)
    order = {g: i for i, g in enumerate(dict.fromkeys(groups[members].tolist()))}
    groups = np.array(groups)
    groups[members] = [order[group] for group in groups[members]]
    # Collect the features and the exclusive sets of every level.
    for level in range(int(depth.max(initial=0)) + 1):
        features = np.flatnonzero(depth == level)
        if level == 0:  # roots and features outside every tree
            features = features[groups[features] >= 0]
        labels = groups[features]
        sets = [features[labels == g] for g in np.unique(labels) if g >= 0]
        levels.append(_build_level(features, parents, sets))
    return Hierarchy(
        parents=jnp.asarray(parents, jnp.int32),
        groups=jnp.asarray(groups, jnp.int32),
        scaled=jnp.asarray(scaled, bool),
        levels=tuple(levels),
        trees=_complete_trees(parents, groups, depth),
    )


def depths(parents: np.ndarray) -> np.ndarray:
    """Count the ancestors of each feature.

    Raises:
      ValueError: if a feature is its own ancestor.
    """
    # Climb from all features at once; more steps than features means a cycle.
    depth, ancestors = np.zeros(len(parents), int), np.array(parents)
    for _ in range(len(parents)):
        if not (ancestors >= 0).any():
            return depth
        depth += ancestors >= 0
        ancestors = np.where(ancestors >= 0, parents[ancestors], -1)
    raise ValueError("hierarchy: a feature is its own ancestor")


def _build_level(
    features: np.ndarray, parents: np.ndarray, sets: Sequence[np.ndarray]
) -> Level:
    """Build a level from its features and sets of exclusive siblings."""
    num, widest = len(parents), max((len(s) for s in sets), default=1)
    siblings = np.full((len(sets), widest), num)
    for row, members in zip(siblings, sets, strict=True):
        row[: len(members)] = members
    own_parents = np.where(parents[features] >= 0, parents[features], num)
    arrays = features, own_parents, siblings
    return Level(*(jnp.asarray(x, jnp.int32) for x in arrays))


def _complete_trees(
    parents: np.ndarray, groups: np.ndarray, depth: np.ndarray
) -> tuple[Array, ...] | None:
    """Index trees by level if all are complete, exclusive and in order, else None."""
    # Check that roots are free and that level sizes are those of complete trees.
    last = int(depth.max(initial=0))
    first = np.flatnonzero(parents >= 0)
    if last == 0 or (groups[depth == 0] >= 0).any():
        return None
    roots, counts = first[0], [int((depth == i).sum()) for i in range(1, last + 1)]
    width = counts[0] // roots if roots else 0
    if roots < 1 or counts != [roots * width ** (i + 1) for i in range(last)]:
        return None
    # Check level by level that siblings form one group and follow their parents.
    shapes = [(int(roots),) + (int(width),) * i for i in range(last + 1)]
    levels, start, above = [], 0, np.zeros(0, int)
    for level, shape in enumerate(shapes):
        index = start + np.arange(int(np.prod(shape))).reshape(shape)
        if level > 0:
            sets = groups[index].reshape(-1, width)
            exclusive = width == 1 or ((sets >= 0) & (sets == sets[:, :1])).all()
            distinct = len(np.unique(sets[:, 0])) == len(sets)
            in_order = (parents[index] == above[..., None]).all()
            if not (in_order and exclusive and distinct):
                return None
        levels.append(jnp.asarray(index, jnp.int32))
        start, above = start + index.size, index
    return tuple(levels)


def compensation(
    base: np.ndarray, parents: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Compute factors of the probabilities that offset the loss to the trees, ``[F]``.

    They are ``1 / p[parent]``, and in a set of exclusive siblings times
    ``1 + sum of the others' p / p[parent]``, as in SAELens.
    """
    # A child fires with its parent only: p = p[parent] * (p / p[parent]).
    above = np.where(parents >= 0, base[parents], 1.0)
    factor = 1 / above
    # Siblings that fire at the same time cost each of them some of its chances.
    for group in np.unique(groups[groups >= 0]):
        members = groups == group
        if members.sum() >= 2:
            others = base[members].sum() - base[members]
            factor[members] *= 1 + np.maximum(others, 0) / above[members]
    return factor
