r"""Scores of decomposed weights, as published.

:func:`mean_max_cosine` compares parts with the columns of a known weight;
:func:`identity_ci_error` and :func:`dense_ci_error` compare causal importances with the
two forms that toys should have: one component per feature, or so many components that
matter together; :func:`component_l0` and :func:`alive_components` count.

References:
  Bushnaq et al. (2025), "Stochastic parameter decomposition", arXiv 2506.20790, and the
  tests of its code for the errors of importances.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int, check_number
from toyfeat.metrics.assignment import best_pairs
from toyfeat.types import Array, ArrayLike

ALIVE = 0.1
"""Importance from which a component counts as active, as published."""

_LARGEST_ASSIGNMENT = 500
"""Features from which columns are assigned greedily, as published."""


class PartCosines(NamedTuple):
    """Comparison of parts with the columns of a weight.

    Attributes:
      mmcs: mean over features of the largest cosine of a part.
      ml2r: mean over features of the length of that part, as a share of the column's.
      cosines: ``[F]``.
      ratios: ``[F]``.
      best: ``[F]`` int, the part of each feature.
    """

    mmcs: float
    ml2r: float
    cosines: np.ndarray
    ratios: np.ndarray
    best: np.ndarray


def mean_max_cosine(v: ArrayLike, u: ArrayLike, weight: ArrayLike) -> PartCosines:
    """Compare what parts write for a feature with what the weight writes (MMCS, ML2R).

    Args:
      v: ``[F, C]``, what parts read.
      u: ``[C, D]``, what they write.
      weight: ``[F, D]``, a row per feature.

    Returns:
      :class:`PartCosines`.  A part that writes nothing for a feature has cosine 0.

    Raises:
      ValueError: if shapes do not fit, or a row of the weight is 0.

    Example:
      >>> import numpy as np
      >>> found = mean_max_cosine(2 * np.eye(2), np.eye(2), np.eye(2))
      >>> found.mmcs, found.ml2r
      (1.0, 2.0)
    """
    v, u, weight = (np.asarray(x, np.float64) for x in (v, u, weight))
    if (
        weight.ndim != 2
        or v.shape != (len(weight), len(u))
        or u.shape[1:] != weight.shape[1:]
    ):
        raise ValueError(
            f"mean_max_cosine: wanted v [F, C], u [C, D] and weight [F, D], got "
            f"{v.shape}, {u.shape} and {weight.shape}; transpose them"
        )
    norms = np.linalg.norm(weight, axis=1)
    if not np.all(norms > 0):
        raise ValueError(
            "mean_max_cosine: rows of the weight must not be 0, got "
            f"{np.flatnonzero(norms == 0).tolist()}; leave out features that it ignores"
        )
    # The part c writes v[f, c] u[c] for feature f: only the sign of v matters.
    lengths = np.abs(v) * np.linalg.norm(u, axis=1)[None, :]
    products = v * (weight @ u.T)
    safe = np.where(lengths > 0, lengths, 1)
    cosines = products / (safe * norms[:, None])
    best = np.argmax(cosines, axis=1)
    row = np.arange(len(weight))
    largest, ratios = cosines[row, best], lengths[row, best] / norms
    return PartCosines(
        mmcs=float(largest.mean()),
        ml2r=float(ratios.mean()),
        cosines=largest,
        ratios=ratios,
        best=best,
    )


def identity_ci_error(importances: ArrayLike, *, tolerance: float = 0.1) -> int:
    """Count entries that differ from one component per feature (IdentityCIError).

    Columns are assigned to features so that the sum of their importances is largest.
    Errors are importances above the tolerance off that diagonal, over all columns, and
    importances below one less the tolerance on it.

    Args:
      importances: ``[F, C]``, a row for each feature that is active alone.
      tolerance: .1, or .2 in some of the published gates.

    Returns:
      How many; a feature without a column of its own is an error.

    Raises:
      ValueError: if it is no matrix.

    Example:
      >>> import numpy as np
      >>> identity_ci_error(np.eye(3)[:, [2, 0, 1]])
      0
    """
    matrix = _as_matrix("identity_ci_error", importances, tolerance)
    if min(matrix.shape) >= _LARGEST_ASSIGNMENT:
        rows, columns = _assign_greedily(matrix)
    else:
        rows, columns = best_pairs(matrix)
    diagonal = np.zeros(matrix.shape, bool)
    diagonal[rows, columns] = True
    off = np.sum((matrix > tolerance) & ~diagonal)
    missing = len(matrix) - len(rows)
    return int(off + np.sum(matrix[diagonal] < 1 - tolerance) + missing)


def _assign_greedily(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each feature in turn the free column that matters most for it."""
    free, columns = matrix.copy(), []
    for row in range(min(matrix.shape)):
        columns.append(int(np.argmax(free[row])))
        free[:, columns[-1]] = -np.inf
    return np.arange(len(columns)), np.array(columns)


