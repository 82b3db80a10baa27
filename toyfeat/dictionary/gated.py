"""Gated dictionaries: one encoder decides which codes are active, one how large."""

import jax
import jax.numpy as jnp

from toyfeat.dictionary.base import (
    DECODER_NORM,
    factory_config,
    lengths,
    make_dictionary,
    weighted_mean,
)
from toyfeat.dictionary.gather import decode_dense
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    Inputs,
    RuleInputs,
    SavedAs,
    Term,
)
from toyfeat.types import Array, Params


def gated(dim: int, latents: int, *, decoder_norm: float = DECODER_NORM) -> Dictionary:
    r"""Make a dictionary whose gate is a scaled copy of its encoder.

    .. math:: f = [\pi > 0] \max(0, \, x W_{enc} e^{r_{mag}} + b_{mag}), \quad
       \pi = x W_{enc} + b_{gate}, \quad x = a - b_{dec}

    Args:
      dim: as in :func:`toyfeat.dictionaries.standard`.
      latents: as in :func:`toyfeat.dictionaries.standard`.
      decoder_norm: as in :func:`toyfeat.dictionaries.standard`.

    Returns:
      :class:`Dictionary`; parameters ``W_enc``, ``W_dec``, ``b_dec``, ``b_gate``,
      ``b_mag`` and ``r_mag [M]``.

    Raises:
      ValueError: if a size is not positive.

    References:
      Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse
      autoencoders".
    """
    config = factory_config(GATED, dim, latents)
    return make_dictionary(GATED, config, decoder_norm=decoder_norm)


def gate() -> Term:
    r"""Penalize the error of the gate, :math:`|x - \max(0, \pi) W_{dec} - b_{dec}|^2`.

    Returns:
      :class:`Term` for :func:`toyfeat.dictionaries.gated`.

    References:
      Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse
      autoencoders", equation 8; the decoder is not frozen here, as in SAELens.
    """

    def loss(inputs: Inputs) -> Array:
        # The gate has no gradient through its step, so it learns from a
        # reconstruction by its own pre-activations.
        rows, bias = inputs.params["W_dec"], inputs.params["b_dec"]
        recon = decode_dense(jax.nn.relu(inputs.out.hidden_pre), rows) + bias[None, :]
        return weighted_mean(inputs, jnp.sum((inputs.target - recon) ** 2, axis=1))

    return Term("gate", loss)


def _tensors(key: Array, config: Config, shared: Params) -> Params:
    """Make gates and sizes that start as the same function."""
    del key, shared
    zeros = jnp.zeros(config.d_sae)
    return {"b_gate": zeros, "b_mag": zeros, "r_mag": zeros}


def _rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    """Compute codes: an open gate and its size, both from the same pre-activation."""
    del config
    # The gate has a bias of its own, the size a scale and a bias.
    gates = batch.pre + params["b_gate"][None, :]
    sizes = batch.pre * jnp.exp(params["r_mag"])[None, :] + params["b_mag"][None, :]
    sizes = jax.nn.relu(sizes)
    # The step of the gate has no derivative: only sizes learn from reconstruction.
    values = jnp.where(gates > 0, sizes, jnp.zeros_like(sizes))
    return Codes(values, hidden_pre=gates)


def _sparsity(inputs: Inputs) -> Array:
    r""":math:`\sum_j \max(0, \pi_j) |w_j|`, of the gates."""
    by_latent = inputs.weights @ jax.nn.relu(inputs.out.hidden_pre)
    return jnp.sum(by_latent * lengths(inputs.params["W_dec"]))


GATED = Architecture(
    name="gated",
    rule=_rule,
    tensors=_tensors,
    latent_axes={"b_gate": 0, "b_mag": 0, "r_mag": 0},
    transcodes=False,
    sparsity=_sparsity,
    losses=(gate(),),
    saved_as=SavedAs("gated"),
)
"""Codes where a gate is open."""
