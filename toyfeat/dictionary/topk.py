"""Top-k dictionaries: the largest codes of every example."""

from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.dictionary.base import (
    DECODER_NORM,
    code_units,
    factory_config,
    make_dictionary,
    normalized_grads,
    origin,
    required_k,
)
from toyfeat.dictionary.gather import take
from toyfeat.dictionary.selection import best_of_each, first_of
from toyfeat.dictionary.shard_selection import best_of_shards
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    RuleInputs,
    SavedAs,
)
from toyfeat.types import Array, Params


def topk(
    dim: int,
    latents: int,
    k: int,
    *,
    signed: bool = False,
    rescale_acts_by_decoder_norm: bool = True,
    target_dim: int | None = None,
    decoder_norm: float = DECODER_NORM,
) -> Dictionary:
    """Make a dictionary that keeps the ``k`` largest codes of every example.

    Args:
      dim: width ``D`` of the activations.
      latents: number of latents ``M``.
      k: number of codes that are kept; ``encode(..., k=)`` takes a smaller one, which
        may be traced.
      signed: keep the largest by magnitude with their sign (SAELens' AbsTopK), for
        gradients, whose sign has no meaning; otherwise negative codes become 0.
      rescale_acts_by_decoder_norm: multiply codes by the length of their row of
        ``W_dec`` before they are compared, and divide by it in ``decode``.
      target_dim: as in :func:`toyfeat.dictionaries.standard`.
      decoder_norm: as in :func:`toyfeat.dictionaries.standard`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`toyfeat.dictionaries.standard`.

    Raises:
      ValueError: if a size is not positive or ``k`` is not in ``1 .. latents``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sae = topk(4, 16, 2)
      >>> codes = sae.encode(sae.init(jax.random.key(0)), jnp.ones((3, 4)))
      >>> bool(((codes != 0).sum(1) <= 2).all())
      True

    References:
      Gao et al. (2024), "Scaling and evaluating sparse autoencoders".
    """
    architecture = ABS_TOPK if signed else TOPK
    config = factory_config(
        architecture,
        dim,
        latents,
        target_dim,
        k=k,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
    )
    return make_dictionary(architecture, config, decoder_norm=decoder_norm)


def gradient_topk(
    dim: int,
    latents: int,
    k: int,
    *,
    weight: float = 1.0,
    rescale_acts_by_decoder_norm: bool = True,
    target_dim: int | None = None,
    decoder_norm: float = DECODER_NORM,
) -> Dictionary:
    r"""Make a dictionary that keeps the codes of the largest effects.

    The ``k`` codes of the largest :math:`f_j (1 + \beta |w_j \cdot g|)` are kept: with
    gradients ``[N, K, D]``, a code counts for more the more its writer moves the
    readouts, :math:`|w_j \cdot g|` being the root mean square over the ``K`` of them.
    The values of the codes are unchanged.  Without gradients it is
    :func:`toyfeat.dictionaries.topk`.

    Args:
      dim: as in :func:`toyfeat.dictionaries.topk`.
      latents: as in :func:`toyfeat.dictionaries.topk`.
      k: as in :func:`toyfeat.dictionaries.topk`.
      weight: :math:`\beta`, in units of one over the size of the gradients, which is 1
        in :func:`toyfeat.trainer` and ``grad_scale [K]`` in parameters from
        :func:`toyfeat.denormalized`.
      rescale_acts_by_decoder_norm: as in :func:`toyfeat.dictionaries.topk`.
      target_dim: as in :func:`toyfeat.dictionaries.topk`.
      decoder_norm: as in :func:`toyfeat.dictionaries.topk`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`toyfeat.dictionaries.standard`.

    Raises:
      ValueError: as in :func:`toyfeat.dictionaries.topk`.

    References:
      Olmo et al. (2024), "Features that make a difference", arXiv 2411.10397,
      whose gradient is that of the loss (``K = 1``).
    """
    config = factory_config(
        GRADIENT_TOPK,
        dim,
        latents,
        target_dim,
        k=k,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
        gradient_weight=weight,
    )
    return make_dictionary(GRADIENT_TOPK, config, decoder_norm=decoder_norm)


