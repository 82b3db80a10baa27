"""Scores of what a method found in a planted task."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.consensus import half_square
from toyfeat.evaluate import match_features, random_coverage
from toyfeat.tap import readouts, tap
from toyfeat.types import Array, Found, Outputs, Scores, Task

_NEAR = 0.9  # length of a unit row's part that makes it a part of ignored structure
_QUIET = 1e-6  # of the size of activations, below which a reader reads nothing
_OTHERS = 5000  # inputs whose activations have the mean and the covariance


def scores(key: Array, task: Task, found: Found, *, examples: int = 1000) -> Scores:
    r"""Score directions against the planted truth of a task.

    ``preserved`` is measured at matched sparsity: as many rows per example as the task
    has features at a time, the same number for all methods.  The activation
    :math:`a` is replaced in two ways, and the better one of the method counts:

    - by its projection on writers and on the mean activation, with the unit writers of
      the largest attributions :math:`|(w_j \cdot a) (w_j \cdot g)|`, where :math:`g` is
      the gradient of half the squared output;
    - by the best linear guess of it from what readers read, :math:`\mu + \Sigma R_S^T
      (R_S \Sigma R_S^T)^+ R_S (a - \mu)`, with the readers of the largest
      :math:`|r_j \cdot (a - \mu) \; g \cdot \Sigma r_j| / r_j^T \Sigma r_j`.

    Mean and covariance are those of 5000 other inputs.  The first suits writers that
    are features of the activations; the true readers can do poorly in it, because parts
    of writers that no reader reads may be large.  Where as many rows as an example has
    features span all that activations vary in, any rows preserve everything.

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
        _preserved(inputs, task, readers, writers, examples),
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


def _preserved(
    key: Array, task: Task, readers: np.ndarray, writers: np.ndarray, examples: int
) -> float:
    """Share of the variance of the output that is kept, by the better replacement."""
    inputs = task.sample(key, examples)
    taps = tap(
        task.probed,
        task.params,
        inputs,
        sites=task.site,
        readout=readouts.scalar(half_square),
    )[task.site]
    assert taps.grads is not None
    acts, grads = (np.asarray(x, np.float64) for x in (taps.acts, taps.grads[:, 0]))
    others = task.sample(jax.random.fold_in(key, 1), _OTHERS)
    others = np.asarray(task.probed(task.params, others, {})[1][task.site], np.float64)
    num = min(active_features(key, task, examples), len(writers))
    replacements = (
        _projected(num, writers, acts, grads, others),
        _guessed(num, readers, acts, grads, others),
    )
    whole = _flat(task.probed(task.params, inputs, {})[0], examples)
    total, noise = np.sum((whole - whole.mean(0)) ** 2), 1e-10 * np.sum(whole**2)
    shares = []
    for replacement in replacements:
        spliced = jnp.asarray(replacement, taps.acts.dtype)
        probe = {task.site: lambda _, spliced=spliced: spliced}
        now = _flat(task.probed(task.params, inputs, probe)[0], examples)
        lost = np.sum((whole - now) ** 2)
        shares.append(1 - lost / total if total > noise else float(lost <= noise))
    return float(max(shares))


def _flat(outputs: Outputs, examples: int) -> np.ndarray:
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(outputs)]
    return np.concatenate([x.reshape(examples, -1) for x in leaves], axis=1)


def _projected(
    num: int,
    writers: np.ndarray,
    acts: np.ndarray,
    grads: np.ndarray,
    others: np.ndarray,
) -> np.ndarray:
    """Projections on the mean activation and on the writers that matter most."""
    unit = writers / np.linalg.norm(writers, axis=1, keepdims=True)
    best = _largest(num, (acts @ unit.T) * (grads @ unit.T))
    mean = others.mean(0) / (np.linalg.norm(others.mean(0)) or 1.0)
    rows = [unit[best], np.broadcast_to(mean, (len(acts), 1, len(mean)))]
    rows = np.concatenate(rows, axis=1)
    return _told(rows, rows, acts)


def _guessed(
    num: int,
    readers: np.ndarray,
    acts: np.ndarray,
    grads: np.ndarray,
    others: np.ndarray,
) -> np.ndarray:
    """Best linear guesses from what the readers that matter most read."""
    mean = others.mean(0)
    parts = (others - mean) / np.sqrt(len(others))
    unit = readers / np.linalg.norm(readers, axis=1, keepdims=True)
    size = np.linalg.norm(parts @ unit.T, axis=0)  # of what each reads
    reads = size > _QUIET * np.linalg.norm(parts)
    rows = unit / np.where(reads, size, np.inf)[:, None]
    patterns = (rows @ parts.T) @ parts
    best = _largest(num, ((acts - mean) @ rows.T) * (grads @ patterns.T))
    return mean + _told(rows[best], patterns[best], acts - mean)


def _largest(num: int, effects: np.ndarray) -> np.ndarray:
    """``[N, num]``, the columns of the largest sizes in each row."""
    return np.argsort(-np.abs(effects), axis=1, kind="stable")[:, :num]


def _told(rows: np.ndarray, patterns: np.ndarray, acts: np.ndarray) -> np.ndarray:
    r"""What ``rows`` tell: :math:`P^T (R P^T)^+ R a` of each example.

    Rows and patterns are ``[N, k, D]``; :math:`R P^T` must be symmetric.
    """
    inverse = np.linalg.pinv(
        rows @ patterns.transpose(0, 2, 1), rcond=1e-6, hermitian=True
    )  # some rows may be the same
    codes = inverse @ (rows @ acts[..., None])
    return (codes.transpose(0, 2, 1) @ patterns)[:, 0]
