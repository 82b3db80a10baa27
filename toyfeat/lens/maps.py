"""Maps of lenses: from the stream at a site to the final one."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_int, check_type
from toyfeat.lens.averages import Estimate
from toyfeat.linalg import psd_spectrum
from toyfeat.types import Array

KINDS = ("jacobian", "second moment", "clustered", "contrast", "tuned", "logit")
"""Kinds of lenses, as files name them."""

_HIGHEST = jax.lax.Precision.HIGHEST


class LensMap(NamedTuple):
    """Map of a lens at one site, from its stream to the final one.

    Attributes:
      matrices: ``[E, D, D]``, out times in; the one of the nearest centre is applied.
      centres: ``[E, D]``, or ``None`` for ``E = 1``.
      bias: ``[D]``, added behind the matrix, or ``None``.
    """

    matrices: Array
    centres: Array | None = None
    bias: Array | None = None


def estimated_maps(estimate: Estimate) -> dict[str, LensMap]:
    """Make maps of the matrices of a fit, one per site.

    Raises:
      TypeError: if it is no :class:`Estimate`.
      ValueError: if the fit has clusters, has seen no prompt, or is not finite.
    """
    check_type("lenses", "estimate", estimate, Estimate, hint="finish(state) of a fit")
    if not int(estimate.prompts):
        raise ValueError(
            "lenses: the estimate must be of one prompt or more, got none; update the "
            "state with prompts that are longer than what is skipped"
        )
    wrong = [site for site, x in estimate.matrices.items() if x.ndim != 2]
    if wrong:
        raise ValueError(
            f"lenses: the estimate must have one matrix per site, got clusters at "
            f"{wrong[0]!r}; make a lens of them with ft.lenses.clustered_lens"
        )
    broken = [
        s for s, x in estimate.matrices.items() if not bool(jnp.isfinite(x).all())
    ]
    if broken:
        raise ValueError(
            f"lenses: the estimate must be finite, got NaN or inf at {broken[0]!r}; a "
            "prompt overflowed, or dtype is too small for the model"
        )
    return {site: LensMap(x[None]) for site, x in estimate.matrices.items()}


def root_maps(maps: Mapping[str, LensMap], rank: int | None) -> dict[str, LensMap]:
    r"""Take the roots :math:`E[J^\top J]^{1/2}`, of the leading directions alone.

    Args:
      maps: of second moments.
      rank: directions that are kept, all by default.

    Returns:
      Symmetric maps.
    """

    def root(matrix: Array) -> Array:
        dim = len(matrix)
        num = dim if rank is None else check_int("lenses", "rank", rank, most=dim)
        spectrum = psd_spectrum(matrix)
        vectors, values = spectrum.vectors[:, :num], spectrum.values[:num]
        scaled = vectors * jnp.sqrt(jnp.maximum(values, 0))[None]
        return jnp.matmul(scaled, vectors.T, precision=_HIGHEST)

    return {site: LensMap(root(x.matrices[0])[None]) for site, x in maps.items()}


def contrast_weights(matrices: Array, shares: Array) -> Array:
    r"""Weigh experts by sign, so that what cancels in their mean is left.

    The weights :math:`\alpha` are those of the leading principal component of the
    experts as vectors, :math:`\sum_e \alpha_e J_e` with :math:`\alpha_e = \sqrt{p_e}
    v_e`, of the differences from the mean expert.

    Args:
      matrices: ``[E, D, D]``.
      shares: ``[E]``, share of the activations of each.

    Returns:
      ``[E]``, of absolute sum 1; the largest is positive.

    Example:
      >>> import jax.numpy as jnp
      >>> experts = jnp.array([[[2.0]], [[-2.0]]])
      >>> contrast_weights(experts, jnp.array([0.5, 0.5])).round(3).tolist()
      [0.5, -0.5]
    """
    shares = jnp.asarray(shares, matrices.dtype)
    shares = shares / jnp.sum(shares)
    # Clusters without activations have no matrix; they count nothing.
    rows = jnp.where(shares[:, None] > 0, matrices.reshape(len(shares), -1), 0)
    mean = jnp.einsum("e,ed->d", shares, rows, precision=_HIGHEST)
    rows = (rows - mean[None]) * jnp.sqrt(shares)[:, None]
    gram = jnp.matmul(rows, rows.T, precision=_HIGHEST)
    leading = psd_spectrum(gram).vectors[:, 0]
    weights = leading * jnp.sqrt(shares)
    sign = jnp.sign(weights[jnp.argmax(jnp.abs(weights))])
    return sign * weights / jnp.sum(jnp.abs(weights))
