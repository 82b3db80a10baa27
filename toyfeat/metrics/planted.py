"""Score features against the planted truth of a task."""

import math
from typing import NamedTuple

import jax
import numpy as np

from toyfeat.checks import (
    as_host_floats,
    as_integers,
    check_int,
    check_key,
    check_type,
)
from toyfeat.metrics.matching import Match, match_features, random_coverage
from toyfeat.metrics.mechanisms import match_mechanisms, random_mechanism_coverage
from toyfeat.metrics.preservation import preserved_share
from toyfeat.models.planted.task import Task
from toyfeat.types import Array, ArrayLike, Features

# Length of a unit row's part in ignored structure from which the row is a part of it.
_INSIDE_LENGTH = 0.9

# Smallest singular value of such parts that counts as a dimension of its own.
_RANK_TOLERANCE = 0.1

# Activation of a feature, as a share of the largest, below which it is float rounding.
_MIN_ACTIVATION = 1e-6

# Sets of random directions for the floor of coverage.  Fewer where there are many
# directions, whose matching is slow and whose coverage hardly varies.
_RANDOM_DRAWS, _RANDOM_DRAWS_OF_MANY, _MANY_DIRECTIONS = 8, 2, 200

# Largest activation of features that are all 0: any positive number does.
_NO_ACTIVATION = 1e-30


class TaskScores(NamedTuple):
    """Scores of the features that a method found in a task.

    Attributes:
      readers: coverage of the true readers by the found ones.
      writers: coverage of the true writers.
      precision: share of the found rows, on the side of the task, that are near a
        truth, as in :class:`toyfeat.metrics.Match`; where mechanisms are scored,
        ``mechanism_precision``.
      num_found: ``R``, how many pairs.
      random_coverage: coverage of the task's side by as many random directions.
      ignored_share: share of the dimensions of ignored structure that were returned.
      preserved: share of the variance of the output that is left when every
        activation is replaced by its part along a few of the found writers, or by its
        best guess from a few of the found readers; the larger one.
      mechanisms: coverage of the true mechanisms by the found ones, as in
        :class:`toyfeat.metrics.MechanismMatch`: a plane counts if it was returned as a
        plane, while ``readers`` credits any rows that span it.
      mechanism_precision: share of the found mechanisms that are true ones.
      inside: share of the found mechanisms that are parts of a true one of more
        dimensions, such as directions of a plane.
      num_mechanisms: how many were found.
    """

    readers: float
    writers: float
    precision: float
    num_found: int
    random_coverage: float
    ignored_share: float
    preserved: float
    mechanisms: float = 0.0
    mechanism_precision: float = 0.0
    inside: float = 0.0
    num_mechanisms: int = 0


def score_task(
    key: Array, task: Task, features: Features, *, examples: int = 1000
) -> TaskScores:
    r"""Score features against the planted truth of a task.

    Coverage of the readers and the writers, and how much of the model's output they
    preserve (:func:`toyfeat.metrics.preservation.preserved_share`).  That is measured
    at matched sparsity: as many rows per example as the task has features at a time,
    the same number for all methods.

    Args:
      key: random key of the inputs and of random directions.
      task: with its truth.
      features: readers and writers ``[R, D]``; rows of 0 are left out.
      examples: inputs on which ``preserved`` is measured; where the output is the same
        on all of them it is 1 if that is kept and 0 if not.

    Returns:
      :class:`toyfeat.metrics.TaskScores`; all 0 if there are no features.  Where
      nothing is planted only the counts and ``preserved`` are not 0.

    Raises:
      ValueError: if readers and writers do not have one shape ``[R, D]`` that fits
        the task, or are not finite, the truth lacks the task's side, or there are no
        examples.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> task = planted.product_space(jax.random.key(0))
      >>> truth = Features(task.truth.readers, task.truth.writers)
      >>> scores = score_task(jax.random.key(1), task, truth)
      >>> round(scores.readers, 3), round(scores.writers, 3), scores.num_found
      (1.0, 1.0, 20)
    """
    check_key("score_task", key)
    check_type("score_task", "task", task, Task)
    check_type("score_task", "features", features, Features)
    examples = check_int("score_task", "examples", examples, error=ValueError)
    truths = _known_sides(task)
    side = _scored_side(task)
    readers, writers, groups = _check_features(features, np.shape(truths[side])[1])
    num = len(readers)
    if not num:
        return _NOTHING_FOUND
    rows = {"readers": readers, "writers": writers}

    # The same number of rows per example for all methods, so that none gains by more.
    inputs_key, draws_key = jax.random.split(key)
    rows_per_example = min(mean_active_features(inputs_key, task, examples), num)
    preserved = preserved_share(
        inputs_key, task, readers, writers, num=rows_per_example, examples=examples
    )

    # Mechanisms against true mechanisms; where nothing is planted they are all false.
    mechanisms = match_mechanisms(
        rows[side], truths[side], group=groups, truth_group=task.truth.group
    )
    counts = {"num_found": num, "num_mechanisms": mechanisms.num_found}
    if not len(truths[side]):
        return _NOTHING_FOUND._replace(**counts, preserved=preserved)

    matches = _match_sides(rows, truths, task.truth.group)
    coverage = {name: match.coverage for name, match in matches.items()}
    strict = task.side == "mechanisms"
    return TaskScores(
        **counts,
        readers=coverage.get("readers", 0.0),
        writers=coverage.get("writers", 0.0),
        precision=(mechanisms if strict else matches[side]).precision,
        random_coverage=_coverage_floor(draws_key, num, task, groups),
        ignored_share=_ignored_share(rows[side], task),
        preserved=preserved,
        mechanisms=mechanisms.coverage,
        mechanism_precision=mechanisms.precision,
        inside=mechanisms.inside,
    )


