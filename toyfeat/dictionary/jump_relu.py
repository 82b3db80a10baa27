"""JumpReLU dictionaries: codes above a learned threshold."""

import jax.numpy as jnp

from toyfeat.checks import check_number
from toyfeat.dictionary.base import (
    DECODER_NORM,
    factory_config,
    make_dictionary,
    weighted_mean,
)
from toyfeat.dictionary.selection import heaviside, jump
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    Inputs,
    RuleInputs,
    SavedAs,
    Term,
    zero_bias,
)
from toyfeat.types import Array, Params

THRESHOLD = 0.01
"""Threshold of every latent at the start: SAELens' ``jumprelu_init_threshold``."""

BANDWIDTH = 0.05
"""Width of the kernel for the derivative by a threshold: SAELens'
``jumprelu_bandwidth``."""


def jump_relu(
    dim: int,
    latents: int,
    *,
    threshold: float = THRESHOLD,
    bandwidth: float = BANDWIDTH,
    target_dim: int | None = None,
    decoder_norm: float = DECODER_NORM,
) -> Dictionary:
    r"""Make a dictionary with thresholds, :math:`f = \max(0, pre) [pre > \theta]`.

    Thresholds are learned.  The derivative by them is a kernel estimate,
    :math:`-\theta / \epsilon` where ``pre`` is within :math:`\epsilon / 2` of it.  The
    defaults are SAELens'.  A threshold moves by about a learning rate a step, so from
    the default it takes thousands of steps to few codes; for activations of a variance
    of 1 per entry, as :func:`toyfeat.trainer` makes them, ``threshold=1, bandwidth=1,
    decoder_norm=0.5`` (SynthSAEBench's) start nearer.

    Args:
      dim: as in :func:`toyfeat.dictionaries.standard`.
      latents: as in :func:`toyfeat.dictionaries.standard`.
      threshold: of every latent at the start.
      bandwidth: :math:`\epsilon`, in units of ``pre``.
      target_dim: as in :func:`toyfeat.dictionaries.standard`.
      decoder_norm: as in :func:`toyfeat.dictionaries.standard`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`toyfeat.dictionaries.standard`
      and ``threshold [M]``.

    Raises:
      ValueError: if a size, the threshold or the bandwidth is not positive.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equations 11 and 12.
    """
    for name, value in {"threshold": threshold, "bandwidth": bandwidth}.items():
        check_number("jump_relu", name, value, above=0)
    config = factory_config(JUMP_RELU, dim, latents, target_dim, bandwidth=bandwidth)
    return make_dictionary(
        JUMP_RELU, config, decoder_norm=decoder_norm, threshold=threshold
    )


def quadratic_l0(target: float) -> Term:
    r"""Penalize a number of codes off its target, :math:`\frac 2 L (L_0 - L)^2`.

    Args:
      target: :math:`L`, codes per example.

    Returns:
      :class:`Term` for :func:`toyfeat.dictionaries.jump_relu`, in place of its
      sparsity.

    References:
      SAELens 6 (``jumprelu_sparsity_loss_mode="quadratic"``).
    """
    check_number("quadratic_l0", "target", target, above=0)

    def loss(inputs: Inputs) -> Array:
        config = inputs.dictionary.config
        if inputs.dictionary.architecture is not JUMP_RELU:
            raise ValueError(
                f"quadratic_l0: only of jump_relu, got {config.architecture}"
            )
        # Relative to the target, so that a coefficient suits all targets alike.
        count = jnp.sum(_active(inputs), axis=1)
        return weighted_mean(inputs, 2 / target * (count - target) ** 2)

    return Term("sparsity", loss, warm_up=True)


def _tensors(
    key: Array, config: Config, shared: Params, *, threshold: float = THRESHOLD
) -> Params:
    """Make thresholds of one value beside the bias of the encoder."""
    thresholds = {"threshold": jnp.full(config.d_sae, threshold)}
    return zero_bias(key, config, shared) | thresholds


def _rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    """Keep pre-activations above their threshold as they are."""
    return Codes(jump(batch.pre, params["threshold"], config.bandwidth))


def _sparsity(inputs: Inputs) -> Array:
    """Number of codes, with a kernel estimate of its derivative by thresholds."""
    return weighted_mean(inputs, jnp.sum(_active(inputs), axis=1))


def _active(inputs: Inputs) -> Array:
    """1 where a code is above its threshold, ``[N, M]``."""
    # A step forward, a kernel of the bandwidth backward: the step has no derivative.
    threshold = inputs.params["threshold"]
    bandwidth = inputs.dictionary.config.bandwidth
    return heaviside(inputs.out.hidden_pre, threshold, bandwidth)


JUMP_RELU = Architecture(
    name="jumprelu",
    rule=_rule,
    tensors=_tensors,
    latent_axes={"b_enc": 0, "threshold": 0},
    sparsity=_sparsity,
    nonnegative=("threshold",),  # one below 0 would count codes that are 0
    saved_as=SavedAs("jumprelu", transcoder=True),
    defaults={"bandwidth": BANDWIDTH},
)
"""Codes above a learned threshold."""
