"""Checks of the inputs of a decoder, and the positions of its tokens."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from toyfeat.meshes import is_known
from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.types import Array


def check_inputs(
    config: DecoderConfig,
    inputs: Array,
    mask: Array | None,
    past: Mapping[str, Array],
    *,
    start: int | None,
    scan: bool,
) -> int:
    """Check the arguments of a decoder's call.

    Args:
      config: of the decoder.
      inputs: tokens or residual stream.
      mask: 1 at tokens, 0 at padding, or ``None``.
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
    num_past = 0
    if not isinstance(past, Mapping) or past:
        num_past = _check_past(config, shape[0], past, start, scan)
    positions = num_past + shape[1]
    if mask is not None:
        _check_mask(mask, (shape[0], positions), shape[1])
    if start is None:
        _check_ids(inputs, mask, config.vocab)
    # Learned positions are added to tokens only.
    learned = config.positions == "learned" and start is None
    if learned and positions > config.context:
        raise ValueError(
            f"Decoder: there are {config.context} learned positions, got {positions} "
            "tokens; cut the text into pieces"
        )
    return num_past


def _check_start(config: DecoderConfig, start: int | None, scan: bool) -> None:
    if start is not None and start not in range(config.layers + 1):
        raise ValueError(
            f"Decoder: start must be in 0 .. {config.layers}, the layers, got "
            f"{start!r}; give None to run the model from tokens on"
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
        raise ValueError(
            f"Decoder: wanted {expected}, got shape {shape} of {dtype}; "
            f"{'start is None' if start is None else f'start is {start}'}"
        )
    if not shape[1]:
        raise ValueError(
            f"Decoder: there is no position, the inputs are empty, got shape {shape}; "
            "give at least one"
        )


def _check_mask(mask: Array, shape: tuple[int, int], time: int) -> None:
    if isinstance(mask, Mapping):
        raise ValueError(
            "Decoder: the mask must be an array [B, T], got a mapping; give keys and "
            "values as past=, the third argument"
        )
    if jnp.shape(mask) != shape:
        past = shape[1] - time
        raise ValueError(
            f"Decoder: the mask must be of all positions, {past} of the past and "
            f"{time} of the inputs, shape {shape}, got {jnp.shape(mask)}; give 1 at "
            "tokens and 0 at padding"
        )
    if is_known(mask) and not np.isin(np.asarray(mask), (0, 1)).all():
        raise ValueError(
            "Decoder: the mask must be 1 at tokens and 0 at padding, got values "
            f"{np.unique(np.asarray(mask))[:4]}; a mask that is added to scores is "
            "mask == 0 here"
        )


def _check_ids(tokens: Array, mask: Array | None, vocab: int) -> None:
    """Raise for ids outside of the vocabulary, where they can be seen."""
    if not is_known(tokens) or (mask is not None and not is_known(mask)):
        return
    ids = np.asarray(tokens)
    is_outside = (ids < 0) | (ids >= vocab)
    if mask is not None:
        is_outside &= np.asarray(mask)[:, -ids.shape[1] :] != 0
    if is_outside.any():
        row, position = np.argwhere(is_outside)[0]
        raise ValueError(
            f"Decoder: tokens must be ids in 0 .. {vocab - 1}, got "
            f"{ids[row, position]} in row {row} at position {position}; mark padding "
            "with mask=, or give ids of the model's own tokenizer"
        )


def embedding_ids(tokens: Array, mask: Array | None, vocab: int) -> Array:
    """Prepare ids for the embedding, where none may be negative.

    An id above the vocabulary embeds as NaN, but a negative one would be counted from
    the end of the table.  Padding embeds as token 0, whatever its id, so that nothing
    of it can spoil the tokens.
    """
    ids = jnp.asarray(tokens)
    if jnp.iinfo(ids.dtype).bits < 32:  # too narrow for the size of the vocabulary
        ids = ids.astype(jnp.int32)
    ids = jnp.where(ids < 0, vocab, ids)
    return ids if mask is None else jnp.where(mask[:, -ids.shape[1] :], ids, 0)


def token_positions(mask: Array) -> Array:
    """Count positions ``[B, S]`` from the first token of a row; padding is skipped.

    These are transformers' ``position_ids``: ``cumsum(mask) - 1``, at least 0.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _check_past(
    config: DecoderConfig,
    batch: int,
    past: Mapping[str, Any],
    start: int | None,
    scan: bool,
) -> int:
    """Check the keys and values of the blocks that are run; return their positions."""
    if not isinstance(past, Mapping):
        raise ValueError(
            "Decoder: the past must map sites to keys and values, got "
            f"{type(past).__name__}; give {{}} for none"
        )
    if scan:
        raise ValueError("Decoder: a scanned model takes no past; use scan=False")
    blocks = range(start or 0, config.layers)
    sites = [f"blocks_{i}/attn/{name}" for i in blocks for name in ("key", "value")]
    missing = [site for site in sites if site not in past]
    if missing:
        raise ValueError(
            f"Decoder: the past wants keys and values of {len(blocks)} blocks, such as "
            f"{missing[0]!r}, got {sorted(past)}; tap these sites"
        )
    shapes = {jnp.shape(past[site]) for site in sites}
    width = config.kv_heads * config.head_dim
    # A decoder that runs the last norm only needs no past.
    shape = next(iter(shapes), (batch, 0, width))
    if len(shapes) > 1 or len(shape) != 3 or (shape[0], shape[2]) != (batch, width):
        raise ValueError(
            f"Decoder: the past must be of one shape [{batch}, P, {width}], got "
            f"{sorted(shapes)}; cut all of them alike"
        )
    return shape[1]
