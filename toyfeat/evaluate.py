r"""Found features against planted truth, and against the model's own output.

A direction is a *reader* (covector: the next layer takes the dot product with
it) or a *writer* (vector: the previous layer adds it).  They differ unless the
activations are white; say which one a score is about.
"""

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.decompose import covariance, decode, encode
from toyfeat.matching import assignment, nearest, subspaces, unit_rows
from toyfeat.types import (
    Array,
    ArrayLike,
    Basis,
    Inputs,
    Match,
    Moments,
    Params,
    Probed,
)

_HIGHEST = jax.lax.Precision.HIGHEST


def match_features(
    found: ArrayLike, truth: ArrayLike, *, group: ArrayLike | None = None
) -> Match:
    r"""Match found directions to true ones, one to one, on :math:`|\cos|`.

    The assignment maximises the summed similarity (Hungarian method), so no
    found direction serves two truths, unlike in a mean of maxima.  Rows of
    ``truth`` that share a ``group`` are known only up to a rotation among
    themselves: they are matched as a subspace, and each gets the mean cosine of
    the principal angles between it and the span of the rows it was given.  With
    groups the best assignment is a hard problem; the one returned is a Hungarian
    start that no exchange of two rows improves.

    Args:
      found: ``[R, D]``, one direction per *row*: pass ``basis.readers.T`` or
        ``basis.writers``.  Zero rows count as not found.
      truth: ``[F, D]``, one direction per row.
      group: ``[F]`` int, or ``None`` if every truth stands alone.

    Returns:
      A :class:`Match`; ``coverage`` is the figure to report, next to
      :func:`random_coverage` of as many random directions.

    Raises:
      ValueError: if shapes do not fit, an entry is not finite, there is no
        truth, or a truth is zero.

    Example:
      >>> import numpy as np
      >>> match = match_features(np.array([[0.0, -2.0]]), np.eye(2))
      >>> match.index.tolist(), match.coverage, match.mcc
      ([-1, 0], 0.5, 1.0)

    References:
      Kuhn (1955), for the assignment; MCC as in SAELens' synthetic evaluation,
      where the mean runs over the assigned pairs only.
    """
    found, truth, groups = _checked("match_features", found, truth, group)
    rows = np.flatnonzero(np.linalg.norm(found, axis=1) > 0)
    unit, true = unit_rows(found[rows]), unit_rows(truth)
    spaces = subspaces(true, groups)
    chosen = assignment(unit, spaces, len(true))
    similarity = np.zeros(len(true))
    for space in spaces:
        similarity[space.members] = space.shared(unit, chosen) / len(space.members)
    given = chosen >= 0
    index = np.where(given, rows[np.where(given, chosen, 0)] if len(rows) else -1, -1)
    best = nearest(unit, spaces)
    pairs = min(len(rows), len(true))
    return Match(
        index=index,
        similarity=similarity,
        coverage=float(similarity.mean()),
        mcc=float(similarity.sum() / pairs) if pairs else 0.0,
        precision=float(np.mean(best >= 0.9)) if len(rows) else 0.0,
        found=len(rows),
    )


def random_coverage(
    key: Array,
    num: int,
    truth: ArrayLike,
    *,
    group: ArrayLike | None = None,
    draws: int = 8,
) -> float:
    """Return the coverage that random directions reach: the floor of every score.

    Args:
      key: random key.
      num: how many directions ``R``, as many as the method under test returned.
      truth: ``[F, D]``.
      group: as in :func:`match_features`.
      draws: how many sets of directions to average over.

    Returns:
      Mean coverage of ``draws`` sets of ``num`` uniform directions.

    Raises:
      ValueError: if ``num`` or ``draws`` is not positive.

    Example:
      >>> import jax, numpy as np
      >>> 0.2 < random_coverage(jax.random.key(0), 10, np.eye(10)[:1]) < 0.8
      True
    """
    if num < 1 or draws < 1:
        raise ValueError(
            f"random_coverage: num and draws must be at least 1, got {num} and {draws}"
        )
    width = np.shape(truth)[-1]
    sets = np.asarray(jax.random.normal(key, (draws, num, width)))
    matches = [match_features(found, truth, group=group) for found in sets]
    return float(np.mean([match.coverage for match in matches]))


