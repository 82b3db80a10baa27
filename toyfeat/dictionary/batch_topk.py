"""Batch top-k and Matryoshka dictionaries: the largest codes of a batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int
from toyfeat.dictionary.base import (
    DECODER_NORM,
    code_units,
    factory_config,
    make_dictionary,
    required_k,
    weighted_mean,
)
from toyfeat.dictionary.gather import decode_dense
from toyfeat.dictionary.selection import cut_of_batch
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    Inputs,
    RuleInputs,
    SavedAs,
    zero_bias,
)
from toyfeat.types import Array, Params


def batch_topk(
    dim: int,
    latents: int,
    k: int,
    *,
    rescale_acts_by_decoder_norm: bool = True,
    target_dim: int | None = None,
    decoder_norm: float = DECODER_NORM,
) -> Dictionary:
    """Make a dictionary that keeps the ``k N`` largest codes of a batch of ``N``.

    After training ``encode`` keeps the codes above a threshold instead.  Codes that
    equal the smallest one that is kept are kept too, so that equal examples have
    equal codes; SAELens keeps exactly ``k N`` of them, in the order of its sort.
    Codes of 0 are not counted by either.

    Args:
      dim: as in :func:`toyfeat.dictionaries.topk`.
      latents: as in :func:`toyfeat.dictionaries.topk`.
      k: codes per example, on average over a batch.
      rescale_acts_by_decoder_norm: as in :func:`toyfeat.dictionaries.topk`.
      target_dim: as in :func:`toyfeat.dictionaries.topk`.
      decoder_norm: as in :func:`toyfeat.dictionaries.topk`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`toyfeat.dictionaries.standard`
      and ``topk_threshold []``, above which ``encode(..., train=False)`` keeps codes.

    Raises:
      ValueError: as in :func:`toyfeat.dictionaries.topk`.

    References:
      Bussmann, Leask and Nanda (2024), "BatchTopK sparse autoencoders".
    """
    config = factory_config(
        BATCH_TOPK,
        dim,
        latents,
        target_dim,
        k=k,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
    )
    return make_dictionary(BATCH_TOPK, config, decoder_norm=decoder_norm)


def matryoshka(
    dim: int,
    latents: int,
    k: int,
    *,
    widths: Sequence[int],
    rescale_acts_by_decoder_norm: bool = True,
    decoder_norm: float = DECODER_NORM,
) -> Dictionary:
    """Make a :func:`batch_topk` whose leading latents also reconstruct alone.

    Args:
      dim: as in :func:`toyfeat.dictionaries.topk`.
      latents: as in :func:`toyfeat.dictionaries.topk`.
      k: as in :func:`batch_topk`.
      widths: increasing numbers of leading latents that reconstruct alone; the last
        is ``latents``.
      rescale_acts_by_decoder_norm: as in :func:`toyfeat.dictionaries.topk`.
      decoder_norm: as in :func:`toyfeat.dictionaries.topk`.

    Returns:
      :class:`Dictionary` as from :func:`batch_topk`; the widths are in its
      ``config``, for :func:`toyfeat.losses.reconstruction`.

    Raises:
      ValueError: as in :func:`toyfeat.dictionaries.topk`, or if the widths do not
        increase to ``latents``.

    References:
      Bussmann et al. (2025), "Learning multi-level features with Matryoshka sparse
      autoencoders".
    """
    if not isinstance(widths, Sequence | np.ndarray) or isinstance(widths, str):
        raise TypeError(
            f"matryoshka: widths must be a sequence of ints, got {widths!r}; such as "
            "(latents // 2, latents)"
        )
    latents = check_int("matryoshka", "latents", latents)
    widths = tuple(check_int("matryoshka", "a width", x) for x in widths)
    # Neighbours of 0, w_1, w_2, ... must increase.
    steps = zip((0, *widths), widths, strict=False)
    if not widths or widths[-1] != latents or any(a >= b for a, b in steps):
        raise ValueError(
            f"matryoshka: widths must increase to latents = {latents}, got {widths}; "
            "the last one is latents"
        )
    config = factory_config(
        MATRYOSHKA,
        dim,
        latents,
        k=k,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
        matryoshka_widths=widths,
    )
    return make_dictionary(MATRYOSHKA, config, decoder_norm=decoder_norm)


def _tensors(key: Array, config: Config, shared: Params) -> Params:
    return zero_bias(key, config, shared) | {"topk_threshold": jnp.zeros(())}


def _rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    """Keep the largest codes of a batch, ``k`` per example on average."""
    values = jax.nn.relu(batch.pre)
    codes, num = values * code_units(config, params)[None, :], None
    if batch.weights is not None:  # examples of weight 0 have no codes to choose
        codes = codes * jnp.sign(batch.weights)[:, None]
        num = jnp.sum(batch.weights > 0)
    # Codes at the cut are kept, too, so that equal examples have equal codes.
    cut = cut_of_batch(codes, required_k(config), batch.k, num, batch.split)
    above = codes >= cut
    return Codes(jnp.where(above, values, jnp.zeros_like(values)))


def _rule_after_training(config: Config, params: Params, batch: RuleInputs) -> Codes:
    """Keep the codes above the threshold, which no other example moves."""
    values = jax.nn.relu(batch.pre)
    above = values * code_units(config, params)[None, :] > params["topk_threshold"]
    return Codes(jnp.where(above, values, jnp.zeros_like(values)))


def _reconstruction(inputs: Inputs) -> Array:
    """Sum of the errors of all widths, each with the latents before it."""
    # All latents; their reconstruction is there already.
    error = jnp.sum((inputs.target - inputs.out.recon) ** 2, axis=1)
    total = weighted_mean(inputs, error)
    # Then every prefix, each made from the one before by the latents between them.
    widths = inputs.dictionary.config.matryoshka_widths
    values, rows = inputs.out.values, inputs.params["W_dec"]
    recon = inputs.params["b_dec"][None, :]
    between = _all_between if inputs.dictionary.split is not None else _between
    for first, last in zip((0, *widths), widths[:-1], strict=False):
        recon = recon + between(values, rows, first, last)
        error = jnp.sum((inputs.target - recon) ** 2, axis=1)
        total = total + weighted_mean(inputs, error)
    return total


def _between(values: Array, rows: Array, first: int, last: int) -> Array:
    """Reconstruct from the latents in ``first .. last - 1``."""
    return decode_dense(values[:, first:last], rows[first:last])


def _all_between(values: Array, rows: Array, first: int, last: int) -> Array:
    """Reconstruct from the latents in ``first .. last - 1``, all others set to 0.

    A slice of latents that are split over devices would move codes between them.
    """
    latents = jnp.arange(len(rows))
    inside = ((latents >= first) & (latents < last))[None, :]
    return decode_dense(jnp.where(inside, values, jnp.zeros_like(values)), rows)


def _denormalize(config: Config, params: Params, units: Any) -> Params:
    threshold = params["topk_threshold"]
    if config.rescale_acts_by_decoder_norm:  # codes are in units of the output
        threshold = threshold * units.target
    return {"topk_threshold": threshold}


def _fold(config: Config, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """JumpReLU with the same codes: rows of length 1, one threshold for all."""
    # Codes are compared in units of the output: rows of length 1 make it the same.
    norm = np.ones(config.d_sae, np.float32)
    if config.rescale_acts_by_decoder_norm:
        norm = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
        norm = np.where(norm > 0, norm, 1).astype(np.float32)
    return {
        "W_enc": tensors["W_enc"] * norm[None, :],
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
        "b_dec": tensors["b_dec"],
        "threshold": np.full(config.d_sae, tensors["topk_threshold"], np.float32),
    }


BATCH_TOPK = Architecture(
    name="batchtopk",
    rule=_rule,
    rule_after_training=_rule_after_training,
    tensors=_tensors,
    latent_axes={"b_enc": 0, "topk_threshold": None},
    selects="batch",
    averaged_threshold="topk_threshold",
    denormalize=_denormalize,
    saved_as=SavedAs("jumprelu", transcoder=True, fold=_fold),
)
"""The largest codes of a batch, later those above a threshold."""

MATRYOSHKA = dataclasses.replace(
    BATCH_TOPK, name="matryoshka_batchtopk", reconstruction=_reconstruction
)
"""Batch top-k with a reconstruction by every prefix of the latents."""
