r"""PCA, gradient PCA and joint PCA from second moments.

Letters: :math:`S` is the centred covariance of the activations, :math:`G` the
second moment of their gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.decompose.units import (
    NO_GRADS,
    Checked,
    Stats,
    check_rank,
    check_stats,
    checked_basis,
    in_units,
    out_of_units,
    width,
)
from toyfeat.linalg import Spectrum, column_signs, psd_inverse, psd_spectrum
from toyfeat.linalg.precision import dot, nonzero
from toyfeat.linalg.svd import SVD
from toyfeat.moments import SketchedMoments
from toyfeat.types import Array, Basis, Diagnostics, Moments


def pca(stats: Stats, rank: int) -> Basis:
    r"""Compute principal components of the activations.

    The eigenvectors of :math:`S`, largest first: features of the *activations*,
    which need not be features of the model that reads them.

    Args:
      stats: moments of a site, from :func:`toyfeat.moments` or, for widths whose
        ``D x D`` matrices are too large, :func:`toyfeat.moments.sketched_moments`.
      rank: how many components ``R`` to compute, ``1 .. D``.

    Returns:
      A basis with ``writers = readers.T``; ``spectrum`` is the variance along
      each component, ``spectrum / diagnostics.total`` its share.

    Raises:
      ValueError: if ``rank`` is out of range; outside of a trace, if ``stats`` are not
        finite, or the spectrum leaves the float's range.
      TypeError: if ``stats`` are no statistics, or ``rank`` is no int.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Moments
      >>> stats = Moments(jnp.array(2.0), jnp.zeros(2), jnp.diag(jnp.array([2.0, 8.0])))
      >>> pca(stats, 1).readers.T.tolist(), pca(stats, 1).spectrum.tolist()
      ([[0.0, 1.0]], [4.0])

    References:
      Jolliffe (2002), "Principal component analysis", chapter 2.
    """
    check_stats("pca", stats)
    rank = check_rank("pca", stats, rank)
    return checked_basis("pca", _pca(stats, rank))


# Each method is one program: a first call compiles that, not every operation.
@partial(jax.jit, static_argnames="rank")
def _pca(stats: Stats, rank: int) -> Checked:
    """Compute :func:`pca` of statistics that were checked."""
    scaled, units = in_units(stats)
    # Eigenvectors of the covariance.
    spectrum, mean = _acts_spectrum(scaled, rank), jnp.asarray(scaled.mean)
    total = _acts_energy(scaled)
    basis = Basis(
        mean=jnp.asarray(stats.mean),
        readers=spectrum.vectors,
        writers=spectrum.vectors.T,
        spectrum=spectrum.values,
        diagnostics=_diagnostics(spectrum, total, total + jnp.sum(mean**2)),
    )
    return out_of_units(stats, basis, units, units.acts)


def gradient_pca(stats: Stats, rank: int, *, center: bool = False) -> Basis:
    r"""Compute principal components of the gradients: the directions a model reads.

    The readers are the leading eigenvectors :math:`V` of :math:`G`; the writers
    :math:`(V^\top S V)^+ V^\top S` are the least-squares regression of the
    activations on the codes.  If ``rank`` covers the rank of :math:`G`,
    replacing ``a`` by ``decode(encode(a))`` changes no readout to first order.
    Second moments determine the *span* of the readers and its principal axes,
    not single readers (unless they are orthogonal).

    Args:
      stats: moments of a site with gradients.
      rank: how many components ``R`` to compute, ``1 .. D``.
      center: subtract the mean gradient first.  It deletes whatever the model
        reads all the time: the gradient of a linear readout is constant, and its
        centred PCA has rank 0 (``diagnostics.centring_removed`` is then 1, and
        :func:`toyfeat.describe` says so).

    Returns:
      A basis; ``spectrum`` holds the eigenvalues of :math:`G`.

    Raises:
      ValueError: if ``stats`` hold no gradients, and as :func:`pca`.
      TypeError: as :func:`pca`.

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
    check_stats("gradient_pca", stats, grads=True)
    rank = check_rank("gradient_pca", stats, rank)
    return checked_basis("gradient_pca", _gradient_pca(stats, rank, bool(center)))


