"""Replacements of a site's activations: dictionaries, gradient dictionaries, bases."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_int
from toyfeat.dictionary.base import lengths
from toyfeat.dictionary.selection import best_of_each
from toyfeat.dictionary.types import Dictionary
from toyfeat.linalg.precision import dot, nonzero
from toyfeat.types import Array, Basis, Params, Taps

# Eigenvalues below this share of the largest count as 0 in the pseudo-inverse.  The
# readers have unit variance there, so that those are readers that repeat each other up
# to the rounding of float32 products of some hundred entries.
_PINV_RTOL = 1e-5


class Replaced(NamedTuple):
    """Reconstructed activations, each a sum of the parts of a few latents.

    Attributes:
      recon: ``[N, D]``.
      parts: ``[N, k, D]``, what each active latent adds to ``recon``, 0 where fewer
        than ``k`` are active.
      index: ``[N, k]``, which latents these are.
    """

    recon: Array
    parts: Array
    index: Array


class Replacement(NamedTuple):
    """Replacement of the activations of a site by a sum of latents' parts.

    Attributes:
      rule: ``(params, Taps) -> Replaced``, to be compiled.
      latents: ``M``, the number of latents.
      writers: ``[M, D]`` directions that latents add, or ``None`` where they depend on
        which other latents are active.
      params: arrays that the rule takes.
    """

    rule: Callable[[Any, Taps], Replaced]
    latents: int
    writers: Array | None
    params: Any = None

    def replace(self, taps: Taps) -> Replaced:
        """Replace activations."""
        return self.rule(self.params, taps)


def from_dictionary(
    dictionary: Dictionary,
    params: Params,
    *,
    max_latents: int | None = None,
    gradient_index: int | None = None,
) -> Replacement:
    """Replace activations by a dictionary's reconstruction.

    Args:
      dictionary: of the site's width.
      params: parameters for activations that are not normalized.
      max_latents: how many codes of an example have parts: those with the largest
        effects on the activation.  ``k`` by default, where the architecture chooses
        ``k`` codes of every example.
      gradient_index: which of the gradients an architecture that reads gradients gets;
        all of them together by default.

    Returns:
      :class:`Replacement`; ``recon`` is of all codes in any case.

    Raises:
      ValueError: if ``max_latents`` is needed and missing, or not in ``1 .. M``.
    """
    config = dictionary.config
    max_latents = _check_max_latents(dictionary, max_latents)

    # Directions that a code of 1 adds, and their lengths relative to the longest entry
    # (squares of very long or short rows would leave the range of float32).
    writers = params["W_dec"]
    if config.rescale_acts_by_decoder_norm:
        writers = writers / lengths(writers)[:, None]
    largest_entry = nonzero(jnp.max(jnp.abs(writers)))
    relative_lengths = jnp.linalg.norm(writers / largest_entry, axis=1)

    def rule(arrays: Any, taps: Taps) -> Replaced:
        params, writers, relative_lengths = arrays
        grads = taps.grads
        if gradient_index is not None and grads is not None:
            grads = grads[:, gradient_index : gradient_index + 1]
        codes = dictionary.encode(params, taps.acts, grads=grads)
        effects = jnp.abs(codes) * relative_lengths[None, :]
        index, _ = best_of_each(effects, max_latents)
        values = jnp.take_along_axis(codes, index, axis=1)
        parts = values[:, :, None] * writers[index]
        return Replaced(dictionary.decode(params, codes), parts, index)

    arrays = params, writers, relative_lengths
    return Replacement(rule, config.d_sae, writers, arrays)


def _check_max_latents(dictionary: Dictionary, max_latents: int | None) -> int:
    """Fill in the architecture's own ``k``, and check the range."""
    config = dictionary.config
    if max_latents is None and dictionary.architecture.selects == "example":
        max_latents = config.k
    if max_latents is None:
        raise ValueError(
            f"from_dictionary: {config.architecture} has no k of every example; say "
            "how many codes to look at, max_latents="
        )
    return check_int(
        "from_dictionary",
        "max_latents",
        max_latents,
        most=config.d_sae,
        about=", the latents",
        error=ValueError,
    )