def keep_largest(
    config: Config,
    params: Params,
    batch: RuleInputs,
    score: Array,
    *,
    signed: bool = False,
) -> tuple[Array, Array | None, Array]:
    """Keep the codes of the ``k`` largest scores of every example.

    Only these codes take part in what follows, the derivative included.  Where latents
    are split over devices, codes stay at their latents: values ``[N, M]``, no index.

    Args:
      config: settings of the dictionary.
      params: its parameters.
      batch: what the rule is given.
      score: ``[N, M]``; infinite scores are not chosen.
      signed: whether negative codes are kept.

    Returns:
      Values ``[N, k]``, the latents they belong to, and which places are filled.
    """
    num = required_k(config)
    if batch.split is not None:
        filled = best_of_shards(score, num, batch.k, batch.split)
        values = batch.pre if signed else jax.nn.relu(batch.pre)
        return jnp.where(filled, values, jnp.zeros_like(values)), None, filled
    # Places are static; a smaller k, which may be traced, empties the last of them.
    index, filled = best_of_each(score, num)
    if batch.k is not None:
        filled = filled & first_of(num, batch.k)
    # Take the chosen codes so that the derivative costs k rows per example, not M.
    bias, start = params["b_enc"], origin(config, params)
    values = take(batch.acts, start, params["W_enc"], bias, batch.pre, index)
    if not signed:
        values = jax.nn.relu(values)
    return jnp.where(filled, values, jnp.zeros_like(values)), index, filled


def _topk_rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    """Keep the largest codes in the units in which they are compared."""
    score = batch.pre * code_units(config, params)[None, :]
    values, index, _ = keep_largest(config, params, batch, score)
    return Codes(values, index)


def _abs_topk_rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    """Keep the codes of the largest magnitude, with their sign."""
    score = jnp.abs(batch.pre * code_units(config, params)[None, :])
    values, index, _ = keep_largest(config, params, batch, score, signed=True)
    return Codes(values, index)


def _gradient_topk_rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    """Keep the codes that are large and whose writers move the readouts."""
    units = code_units(config, params)
    score = batch.pre * units[None, :]
    if batch.grads is not None:
        # Root mean square effect of every latent's writer on the readouts.
        grads = normalized_grads(params, batch.grads)
        slopes = jnp.einsum("nkd,md->nkm", grads, params["W_dec"]) / units[None, None]
        effect = jnp.sqrt(jnp.mean(slopes**2, axis=1))
        # Codes that are off stay off, whatever effect they would have.
        score = jax.nn.relu(score) * (1 + config.gradient_weight * effect)
    values, index, _ = keep_largest(config, params, batch, score)
    return Codes(values, index)


def _denormalize_gradient_topk(config: Config, params: Params, units: Any) -> Params:
    del params
    if config.rescale_acts_by_decoder_norm:
        return {"grad_scale": units.grads}  # effects are those of unit rows
    return {"grad_scale": units.grads * units.target}  # effects are those of W_dec


TOPK = Architecture(
    name="topk", rule=_topk_rule, selects="example", saved_as=SavedAs("topk")
)
"""The largest codes of every example."""

ABS_TOPK = Architecture(
    name="abstopk",
    rule=_abs_topk_rule,
    selects="example",
    signed=True,
    saved_as=SavedAs("abstopk"),
)
"""The codes of the largest magnitude of every example."""

GRADIENT_TOPK = Architecture(
    name="gradient_topk",
    rule=_gradient_topk_rule,
    selects="example",
    reads_gradients=True,
    denormalize=_denormalize_gradient_topk,
    saved_as=SavedAs(
        "topk", extra_tensors=("grad_scale",), metadata=("gradient_weight",)
    ),
)
"""The codes of every example that are large and move the readouts."""