@partial(jax.jit, static_argnames=("rank", "center"))
def _gradient_pca(stats: Stats, rank: int, center: bool) -> Checked:
    """Compute :func:`gradient_pca` of statistics that were checked."""
    scaled, units = in_units(stats)
    # Readers are the eigenvectors V of G; writers (V^T S V)^+ V^T S are the regression
    # of a on V^T a.
    spectrum, total, uncentred = _grads_spectrum(scaled, rank, center)
    readers = spectrum.vectors
    cross = _multiply_covariance(readers.T, scaled)
    basis = Basis(
        mean=jnp.asarray(stats.mean),
        readers=readers,
        writers=dot(psd_inverse(dot(cross, readers)), cross),
        spectrum=spectrum.values,
        diagnostics=_diagnostics(spectrum, total, uncentred),
    )
    return out_of_units(stats, basis, units, units.grads)


def joint_pca(stats: Stats, rank: int) -> Basis:
    r"""Compute joint principal components of activations and gradients.

    With :math:`S^{1/2} G S^{1/2} = V L V^\top`, readers :math:`S^{+1/2} V` and
    writers :math:`V^\top S^{1/2}`: of all oblique projections :math:`P` of rank
    ``R``, ``decode(encode(a))`` is the one that minimises
    :math:`\mathrm{tr}\, G (1 - P) S (1 - P)^\top`, what a linear readout of the
    activations loses on average.  A direction is important if the activations vary
    along it *and* the model reads it.

    Args:
      stats: moments of a site with gradients.
      rank: how many components ``R`` to compute, ``1 .. D``.

    Returns:
      A basis whose codes are uncorrelated with unit variance; ``spectrum`` is
      the mean squared effect :math:`L` of each on the readouts.  Directions in
      which the activations do not vary (to rounding, relative to the largest)
      are left out.

    Raises:
      ValueError: if ``stats`` hold no gradients, and as :func:`pca`.
      TypeError: as :func:`pca`.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Moments
      >>> loud, read = jnp.array([0.0, 2.0]), jnp.array([1.0, 0.5])
      >>> stats = Moments(
      ...     jnp.array(1.0), jnp.zeros(2), jnp.diag(jnp.array([1.0, 16.0])),
      ...     read, read[:, None] * read[None, :],
      ... )
      >>> basis = joint_pca(stats, 1)
      >>> basis.spectrum.round(3).tolist(), basis.writers.round(3).tolist()
      ([5.0], [[0.4470000..., 3.578...]])

    References:
      Bushnaq et al. (2024), "The local interaction basis", arXiv 2405.10928, for
      one layer and without its last scaling.
    """
    return joint_basis("joint_pca", stats, rank)


def joint_basis(who: str, stats: Stats, rank: int) -> Basis:
    """Compute :func:`joint_pca` for a public function ``who``."""
    check_stats(who, stats, grads=True)
    rank = check_rank(who, stats, rank)
    return checked_basis(who, _joint_pca(stats, rank))


@partial(jax.jit, static_argnames="rank")
def _joint_pca(stats: Stats, rank: int) -> Checked:
    """Compute :func:`joint_pca` of statistics that were checked."""
    scaled, units = in_units(stats)
    # A root of S in its own eigenvectors, and G seen through it.
    acts = _acts_spectrum(scaled, width(scaled))
    root = jnp.sqrt(acts.values)
    rooted = acts.vectors * root[None, :]
    inner = _gradient_form(rooted, scaled)
    spectrum = psd_spectrum(inner, rank)
    # Readers S^-1/2 V undo the root, writers V^T S^1/2 apply it.
    whitener = acts.vectors / nonzero(root)[None, :]
    readers, writers = dot(whitener, spectrum.vectors), dot(rooted, spectrum.vectors)
    signs = column_signs(readers)
    total = jnp.maximum(jnp.trace(inner), 0)
    basis = Basis(
        mean=jnp.asarray(stats.mean),
        readers=readers * signs[None, :] / units.acts,
        writers=(writers * signs[None, :]).T * units.acts,
        spectrum=spectrum.values,
        diagnostics=_diagnostics(spectrum, total, total),
    )
    return out_of_units(stats, basis, units, units.acts * units.grads)


def covariance(stats: Moments) -> Array:
    """Centred covariance ``[D, D]`` of the activations (divided by the weight)."""
    return jnp.asarray(stats.scatter) / nonzero(jnp.asarray(stats.weight))


def _acts_spectrum(stats: Stats, rank: int) -> Spectrum:
    """Leading eigenpairs of the covariance of the activations."""
    mean = jnp.asarray(stats.mean)
    # Activations are known to the rounding of their mean, and no better.
    floor = (jnp.finfo(mean.dtype).eps * jnp.linalg.norm(mean)) ** 2
    if isinstance(stats, SketchedMoments):
        return _sketch_spectrum(stats.acts, stats, rank, floor)
    return psd_spectrum(covariance(stats), rank, floor=floor)


