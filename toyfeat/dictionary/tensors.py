"""Tensors of a dictionary at the start, and the axes of their latents."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.dictionary.types import Architecture, Config
from toyfeat.types import Array, Params

SHARED_AXES: Mapping[str, int | None] = {"W_enc": 1, "W_dec": 0, "b_dec": None}
"""Axes of the latents of the tensors that every dictionary has."""


def latent_axes(architecture: Architecture) -> dict[str, int | None]:
    """Axis of the latents of every tensor, shared ones included."""
    return {**SHARED_AXES, **architecture.latent_axes}


def init_params(
    architecture: Architecture,
    config: Config,
    decoder_norm: float,
    start: dict[str, Any],
    key: Array,
) -> Params:
    """Make the tensors of a dictionary at the start.

    Args:
      architecture: the record, whose ``tensors`` are added to the shared ones.
      config: settings.
      decoder_norm: length of the rows of ``W_dec``, whose directions are random.
      start: keywords of ``architecture.tensors``.
      key: random key.

    Returns:
      A dict of tensors; the encoder is the transpose of the decoder.

    Raises:
      ValueError: if the record does not fit its tensors.
    """
    out = config.d_in if config.d_out is None else config.d_out
    # The decoder, and an encoder that reads what the decoder writes.
    rows = _random_rows(key, config.d_sae, out, decoder_norm)
    reads = rows
    if config.d_out is not None:  # another width needs an encoder of its own
        encoder_key = jax.random.fold_in(key, 1)
        reads = _random_rows(encoder_key, config.d_sae, config.d_in, decoder_norm)
    shared = {"W_enc": reads.T, "W_dec": rows, "b_dec": jnp.zeros(out)}
    # Tensors of this architecture, from a key of their own.
    own_key = jax.random.fold_in(key, 2)
    params = shared | architecture.tensors(own_key, config, shared, **start)
    _check_tensors(architecture, config, params)
    return params


def _check_tensors(architecture: Architecture, config: Config, params: Params) -> None:
    """Check what the record says about its tensors."""
    name, axes = architecture.name, latent_axes(architecture)
    if unlisted := set(params) - set(axes):
        raise ValueError(
            f"{name}: latent_axes must name every tensor, missing are "
            f"{sorted(unlisted)}"
        )
    # Training and revival index the latents of a tensor along its axis.
    for tensor, x in params.items():
        axis, shape = axes[tensor], jnp.shape(x)
        if axis is not None and shape[axis : axis + 1] != (config.d_sae,):
            raise ValueError(
                f"{name}: latent_axes says that axis {axis} of {tensor} is that of the "
                f"{config.d_sae} latents, got shape {shape}"
            )
    # Other fields can only name tensors that are there.
    averaged = architecture.averaged_threshold
    for field, tensors in (
        ("nonnegative", architecture.nonnegative),
        ("revived_from", architecture.revived_from),
        ("averaged_threshold", () if averaged is None else (averaged,)),
    ):
        if unknown := set(tensors) - set(params):
            raise ValueError(
                f"{name}: {field} names {sorted(unknown)}; the tensors are "
                f"{', '.join(sorted(params))}"
            )


def _random_rows(key: Array, num: int, dim: int, norm: float) -> Array:
    """Draw rows of one length in uniform directions."""
    rows = jax.random.normal(key, (num, dim))
    return norm * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
