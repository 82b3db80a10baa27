r"""Statistics to a basis: directions that are read, and directions that are written.

Letters: :math:`S` is the centred covariance of the activations, :math:`G` the
second moment of their gradients.
"""

import jax
import jax.numpy as jnp

from toyfeat.linalg import Spectrum, psd_inverse, psd_spectrum
from toyfeat.types import Array, Basis, Diagnostics, Moments

_HIGHEST = jax.lax.Precision.HIGHEST


def pca(stats: Moments, rank: int) -> Basis:
    r"""Principal components of the activations.

    The eigenvectors of :math:`S`, largest first: features of the *activations*,
    which need not be features of the model that reads them.

    Args:
      stats: moments of a site, from :func:`toyfeat.moments`.
      rank: how many components ``R`` to keep, ``1 .. D``.

    Returns:
      A basis with ``writers = readers.T``; ``spectrum`` is the variance along
      each component, ``spectrum / diagnostics.total`` its share.

    Raises:
      ValueError: if ``rank`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Moments
      >>> stats = Moments(jnp.array(2.0), jnp.zeros(2), jnp.diag(jnp.array([2.0, 8.0])))
      >>> pca(stats, 1).readers.T.tolist(), pca(stats, 1).spectrum.tolist()
      ([[0.0, 1.0]], [4.0])

    References:
      Jolliffe (2002), "Principal component analysis", chapter 2.
    """
    cov, mean = covariance(stats), jnp.asarray(stats.mean)
    # Activations are known to the rounding of their mean, and no better.
    floor = (jnp.finfo(cov.dtype).eps * jnp.linalg.norm(mean)) ** 2
    spectrum = _spectrum("pca", cov, rank, floor)
    total = jnp.maximum(jnp.trace(cov), 0)
    return Basis(
        mean=mean,
        readers=spectrum.vectors,
        writers=spectrum.vectors.T,
        spectrum=spectrum.values,
        diagnostics=_diagnostics(spectrum, total, total + jnp.sum(mean**2)),
    )


def gradient_pca(stats: Moments, rank: int, *, center: bool = False) -> Basis:
    r"""Principal components of the gradients: what the model reads.

    The readers are the leading eigenvectors :math:`V` of :math:`G`; the writers
    :math:`(V^\top S V)^+ V^\top S` are the least-squares regression of the
    activations on what is read.  If ``rank`` covers the rank of :math:`G`,
    replacing ``a`` by ``decode(encode(a))`` changes no readout to first order.
    Second moments determine the *span* of the readers and its principal axes,
    not single readers (unless they are orthogonal).

    Args:
      stats: moments of a site with gradients.
      rank: how many components ``R`` to keep, ``1 .. D``.
      center: subtract the mean gradient first.  It deletes whatever the model
        reads all the time: the gradient of a linear readout is constant, and its
        centred PCA has rank 0 (``diagnostics.centring_removed`` is then 1, and
        :func:`explanation` says so).

    Returns:
      A basis; ``spectrum`` holds the eigenvalues of :math:`G`.

    Raises:
      ValueError: if ``stats`` hold no gradients or ``rank`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Moments
      >>> w = jnp.array([0.6, 0.8])
      >>> stats = Moments(
      ...     jnp.array(1.0), jnp.zeros(2), jnp.eye(2), w, w[:, None] * w[None, :]
      ... )
      >>> basis = gradient_pca(stats, 2)
      >>> int(basis.diagnostics.rank), basis.readers[:, 0].round(3).tolist()
      (1, [0.6000000238418579, 0.800000011920929])
      >>> int(gradient_pca(stats, 2, center=True).diagnostics.rank)
      0

    References:
      Constantine, Dow and Wang (2014), "Active subspace methods", for the matrix
      :math:`G`; Haufe et al. (2014), for writers as the pattern of a reader.
    """
    if stats.grad_second is None or stats.grad_mean is None:
        raise ValueError(
            "gradient_pca: the moments hold no gradients; tap with a readout and fold "
            "with moments(dim, grads=True)"
        )
    second, floor = jnp.asarray(stats.grad_second), jnp.zeros(())
    total = jnp.trace(second)
    if center:
        # What is left of a difference is only known to the rounding of its parts.
        norm = jnp.max(jnp.sum(jnp.abs(second), axis=0))
        floor = len(second) * jnp.finfo(second.dtype).eps * norm
        mean = jnp.asarray(stats.grad_mean)
        second = second - stats.readouts * mean[:, None] * mean[None, :]
    spectrum = _spectrum("gradient_pca", second, rank, floor)
    cov, readers = covariance(stats), spectrum.vectors
    read = _dot(readers.T, cov)
    return Basis(
        mean=jnp.asarray(stats.mean),
        readers=readers,
        writers=_dot(psd_inverse(_dot(read, readers)), read),
        spectrum=spectrum.values,
        diagnostics=_diagnostics(spectrum, jnp.maximum(jnp.trace(second), 0), total),
    )