def _grads_spectrum(
    stats: Stats, rank: int, center: bool
) -> tuple[Spectrum, Array, Array]:
    """Leading eigenpairs of G, its trace, and the trace before it was centred."""
    if isinstance(stats, SketchedMoments):
        if center:
            raise ValueError(
                "gradient_pca: center must be False for sketched gradients, which are "
                "not centred, got True; use toyfeat.moments"
            )
        svd = _grads_sketch(stats)
        spectrum = _sketch_spectrum(svd, stats, rank)
        total = _sketch_energy(svd, stats)
        return spectrum, total, total
    second, floor = jnp.asarray(stats.grad_second), jnp.zeros(())
    total = jnp.trace(second)
    if center:
        # A difference is only known to the rounding of its parts.
        norm = jnp.max(jnp.sum(jnp.abs(second), axis=0))
        floor = len(second) * jnp.finfo(second.dtype).eps * norm
        mean = jnp.asarray(stats.grad_mean)
        second = second - stats.readouts * mean[:, None] * mean[None, :]
    spectrum = psd_spectrum(second, rank, floor=floor)
    return spectrum, jnp.maximum(jnp.trace(second), 0), total


def _sketch_spectrum(
    svd: SVD, stats: SketchedMoments, rank: int, floor: Array | float = 0.0
) -> Spectrum:
    """Leading eigenpairs of a second moment, from the SVD of its sketch.

    The numerical rank is that of :func:`toyfeat.linalg.psd_spectrum`.
    """
    values = svd.s**2 / nonzero(jnp.asarray(stats.weight))
    dim, eps = svd.vt.shape[1], jnp.finfo(values.dtype).eps
    cut = jnp.maximum(dim * eps * values[0], jnp.asarray(floor, values.dtype))
    significant = ~(values[:rank] <= cut)  # true for NaN
    zero = jnp.zeros((), values.dtype)
    return Spectrum(
        values=jnp.where(significant, values[:rank], zero),
        vectors=jnp.where(significant[None, :], svd.vt[:rank].T, zero),
        rank=jnp.sum(significant, dtype=jnp.int32),
        cut=cut,
    )


def _grads_sketch(stats: SketchedMoments) -> SVD:
    """The sketch of the gradients, which was checked to be there."""
    if stats.grads is None:
        raise ValueError(f"gradient_pca: {NO_GRADS}")
    return stats.grads


def _gradient_form(columns: Array, stats: Stats) -> Array:
    """Quadratic form ``x^T G x`` for columns ``x``."""
    # G = V s^2 V^T / weight of a sketch, without ever forming G.
    if isinstance(stats, SketchedMoments):
        svd = _grads_sketch(stats)
        slopes = dot(svd.vt, columns) * svd.s[:, None]
        return dot(slopes.T, slopes) / nonzero(jnp.asarray(stats.weight))
    return dot(columns.T, dot(jnp.asarray(stats.grad_second), columns))


def _multiply_covariance(rows: Array, stats: Stats) -> Array:
    """Product ``x S`` for rows ``x``."""
    # Likewise S from its sketch: into the directions, times the values, and back.
    if isinstance(stats, SketchedMoments):
        values = stats.acts.s**2 / nonzero(jnp.asarray(stats.weight))
        return dot(dot(rows, stats.acts.vt.T) * values[None, :], stats.acts.vt)
    return dot(rows, covariance(stats))


def _acts_energy(stats: Stats) -> Array:
    """Trace of the full covariance of the activations."""
    if isinstance(stats, SketchedMoments):
        return _sketch_energy(stats.acts, stats)
    return jnp.maximum(jnp.trace(covariance(stats)), 0)


def _sketch_energy(svd: SVD, stats: SketchedMoments) -> Array:
    """Trace of a second moment: the sketch's part and the estimated residual."""
    energy = jnp.sum(svd.s**2) + svd.info.residual**2
    return energy / nonzero(jnp.asarray(stats.weight))


def _diagnostics(spectrum: Spectrum, total: Array, uncentred: Array) -> Diagnostics:
    """Diagnostics of a basis.

    Args:
      spectrum: its eigenpairs.
      total: ``[]``, trace of the decomposed matrix.
      uncentred: ``[]``, that trace before centring.
    """
    removed = jnp.where(
        uncentred > 0, 1 - total / nonzero(uncentred), jnp.zeros_like(total)
    )
    return Diagnostics(
        rank=spectrum.rank, total=total, cut=spectrum.cut, centring_removed=removed
    )
