"""Checks of what a decoder is called with."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.types import Array


def check_inputs(
    config: DecoderConfig,
    inputs: Array,
    past: Mapping[str, Array],
    *,
    start: int | None,
    scan: bool,
) -> int:
    """Check the arguments of a decoder's call.

    Args:
      config: of the decoder.
      inputs: tokens or residual stream.
      past: keys and values by site, empty for none.
      start: of the decoder.
      scan: of the decoder.

    Returns:
      Number of positions of the past.

    Raises:
      ValueError: for arguments that do not fit the decoder.
    """
    _check_start(config, start, scan)
    _check_shape(config, inputs, start)
    shape = jnp.shape(inputs)
    num_past = _check_past(config, shape[0], past, start, scan) if past else 0
    # Learned positions are added to tokens only.
    positions = num_past + shape[1]
    learned = config.positions == "learned" and start is None
    if learned and positions > config.context:
        raise ValueError(
            f"Decoder: there are {config.context} learned positions, got {positions} "
            "tokens; cut the text into pieces"
        )
    return num_past


def _check_start(config: DecoderConfig, start: int | None, scan: bool) -> None:
    if start is not None and not 0 <= start <= config.layers:
        raise ValueError(
            f"Decoder: start must be in 0 .. {config.layers}, the layers, got {start}"
        )
    if scan and start not in (None, 0, config.layers):
        raise ValueError(
            f"Decoder: a scanned model runs all its layers, start {start} wants some; "
            "use scan=False and unstacked parameters"
        )


def _check_shape(config: DecoderConfig, inputs: Array, start: int | None) -> None:
    shape, dtype = jnp.shape(inputs), jnp.result_type(inputs)
    if start is None:
        fits = len(shape) == 2 and jnp.issubdtype(dtype, jnp.integer)
        expected = "tokens [B, T] of integers"
    else:
        fits = len(shape) == 3 and shape[2] == config.dim
        fits = fits and jnp.issubdtype(dtype, jnp.floating)
        expected = f"the residual stream [B, T, {config.dim}] before block {start}"
    if not fits:
        raise ValueError(f"Decoder: wanted {expected}, got shape {shape} of {dtype}")
    if not shape[1]:
        raise ValueError("Decoder: there is no position, the inputs are empty")


def _check_past(
    config: DecoderConfig,
    batch: int,
    past: Mapping[str, Any],
    start: int | None,
    scan: bool,
) -> int:
    """Check the keys and values of the blocks that are run; return their positions."""
    if scan:
        raise ValueError("Decoder: a scanned model takes no past; use scan=False")
    blocks = range(start or 0, config.layers)
    sites = [f"blocks_{i}/attn/{name}" for i in blocks for name in ("key", "value")]
    missing = [site for site in sites if site not in past]
    if missing:
        raise ValueError(
            f"Decoder: the past wants keys and values of {len(blocks)} blocks, such as "
            f"{missing[0]!r}, got {sorted(past)}"
        )
    shapes = {jnp.shape(past[site]) for site in sites}
    width = config.kv_heads * config.head_dim
    # A decoder that runs the last norm only needs no past.
    shape = next(iter(shapes), (batch, 0, width))
    if len(shapes) > 1 or len(shape) != 3 or (shape[0], shape[2]) != (batch, width):
        raise ValueError(
            f"Decoder: the past must be of one shape [{batch}, P, {width}], got "
            f"{sorted(shapes)}"
        )
    return shape[1]