def covariance(stats: Moments) -> Array:
    """Centred covariance ``[D, D]`` of the activations (divided by the weight)."""
    weight = jnp.asarray(stats.weight)
    return jnp.asarray(stats.scatter) / jnp.where(
        weight > 0, weight, jnp.ones_like(weight)
    )


def encode(basis: Basis, acts: Array) -> Array:
    """Coordinates ``(acts - mean) @ readers`` of activations.

    Args:
      basis: from any decomposition.
      acts: ``[..., D]``.

    Returns:
      ``[..., R]``, in the dtype of the basis.

    Raises:
      ValueError: if the width of ``acts`` is not that of the basis.
    """
    _check_width("encode", "acts", acts, basis.readers.shape[0])
    acts = acts.astype(basis.mean.dtype)
    return _dot(acts - jnp.broadcast_to(basis.mean, acts.shape), basis.readers)


def decode(basis: Basis, codes: Array) -> Array:
    """Activations ``codes @ writers + mean`` of coordinates.

    Args:
      basis: from any decomposition.
      codes: ``[..., R]``.

    Returns:
      ``[..., D]``, in the dtype of the basis.

    Raises:
      ValueError: if there is not one code per pair of the basis.
    """
    _check_width("decode", "codes", codes, basis.writers.shape[0])
    acts = _dot(codes.astype(basis.mean.dtype), basis.writers)
    return acts + jnp.broadcast_to(basis.mean, acts.shape)


def explanation(basis: Basis) -> str:
    """Say in a sentence what rank a basis has, and why if it is low.

    Args:
      basis: with concrete values (outside of jit).

    Returns:
      One sentence.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Moments
      >>> w = jnp.ones(2)
      >>> stats = Moments(jnp.array(1.0), w, jnp.eye(2), w, jnp.ones((2, 2)))
      >>> print(explanation(gradient_pca(stats, 2, center=True)))
      rank 0: centring removed everything, the data are constant to rounding
    """
    rank, total, cut, removed = (float(d) for d in basis.diagnostics)
    width = len(basis.spectrum)
    if not all(map(bool, jnp.isfinite(basis.spectrum))):
        return "rank unknown: the statistics are not finite, see check_taps"
    if rank == 0 and removed > 0.5:
        return "rank 0: centring removed everything, the data are constant to rounding"
    if rank == 0:
        return "rank 0: the second moment is zero"
    if rank < width:
        return f"rank {rank:.0f} of {width}: the rest is below {cut:.1e}"
    kept = float(jnp.sum(basis.spectrum)) / total if total > 0 else 1.0
    return f"rank {rank:.0f}: {100 * kept:.1f} % of the total is kept"


def _spectrum(
    who: str, matrix: Array, rank: int, floor: Array | float = 0.0
) -> Spectrum:
    if not 1 <= rank <= matrix.shape[-1]:
        raise ValueError(
            f"{who}: rank must be in 1 .. {matrix.shape[-1]}, the width of the site, "
            f"got {rank}"
        )
    return psd_spectrum(matrix, rank, floor=floor)


def _diagnostics(spectrum: Spectrum, total: Array, uncentred: Array) -> Diagnostics:
    safe = jnp.where(uncentred > 0, uncentred, jnp.ones_like(uncentred))
    removed = jnp.where(uncentred > 0, 1 - total / safe, jnp.zeros_like(total))
    return Diagnostics(
        rank=spectrum.rank, total=total, cut=spectrum.cut, centring_removed=removed
    )


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _check_width(who: str, name: str, array: Array, width: int) -> None:
    if array.shape[-1:] != (width,):
        raise ValueError(
            f"{who}: wanted {name} [..., {width}], got shape {array.shape}"
        )