def dense_ci_error(importances: ArrayLike, k: int, *, tolerance: float = 0.1) -> int:
    """Count columns that differ from ``k`` components in use (DenseCIError).

    Columns are sorted by their sums.  Each of the first ``k`` must have an entry of
    one less the tolerance or more, and no other one an entry above it.

    Args:
      importances: ``[F, C]``.
      k: how many components there should be.
      tolerance: as in :func:`identity_ci_error`.

    Returns:
      How many columns are wrong.

    Raises:
      ValueError: if it is no matrix, or has fewer than ``k`` columns.
    """
    matrix = _as_matrix("dense_ci_error", importances, tolerance)
    k = check_int("dense_ci_error", "k", k, least=0, most=matrix.shape[1])
    order = np.argsort(-matrix.sum(0), kind="stable")
    largest = matrix.max(0)[order]
    return int(np.sum(largest[:k] < 1 - tolerance) + np.sum(largest[k:] > tolerance))


def _as_matrix(who: str, importances: ArrayLike, tolerance: float) -> np.ndarray:
    check_number(who, "tolerance", tolerance, least=0, most=0.5)
    matrix = np.asarray(importances, np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(
            f"{who}: importances must be [F, C], got {matrix.shape}; take one site"
        )
    return matrix


def component_l0(
    importances: ArrayLike,
    *,
    threshold: float = ALIVE,
    weights: ArrayLike | None = None,
) -> float:
    """Count components over a threshold per example (CI-L0).

    Args:
      importances: ``[B, ..., C]``.
      threshold: :data:`ALIVE`, or 0.
      weights: ``[B]`` of the examples, or ``None``.

    Returns:
      The mean over examples and positions.
    """
    active = (np.asarray(importances) > threshold).sum(-1)
    per_example = active.reshape(len(active), -1).mean(1)
    return float(np.average(per_example, weights=weights))


def alive_components(importances: ArrayLike, *, threshold: float = ALIVE) -> int:
    """Count components that matter for an example.

    Args:
      importances: ``[B, ..., C]``.
      threshold: as in :func:`component_l0`.

    Returns:
      How many of ``C``.
    """
    values = np.asarray(importances)
    return int((values > threshold).reshape(-1, values.shape[-1]).any(0).sum())


def adversarial_error(
    error: Callable[[dict[str, Array]], Array],
    sources: dict[str, Array],
    *,
    steps: int = 20,
    step_size: float = 0.1,
) -> Array:
    """Raise an error by ascent on the sources of masks (PGD reconstruction).

    Args:
      error: of the reconstruction, ``sources -> []``.
      sources: to start from, in [0, 1].
      steps: ascents; 20 of .1 as published.
      step_size: of each, along the sign of the gradient.

    Returns:
      ``[]``, the error under the last sources.
    """
    check_int("adversarial_error", "steps", steps, least=0)
    check_number("adversarial_error", "step_size", step_size, above=0)
    return error(ascend(error, sources, steps=steps, step_size=step_size))


def ascend(
    error: Callable[[dict[str, Array]], Array],
    sources: dict[str, Array],
    *,
    steps: int,
    step_size: float,
) -> dict[str, Array]:
    """Move sources along the sign of the gradient of an error, inside [0, 1].

    Args:
      error: ``sources -> []``.
      sources: to start from.
      steps: how many.
      step_size: of each.

    Returns:
      The last sources.
    """
    slope = jax.grad(error)

    def step(_: Array, sources: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(
            lambda r, g: jnp.clip(r + step_size * jnp.sign(g), 0, 1),
            sources,
            slope(sources),
        )

    return jax.lax.fori_loop(0, steps, step, sources)
