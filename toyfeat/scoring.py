"""Scores of what a method found in a planted task."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.consensus import half_square
from toyfeat.evaluate import match_features, random_coverage
from toyfeat.linalg.precise import nonzero
from toyfeat.tap import readouts, tap
from toyfeat.types import Array, Found, Scores, Task

_NEAR = 0.9  # length of a unit row's part that makes it a part of ignored structure


def scores(key: Array, task: Task, found: Found, *, examples: int = 1000) -> Scores:
    r"""Score directions against the planted truth of a task.

    ``preserved`` is measured at matched sparsity: as many writers per example as the
    task has features at a time, the same number for all methods, those with the largest
    attributions :math:`|(w_j \cdot a) (w_j \cdot g)|` for unit writers and :math:`g`
    the gradient of half the squared output; the activation is replaced by its
    projection on them and on the mean activation.

    Args:
      key: random key of the inputs and of random directions.
      task: with its truth.
      found: readers and writers ``[R, D]``; rows of 0 are left out.
      examples: inputs on which ``preserved`` is measured; where the output is the same
        on all of them it is 1 if that is kept and 0 if not.

    Returns:
      :class:`toyfeat.types.Scores`; all 0 if nothing was found.

    Raises:
      ValueError: if readers and writers do not have one shape ``[R, D]`` that fits
        the task, or are not finite, the truth lacks the task's side, or there are no
        examples.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> task = planted.product_space(jax.random.key(0))
      >>> truth = Found(task.truth.readers, task.truth.writers)
      >>> found = scores(jax.random.key(1), task, truth)
      >>> round(found.readers, 3), round(found.writers, 3), found.found
      (1.0, 1.0, 20)
    """
    _check_examples("scores", examples)
    true = {"readers": task.truth.readers, "writers": task.truth.writers}
    if true.get(task.side) is None:
        raise ValueError(
            f"scores: wanted a truth with the side of the task, got {task.side!r} and "
            f"{[name for name, rows in true.items() if rows is not None]}"
        )
    readers, writers = (np.asarray(x, np.float64) for x in found)
    side = np.asarray(true[task.side], np.float64)
    width = side.shape[1]
    if readers.shape != writers.shape or readers.ndim != 2 or readers.shape[1] != width:
        raise ValueError(
            f"scores: wanted readers and writers [R, {width}], got shapes "
            f"{readers.shape} and {writers.shape}"
        )
    lengths = [np.linalg.norm(rows, axis=1) for rows in (readers, writers)]
    if not np.isfinite(lengths).all():
        raise ValueError("scores: readers and writers must be finite")
    there = np.all(np.array(lengths) > 0, axis=0)
    readers, writers = readers[there], writers[there]
    if not len(readers):
        return Scores(0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0)
    group = task.truth.group
    rows = {"readers": readers, "writers": writers}
    coverage, precision = {}, 0.0
    for name, truth in true.items():
        coverage[name] = 0.0
        if truth is not None:
            match = match_features(rows[name], truth, group=group)
            coverage[name] = match.coverage
            precision = match.precision if name == task.side else precision
    inputs, draws = jax.random.split(key)
    num = len(readers)
    return Scores(
        coverage["readers"],
        coverage["writers"],
        precision,
        num,
        random_coverage(draws, num, side, group=group, draws=2 if num > 200 else 8),
        _ignored(rows[task.side], task),
        _preserved(inputs, task, writers, examples),
    )


def active_features(key: Array, task: Task, examples: int = 1000) -> int:
    """How many planted features an example has, the mean over those that have any.

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
      >>> active_features(jax.random.key(0), planted.product_space(jax.random.key(0)))
      2
    """
    _check_examples("active_features", examples)
    values = np.asarray(task.features(task.params, task.sample(key, examples)))
    counts = np.sum(np.abs(values) > 1e-6 * np.abs(values).max(initial=1e-30), axis=1)
    return max(1, math.ceil(counts[counts > 0].mean())) if counts.any() else 1


def _check_examples(name: str, examples: int) -> None:
    if not isinstance(examples, int) or examples < 1:
        raise ValueError(
            f"{name}: wanted an int of at least 1 examples, got {examples}"
        )


def _ignored(rows: np.ndarray, task: Task) -> float:
    """Share of the ignored dimensions that rows inside of them span."""
    if task.ignored is None:
        return 0.0
    basis = np.asarray(task.ignored, np.float64)
    inside = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ basis.T
    inside = inside[np.linalg.norm(inside, axis=1) >= _NEAR]
    if not len(inside):
        return 0.0
    return float(np.linalg.matrix_rank(inside, tol=0.1) / len(basis))


def _preserved(key: Array, task: Task, writers: np.ndarray, examples: int) -> float:
    """Share of the variance of the output that is kept."""
    inputs = task.sample(key, examples)
    taps = tap(
        task.probed,
        task.params,
        inputs,
        sites=task.site,
        readout=readouts.scalar(half_square),
    )[task.site]
    assert taps.grads is not None
    num = min(active_features(key, task, examples), len(writers))
    unit = writers / np.linalg.norm(writers, axis=1, keepdims=True)
    rows = jnp.asarray(unit, taps.acts.dtype)
    spliced = _carried(num, rows, taps.acts, taps.grads[:, 0])
    whole, now = (
        np.concatenate(
            [np.asarray(x).reshape(examples, -1) for x in jax.tree.leaves(y)], axis=1
        )
        for y in (
            task.probed(task.params, inputs, {})[0],
            task.probed(task.params, inputs, {task.site: lambda _: spliced})[0],
        )
    )
    total = np.sum((whole - whole.mean(0)) ** 2, dtype=np.float64)
    lost = np.sum((whole - now) ** 2, dtype=np.float64)
    return float(1 - lost / total) if total > 0 else float(lost == 0)


@partial(jax.jit, static_argnums=0)
def _carried(num: int, writers: Array, acts: Array, grads: Array) -> Array:
    """Projections of activations on the mean and on the writers that matter most."""
    effect = jnp.abs((acts @ writers.T) * (grads @ writers.T))
    _, index = jax.lax.top_k(effect, num)
    mean = jnp.mean(acts, axis=0)
    mean = mean / nonzero(jnp.linalg.norm(mean))

    def one(act: Array, index: Array) -> Array:
        rows = jnp.concatenate([writers[index], mean[None, :]])
        u, s, _ = jnp.linalg.svd(rows.T, full_matrices=False)
        axes = jnp.where(s > 1e-3 * s[0], 1.0, 0.0)  # some may be the same
        return u @ (axes * (u.T @ act))

    return jax.vmap(one)(acts, index)