def from_basis(basis: Basis, rank: int) -> Replacement:
    """Replace activations by their projection on the first directions of a basis.

    Args:
      basis: from any decomposition.
      rank: number of directions.

    Returns:
      :class:`Replacement` whose latents are all active in every example.

    Raises:
      ValueError: if the basis has fewer directions.
    """
    if not 1 <= rank <= basis.readers.shape[1]:
        raise ValueError(
            f"from_basis: wanted a rank in 1 .. {basis.readers.shape[1]}, got {rank}"
        )
    readers, writers = basis.readers[:, :rank], basis.writers[:rank]
    mean = basis.mean[None, :]

    def rule(arrays: Any, taps: Taps) -> Replaced:
        mean, readers, writers = arrays
        codes = dot(taps.acts - mean, readers)
        parts = codes[:, :, None] * writers[None]
        index = jnp.broadcast_to(jnp.arange(rank)[None, :], codes.shape)
        return Replaced(dot(codes, writers) + mean, parts, index)

    return Replacement(rule, rank, writers, (mean, readers, writers))


def from_readers(
    dictionary: Dictionary,
    params: Params,
    mean: Array,
    covariance: Array,
    *,
    gradient_index: int = 0,
) -> Replacement:
    r"""Replace activations by the best linear guess from what active readers read.

    For a dictionary of gradients, whose latents say only what the model reads.  From
    the readers of an example's support :math:`S` the guess is
    :math:`\bar a + \Sigma R_S (R_S^\top \Sigma R_S)^+ R_S^\top (a - \bar a)`.

    Args:
      dictionary: a signed TopK of the gradients of one readout.
      params: parameters for gradients that are not normalized; rows of ``W_dec`` are
        readers.
      mean: ``[D]``, mean of the activations.
      covariance: ``[D, D]``, of the activations.
      gradient_index: which of the gradients chooses the support.

    Returns:
      :class:`Replacement`; a latent's part is its column of
      :math:`\Sigma R_S (R_S^\top \Sigma R_S)^+` times what it reads.

    Raises:
      ValueError: if the dictionary has no ``k``; when applied, for taps without
        gradients.
    """
    k = dictionary.config.k
    if k is None:
        raise ValueError("from_readers: wanted a dictionary with k codes per example")
    rows = params["W_dec"] / lengths(params["W_dec"])[:, None]
    # Scale readers to read with unit variance, so that the pseudo-inverse treats
    # directions of small and large variance alike.
    variance = jnp.sum(dot(rows, covariance) * rows, axis=1)
    rows = rows / nonzero(jnp.sqrt(jnp.maximum(variance, 0.0)))[:, None]
    spread = dot(rows, covariance)  # Sigma r, a row each

    def rule(arrays: Any, taps: Taps) -> Replaced:
        params, mean, rows, spread = arrays
        if taps.grads is None:
            raise ValueError("from_readers: wanted taps with gradients")

        # The gradient chooses the support; rows of unused slots are set to 0.
        codes = dictionary.encode(params, taps.grads[:, gradient_index])
        index, used = best_of_each(jnp.abs(codes), k)
        used = used & (jnp.take_along_axis(codes, index, axis=1) != 0)
        mask = used.astype(float)[:, :, None].astype(rows.dtype)
        readers, patterns = rows[index] * mask, spread[index] * mask

        guess, parts = _linear_guess(readers, patterns, taps.acts - mean[None, :])
        return Replaced(mean[None, :] + guess, parts, index)

    arrays = params, mean, rows, spread
    return Replacement(rule, dictionary.config.d_sae, None, arrays)


def _linear_guess(
    readers: Array, patterns: Array, centred: Array
) -> tuple[Array, Array]:
    """Guess activations from what readers read, with the part of each reader.

    Args:
      readers: ``[N, k, D]``, rows ``R'``, 0 in unused slots.
      patterns: ``[N, k, D]``, rows ``R' Sigma``.
      centred: ``[N, D]``, activations without their mean.

    Returns:
      ``[N, D]`` guesses and ``[N, k, D]`` parts, which sum to them.
    """
    # R' (a - mean), and the pseudo-inverse of R' Sigma R.
    high = jax.lax.Precision.HIGHEST
    gram = jnp.einsum("nkd,njd->nkj", readers, patterns, precision=high)
    readings = jnp.einsum("nkd,nd->nk", readers, centred, precision=high)
    inverse = jnp.linalg.pinv(gram, rtol=_PINV_RTOL, hermitian=True)

    # The guess: coefficients of the patterns Sigma R, and their sum.
    coefficients = jnp.einsum("nkj,nj->nk", inverse, readings, precision=high)
    guess = jnp.einsum("nk,nkd->nd", coefficients, patterns, precision=high)

    # A latent's own part: its column of Sigma R (R' Sigma R)^+ times its reading.
    columns = jnp.einsum("nkj,nkd->njd", inverse, patterns, precision=high)
    return guess, columns * readings[:, :, None]