def principal_angles(a: ArrayLike, b: ArrayLike) -> Array:
    """Cosines of the principal angles between two row spaces.

    Args:
      a: ``[R, D]``; its rows need not be orthogonal, and may be dependent.
      b: ``[Q, D]``.

    Returns:
      ``[min(R, Q, D)]``, descending, in ``0 .. 1``; angles that a rank-deficient
      side does not have come out as 0.  NaN if an entry is not finite.

    Raises:
      ValueError: if ``a`` and ``b`` are not matrices of one width.

    Example:
      >>> import jax.numpy as jnp
      >>> principal_angles(jnp.eye(3)[:2], jnp.array([[1.0, 1.0, 0.0]])).round(3)
      Array([1.], dtype=float32)

    References:
      Björck and Golub (1973).
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            "principal_angles: wanted row vectors [R, D] and [Q, D], got shapes "
            f"{a.shape} and {b.shape}"
        )
    overlap = jnp.matmul(_row_basis(a), _row_basis(b).T, precision=_HIGHEST)
    cosines = jnp.clip(jnp.linalg.svd(overlap, compute_uv=False), 0, 1)
    finite = jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b))
    return jnp.where(finite, cosines, jnp.nan)


def r_squared(scores: ArrayLike, target: ArrayLike) -> Array:
    """Squared correlation of scores with a target.

    Args:
      scores: ``[N]`` or ``[N, R]``.
      target: ``[N]``.

    Returns:
      ``[]`` or ``[R]``, in ``0 .. 1``; 0 where either side is constant.

    Raises:
      ValueError: if there is not one target per score.
    """
    scores, target = jnp.asarray(scores), jnp.asarray(target)
    if target.ndim != 1 or scores.shape[:1] != target.shape:
        raise ValueError(
            "r_squared: wanted scores [N] or [N, R] and a target [N], got shapes "
            f"{scores.shape} and {target.shape}"
        )
    s, t = _standard(scores), _standard(target)
    product = jnp.tensordot(t, s, axes=1, precision=_HIGHEST)
    norms = jnp.sum(s**2, axis=0) * jnp.sum(t**2)
    return jnp.minimum(_share(product**2, norms, 0.0), 1)


def variance_explained(basis: Basis, stats: Moments) -> Array:
    r"""Share of activation variance that survives ``decode(encode(a))``.

    With :math:`P` the oblique projection,
    :math:`1 - \mathrm{tr}((I - P) S (I - P)^\top) / \mathrm{tr}\, S`.

    Args:
      basis: of width ``D``.
      stats: moments of the same site.

    Returns:
      ``[]``; 1 if the activations do not vary.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as tf
      >>> from toyfeat.types import Moments
      >>> stats = Moments(jnp.array(1.0), jnp.zeros(2), jnp.diag(jnp.array([3.0, 1.0])))
      >>> float(variance_explained(tf.pca(stats, 1), stats))
      0.75
    """
    cov = covariance(stats)
    kept = jnp.matmul(basis.readers, basis.writers, precision=_HIGHEST)
    rest = jnp.eye(len(cov), dtype=cov.dtype) - kept
    lost = jnp.trace(jnp.linalg.multi_dot([rest.T, cov, rest], precision=_HIGHEST))
    return 1 - _share(lost, jnp.trace(cov), 0.0)


def output_preserved(
    probed: Probed, params: Params, inputs: Inputs, *, site: str, basis: Basis
) -> Array:
    r"""Share of the output's variance that survives a projection at a site.

    Every activation at the site is replaced by ``decode(encode(a))`` and the
    model runs on from there: :math:`1 - \sum |y - \tilde y|^2 / \sum |y - \bar
    y|^2`, over all outputs and inputs.

    Args:
      probed: the model; its output is one array with leading axis ``B``.
      params: its parameters.
      inputs: pytree whose leaves have leading axis ``B``.
      site: where to project.
      basis: of the site's width.

    Returns:
      ``[]``, at most 1; it can be negative, and is minus infinity where a
      constant output moves.
    """
    plain, _ = probed(params, inputs, {})
    spliced, _ = probed(
        params, inputs, {site: lambda a: decode(basis, encode(basis, a))}
    )
    scale = _scale(plain)
    moved = jnp.sum(((plain - spliced) / scale) ** 2)
    total = jnp.sum((_centred(plain) / scale) ** 2)
    return 1 - _share(moved, total, jnp.where(moved > 0, jnp.inf, 0.0))


def _scale(x: Array) -> Array:
    """Largest magnitude, 1 for zeros."""
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest > 0, largest, jnp.ones_like(largest))


def _centred(x: Array) -> Array:
    """``x`` without its mean over the first axis; twice, so a constant gives 0."""
    x = x - jnp.mean(x, axis=0, keepdims=True)
    return x - jnp.mean(x, axis=0, keepdims=True)


def _standard(x: Array) -> Array:
    """Centred columns of largest magnitude 1; 0 where they vary by rounding only."""
    centred, level = _centred(x), jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=0)
    largest = jnp.max(jnp.abs(centred), axis=0)
    varies = largest > 4 * level
    scale = jnp.where(varies, largest, jnp.inf)
    return centred / jnp.broadcast_to(scale, centred.shape)


def _share(part: Array, total: Array, otherwise: Array | float) -> Array:
    """``part / total``, and ``otherwise`` where the total is 0."""
    safe = jnp.where(total > 0, total, jnp.ones_like(total))
    return jnp.where(total > 0, part / safe, otherwise)


def _row_basis(x: Array) -> Array:
    """Orthonormal rows that span the rows of ``x``, zero past their rank."""
    scale = jnp.max(jnp.abs(x))
    x = x / jnp.where(scale > 0, scale, jnp.ones_like(scale))
    _, s, vt = jnp.linalg.svd(x, full_matrices=False)
    kept = s > max(x.shape) * jnp.finfo(x.dtype).eps * s[0]
    return jnp.where(kept[:, None], vt, jnp.zeros_like(vt))


def _checked(
    who: str, found: ArrayLike, truth: ArrayLike, group: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if found.ndim != 2 or truth.ndim != 2 or found.shape[1] != truth.shape[1]:
        raise ValueError(
            f"{who}: wanted found [R, D] and truth [F, D], one direction per row, got "
            f"shapes {found.shape} and {truth.shape}; the readers of a basis are "
            "columns, pass basis.readers.T"
        )
    for name, rows in (("found", found), ("truth", truth)):
        if not np.all(np.isfinite(rows)):
            raise ValueError(
                f"{who}: {name} has {int(np.sum(~np.isfinite(rows)))} entries that are "
                "not finite"
            )
    if not len(truth) or np.any(np.linalg.norm(truth, axis=1) == 0):
        raise ValueError(
            f"{who}: truth needs at least one row and no zero rows, got {len(truth)} "
            "rows"
        )
    groups = np.arange(len(truth)) if group is None else np.asarray(group)
    if groups.shape != (len(truth),):
        raise ValueError(
            f"{who}: group needs one entry per truth {(len(truth),)}, got shape "
            f"{groups.shape}"
        )
    return found, truth, groups
