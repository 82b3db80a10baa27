"""What is put in the place of an activation: dictionaries, readers, bases."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.coding import lengths
from toyfeat.dictionary.selection import best_of_each
from toyfeat.linalg.precise import dot, nonzero
from toyfeat.types import Array, Basis, Dictionary, Params, Taps


class Replaced(NamedTuple):
    """Activations as a sum of a few parts.

    Attributes:
      recon: ``[N, D]``.
      parts: ``[N, k, D]``, what every latent that is there adds to it, 0 where there
        are fewer.
      index: ``[N, k]``, which latents these are.
    """

    recon: Array
    parts: Array
    index: Array


class Method(NamedTuple):
    """A way to describe the activations of a site.

    Attributes:
      rule: ``(params, Taps) -> Replaced``, to be compiled.
      latents: ``M``, how many there are.
      writers: ``[M, D]`` the directions that latents add, or ``None`` where these
        depend on what else is there.
      params: arrays that the rule wants.
    """

    rule: Callable[[Any, Taps], Replaced]
    latents: int
    writers: Array | None
    params: Any = None

    def replace(self, taps: Taps) -> Replaced:
        """Apply the rule."""
        return self.rule(self.params, taps)


def of_dictionary(
    dictionary: Dictionary,
    params: Params,
    *,
    most: int | None = None,
    chooser: int | None = None,
) -> Method:
    """A dictionary, with gradients where its architecture looks at them.

    Args:
      dictionary: of the site's width.
      params: for activations as they are.
      most: codes of an example that are looked at, the largest effects on the
        activation; ``k`` by default, where the architecture has one of every example.
      chooser: which of the gradients codes are chosen by, where they are; all of them
        together by default.

    Returns:
      :class:`Method`; ``recon`` is of all codes in any case.

    Raises:
      ValueError: if ``most`` is needed and not given, or not in ``1 .. M``.
    """
    config = dictionary.config
    chosen = config.architecture in ("topk", "abstopk", "gradient_topk", "paired")
    if most is None and chosen:
        most = config.k
    if most is None:
        raise ValueError(
            f"of_dictionary: {config.architecture} has no k of every example; say how "
            "many codes to look at, most="
        )
    if not (isinstance(most, int) and 1 <= most <= config.d_sae):
        raise ValueError(
            f"of_dictionary: most must be an int in 1 .. {config.d_sae}, the latents, "
            f"got {most!r}"
        )
    writers = params["W_dec"]
    if config.rescale_acts_by_decoder_norm:
        writers = writers / lengths(writers)[:, None]
    relative = jnp.linalg.norm(writers / nonzero(jnp.max(jnp.abs(writers))), axis=1)

    def rule(arrays: Any, taps: Taps) -> Replaced:
        params, writers, relative = arrays
        grads = taps.grads
        if chooser is not None and grads is not None:
            grads = grads[:, chooser : chooser + 1]
        codes = dictionary.encode(params, taps.acts, grads=grads)
        index, _ = best_of_each(jnp.abs(codes) * relative[None, :], most)
        values = jnp.take_along_axis(codes, index, axis=1)
        parts = values[:, :, None] * writers[index]
        return Replaced(dictionary.decode(params, codes), parts, index)

    return Method(rule, config.d_sae, writers, (params, writers, relative))


def of_basis(basis: Basis, rank: int) -> Method:
    """The first directions of a basis.

    Args:
      basis: from any decomposition.
      rank: how many.

    Returns:
      :class:`Method` whose latents are all there in every example.

    Raises:
      ValueError: if the basis has not so many directions.
    """
    if not 1 <= rank <= basis.readers.shape[1]:
        raise ValueError(
            f"of_basis: wanted a rank in 1 .. {basis.readers.shape[1]}, got {rank}"
        )
    readers, writers = basis.readers[:, :rank], basis.writers[:rank]
    mean = basis.mean[None, :]

    def rule(arrays: Any, taps: Taps) -> Replaced:
        mean, readers, writers = arrays
        codes = dot(taps.acts - mean, readers)
        parts = codes[:, :, None] * writers[None]
        index = jnp.broadcast_to(jnp.arange(rank)[None, :], codes.shape)
        return Replaced(dot(codes, writers) + mean, parts, index)

    return Method(rule, rank, writers, (mean, readers, writers))


def of_readers(
    dictionary: Dictionary,
    params: Params,
    mean: Array,
    covariance: Array,
    *,
    chooser: int = 0,
) -> Method:
    r"""A dictionary of gradients, whose latents only say what is read.

    The activation is replaced by the best linear guess from what the readers of the
    example's support :math:`S` read,
    :math:`\bar a + \Sigma R_S (R_S^\top \Sigma R_S)^+ R_S^\top (a - \bar a)`.

    Args:
      dictionary: a signed TopK of the gradients of one readout.
      params: its parameters for gradients as they are; rows of ``W_dec`` are readers.
      mean: ``[D]``, of the activations.
      covariance: ``[D, D]``.
      chooser: which of the gradients the support is chosen by.

    Returns:
      :class:`Method`; a latent's part is its column of
      :math:`\Sigma R_S (R_S^\top \Sigma R_S)^+` times what it reads.

    Raises:
      ValueError: if the dictionary has no ``k``.
    """
    k = dictionary.config.k
    if k is None:
        raise ValueError("of_readers: wanted a dictionary with k codes per example")
    rows = params["W_dec"] / lengths(params["W_dec"])[:, None]
    # In units of what they read, so that the pseudo-inverse leaves none out.
    read = jnp.sqrt(jnp.maximum(jnp.sum(dot(rows, covariance) * rows, axis=1), 0.0))
    rows = rows / nonzero(read)[:, None]
    spread = dot(rows, covariance)  # Sigma r, a row each

    def rule(arrays: Any, taps: Taps) -> Replaced:
        params, mean, rows, spread = arrays
        assert taps.grads is not None
        codes = dictionary.encode(params, taps.grads[:, chooser])
        index, here = best_of_each(jnp.abs(codes), k)
        here = (here & (jnp.take_along_axis(codes, index, axis=1) != 0)).astype(float)
        readers, patterns = rows[index], spread[index]
        readers = readers * here[:, :, None].astype(readers.dtype)
        patterns = patterns * here[:, :, None].astype(readers.dtype)
        high = jax.lax.Precision.HIGHEST
        among = jnp.einsum("nkd,njd->nkj", readers, patterns, precision=high)
        centred = taps.acts - mean[None, :]
        read = jnp.einsum("nkd,nd->nk", readers, centred, precision=high)
        inverse = jnp.linalg.pinv(among, rtol=1e-5, hermitian=True)
        codes = jnp.einsum("nkj,nj->nk", inverse, read, precision=high)
        # A latent's own share: its reading times its column, codes are of patterns.
        columns = jnp.einsum("nkj,nkd->njd", inverse, patterns, precision=high)
        parts = columns * read[:, :, None]
        moved = jnp.einsum("nk,nkd->nd", codes, patterns, precision=high)
        recon = mean[None, :] + moved
        return Replaced(recon, parts, index)

    arrays = params, mean, rows, spread
    return Method(rule, dictionary.config.d_sae, None, arrays)
