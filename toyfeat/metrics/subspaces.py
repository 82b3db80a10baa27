"""Subspaces and bases against each other, the data and the model's own output.

A direction is a *reader* (covector: the next layer takes the dot product with
it) or a *writer* (vector: the previous layer adds it).  They differ unless the
activations are white; say which one a score is about.
"""

import jax
import jax.numpy as jnp

from toyfeat.checks import as_floats, check_function, check_type
from toyfeat.decompose import covariance, decode, encode
from toyfeat.linalg import dense
from toyfeat.tap.probes import is_float_array
from toyfeat.types import Array, ArrayLike, Basis, Inputs, Moments, Params, Probed

_HIGHEST = jax.lax.Precision.HIGHEST

# Roundings of the largest entry up to which a column counts as constant: what the mean
# of a constant may be off by.  Not tuned.
_ROUNDINGS = 4


def principal_angles(a: ArrayLike, b: ArrayLike) -> Array:
    """Compute the cosines of the principal angles between two row spaces.

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
    a = as_floats("principal_angles", "a", a)
    b = as_floats("principal_angles", "b", b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            "principal_angles: wanted row vectors [R, D] and [Q, D], got shapes "
            f"{a.shape} and {b.shape}; one direction per row"
        )
    # The cosines are the singular values of the product of orthonormal bases.
    overlap = jnp.matmul(_row_basis(a), _row_basis(b).T, precision=_HIGHEST)
    cosines = jnp.clip(dense.singular_values(overlap), 0, 1)
    finite = jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b))
    return jnp.where(finite, cosines, jnp.nan)


def r_squared(scores: ArrayLike, target: ArrayLike) -> Array:
    """Compute the squared correlation of scores with a target.

    Args:
      scores: ``[N]`` or ``[N, R]``.
      target: ``[N]``.

    Returns:
      ``[]`` or ``[R]``, in ``0 .. 1``; 0 where either side is constant, NaN where
      one holds NaN.

    Raises:
      ValueError: if there is not one target per score.
    """
    scores = as_floats("r_squared", "scores", scores)
    target = as_floats("r_squared", "target", target)
    if target.ndim != 1 or scores.shape[:1] != target.shape:
        raise ValueError(
            "r_squared: wanted scores [N] or [N, R] and a target [N], got shapes "
            f"{scores.shape} and {target.shape}; one target per row"
        )
    # Squared correlation: (s . t)^2 / (|s|^2 |t|^2) of what is centred.
    s, t = _standardized(scores), _standardized(target)
    product = jnp.tensordot(t, s, axes=1, precision=_HIGHEST)
    norms = jnp.sum(s**2, axis=0) * jnp.sum(t**2)
    return jnp.minimum(_share(product**2, norms, 0.0), 1)


def variance_explained(basis: Basis, stats: Moments) -> Array:
    r"""Compute the share of activation variance that survives ``decode(encode(a))``.

    With :math:`P` the oblique projection,
    :math:`1 - \mathrm{tr}((I - P) S (I - P)^\top) / \mathrm{tr}\, S`.

    Args:
      basis: of width ``D``.
      stats: moments of the same site.

    Returns:
      ``[]``; 1 if the activations do not vary, NaN if they are NaN.

    Raises:
      TypeError: if an argument is none of these.
      ValueError: if the widths differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> from toyfeat.types import Moments
      >>> stats = Moments(jnp.array(1.0), jnp.zeros(2), jnp.diag(jnp.array([3.0, 1.0])))
      >>> float(variance_explained(ft.pca(stats, 1), stats))
      0.75
    """
    check_type("variance_explained", "basis", basis, Basis)
    check_type("variance_explained", "stats", stats, Moments)
    cov = covariance(stats)
    if len(cov) != len(basis.readers):
        raise ValueError(
            "variance_explained: basis and stats must be of one site, got widths "
            f"{len(basis.readers)} and {len(cov)}; take moments of the basis' site"
        )
    # What the projection leaves of every activation, in the metric of the covariance.
    projection = jnp.matmul(basis.readers, basis.writers, precision=_HIGHEST)
    residual = jnp.eye(len(cov), dtype=cov.dtype) - projection
    lost = jnp.trace(
        jnp.linalg.multi_dot([residual.T, cov, residual], precision=_HIGHEST)
    )
    return 1 - _share(lost, jnp.trace(cov), 0.0)


def output_preserved(
    probed: Probed, params: Params, inputs: Inputs, *, site: str, basis: Basis
) -> Array:
    r"""Compute the share of output variance that survives a projection at a site.

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
      constant output moves.  NaN if an output is NaN.

    Raises:
      TypeError: if an argument has the wrong type, or the output is no
        floating-point array.
    """
    check_function("output_preserved", "probed", probed, "from ft.from_linen, ...")
    check_type("output_preserved", "basis", basis, Basis)
    outputs, _ = probed(params, inputs, {})
    if not is_float_array(outputs):
        got = jax.tree.map(lambda x: f"{jnp.result_type(x)}{jnp.shape(x)}", outputs)
        raise TypeError(
            f"output_preserved: outputs must be one floating-point array, got {got}; "
            "wrap the model so that it returns the array that counts"
        )
    spliced, _ = probed(
        params, inputs, {site: lambda a: decode(basis, encode(basis, a))}
    )
    # Squared change against squared deviation from the mean.
    scale = _largest(outputs)  # squares of tiny or huge outputs have no float32
    moved = jnp.sum(((outputs - spliced) / scale) ** 2)
    total = jnp.sum((_centred(outputs) / scale) ** 2)
    return 1 - _share(moved, total, jnp.where(moved > 0, jnp.inf, moved))


def _largest(x: Array) -> Array:
    """Return the largest magnitude, 1 for zeros."""
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest > 0, largest, jnp.ones_like(largest))


def _centred(x: Array) -> Array:
    """Subtract the mean over the first axis; twice, so that a constant gives 0."""
    x = x - jnp.mean(x, axis=0, keepdims=True)
    return x - jnp.mean(x, axis=0, keepdims=True)


def _standardized(x: Array) -> Array:
    """Centre columns and divide them by their largest magnitude, so squares are finite.

    A column that varies by no more than a few roundings of its largest entry is 0.
    """
    centred, rounding = (
        _centred(x),
        jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=0),
    )
    largest = jnp.max(jnp.abs(centred), axis=0)
    scale = jnp.where(largest > _ROUNDINGS * rounding, largest, jnp.inf)
    return centred / jnp.broadcast_to(scale, centred.shape)


def _share(part: Array, total: Array, otherwise: Array | float) -> Array:
    """Return ``part / total``, and ``otherwise`` where the total is 0; NaN if it is."""
    zero = total <= 0
    return jnp.where(
        zero, otherwise, part / jnp.where(zero, jnp.ones_like(total), total)
    )


def _row_basis(x: Array) -> Array:
    """Return orthonormal rows with the span of ``x``, zero past its rank."""
    _, s, vt = dense.svd(x / _largest(x))
    # Rank as in numpy.linalg.matrix_rank: rounding of the largest singular value.
    in_rank = s > max(x.shape) * jnp.finfo(x.dtype).eps * s[0]
    return jnp.where(in_rank[:, None], vt, jnp.zeros_like(vt))
