"""Standard sparse autoencoders: ReLU codes."""

import jax

from toyfeat.dictionary.base import DECODER_NORM, factory_config, make_dictionary
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    RuleInputs,
    SavedAs,
)
from toyfeat.types import Params


def standard(
    dim: int,
    latents: int,
    *,
    target_dim: int | None = None,
    decoder_norm: float = DECODER_NORM,
) -> Dictionary:
    r"""Make a ReLU dictionary, :math:`f = \max(0, (a - b_{dec}) W_{enc} + b_{enc})`.

    Args:
      dim: width ``D`` of the activations.
      latents: number of latents ``M``.
      target_dim: width of the output of a transcoder, which writes another activation
        than it reads; ``b_dec`` is not subtracted from its input.
      decoder_norm: length of the rows of ``W_dec`` at the start.

    Returns:
      :class:`Dictionary`; parameters ``W_enc [D, M]``, ``b_enc [M]``, ``W_dec
      [M, D]``, ``b_dec [D]``.

    Raises:
      ValueError: if a size is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sae = standard(4, 16)
      >>> params = sae.init(jax.random.key(0))
      >>> codes = sae.encode(params, jnp.ones((2, 4)))
      >>> codes.shape, sae.decode(params, codes).shape
      ((2, 16), (2, 4))

    References:
      Bricken et al. (2023), "Towards monosemanticity".
    """
    config = factory_config(STANDARD, dim, latents, target_dim)
    return make_dictionary(STANDARD, config, decoder_norm=decoder_norm)


def _rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    del config, params
    return Codes(jax.nn.relu(batch.pre))


STANDARD = Architecture(
    name="standard", rule=_rule, saved_as=SavedAs("standard", transcoder=True)
)
"""ReLU codes, none of which compete."""