_NOTHING_FOUND = TaskScores(
    readers=0.0,
    writers=0.0,
    precision=0.0,
    num_found=0,
    random_coverage=0.0,
    ignored_share=0.0,
    preserved=0.0,
)


def _scored_side(task: Task) -> str:
    """Return the side whose rows are judged: mechanisms are spans of readers."""
    return "readers" if task.side == "mechanisms" else task.side


def _known_sides(task: Task) -> dict[str, np.ndarray]:
    """Return the true readers and writers, those that are known, float64.

    Raises:
      ValueError: if the side on which the task is judged is not known.
    """
    sides = {"readers": task.truth.readers, "writers": task.truth.writers}
    known = {
        name: np.asarray(rows, np.float64)
        for name, rows in sides.items()
        if rows is not None
    }
    if _scored_side(task) not in known:
        raise ValueError(
            "score_task: wanted a truth with the side of the task, got "
            f"{task.side!r} and {list(known)}"
        )
    return known


def _match_sides(
    rows: dict[str, np.ndarray],
    truths: dict[str, np.ndarray],
    true_groups: ArrayLike | None,
) -> dict[str, Match]:
    """Match readers to true readers, and writers to true writers."""
    return {
        name: match_features(rows[name], truth, group=true_groups)
        for name, truth in truths.items()
    }


def _coverage_floor(
    key: Array, num: int, task: Task, groups: np.ndarray | None
) -> float:
    """Compute the coverage of the task's side by ``num`` random directions."""
    draws = _RANDOM_DRAWS if num <= _MANY_DIRECTIONS else _RANDOM_DRAWS_OF_MANY
    truth = _known_sides(task)[_scored_side(task)]
    true_groups = task.truth.group
    if task.side == "mechanisms":
        return random_mechanism_coverage(
            key, num, truth, group=groups, truth_group=true_groups, draws=draws
        )
    return random_coverage(key, num, truth, group=true_groups, draws=draws)


def mean_active_features(key: Array, task: Task, examples: int = 1000) -> int:
    """Count the planted features of an example, the mean over those that have any.

    Args:
      key: random key of the inputs.
      task: with its truth.
      examples: how many inputs.

    Returns:
      Rounded up, and 1 at least.

    Raises:
      ValueError: if there are no examples.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> task = planted.product_space(jax.random.key(0))
      >>> mean_active_features(jax.random.key(0), task)
      2
    """
    check_key("mean_active_features", key)
    check_type("mean_active_features", "task", task, Task)
    examples = check_int("mean_active_features", "examples", examples, error=ValueError)
    values = np.asarray(task.features(task.params, task.sample(key, examples)))
    if not np.all(np.isfinite(values)):
        raise ValueError(
            "mean_active_features: features must be finite, got "
            f"{int(np.sum(~np.isfinite(values)))} values that are not; look at the "
            "parameters of the task"
        )
    # Features of an example are those beyond rounding; examples of none do not count.
    size = np.abs(values)
    limit = _MIN_ACTIVATION * size.max(initial=_NO_ACTIVATION)
    counts = np.sum(size > limit, axis=1)
    return max(1, math.ceil(counts[counts > 0].mean())) if counts.any() else 1


def _check_features(
    features: Features, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return float64 readers, writers and groups, without pairs with a row of 0."""
    readers = as_host_floats("score_task", "readers", features.readers)
    writers = as_host_floats("score_task", "writers", features.writers)
    if readers.shape != writers.shape or readers.ndim != 2 or readers.shape[1] != width:
        raise ValueError(
            f"score_task: wanted readers and writers [R, {width}], got shapes "
            f"{readers.shape} and {writers.shape}; give one pair per row"
        )
    lengths = [np.linalg.norm(rows, axis=1) for rows in (readers, writers)]
    if not np.isfinite(lengths).all():
        raise ValueError(
            "score_task: readers and writers must be finite, got NaN or infinity; "
            "leave such pairs out"
        )
    nonzero = np.all(np.array(lengths) > 0, axis=0)
    if features.group is None:
        return readers[nonzero], writers[nonzero], None
    groups = np.asarray(as_integers("score_task", "group", features.group))
    if groups.shape != (len(readers),):
        raise ValueError(
            f"score_task: group needs one entry per row {(len(readers),)}, got shape "
            f"{groups.shape}; equal numbers mean one mechanism"
        )
    return readers[nonzero], writers[nonzero], groups[nonzero]


def _ignored_share(rows: np.ndarray, task: Task) -> float:
    """Return the share of the ignored dimensions that rows inside of them span."""
    if task.ignored is None:
        return 0.0
    basis = np.asarray(task.ignored, np.float64)
    # Parts of unit rows in the ignored dimensions, of rows that lie nearly inside.
    inside = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ basis.T
    inside = inside[np.linalg.norm(inside, axis=1) >= _INSIDE_LENGTH]
    if not len(inside):
        return 0.0
    # Rows that repeat a dimension count once.
    return float(np.linalg.matrix_rank(inside, tol=_RANK_TOLERANCE) / len(basis))
