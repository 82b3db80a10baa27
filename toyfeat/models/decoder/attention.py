"""Causal attention of grouped heads, with rotary positions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.parts import Norm, Site
from toyfeat.types import Array

KeyValues = tuple[Array, Array]
"""Keys and values ``[B, P, kv_heads * head_dim]`` of earlier positions, not rotated."""

Angles = tuple[Array, Array]
"""Cosines and sines of rotations, ``[1, S, rotary_dim / 2]`` for ``S`` positions, or
``[B, S, rotary_dim / 2]`` if rows have positions of their own."""

LayerAngles = tuple[Angles, Angles | None]
"""Rotations of all layers, and those of local layers if they have others."""


class Attention(nn.Module):
    """Causal attention of grouped heads."""

    config: DecoderConfig
    dtype: Any
    heads: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        past: KeyValues | None,
        angles: LayerAngles | None,
        mask: Array | None,
        local: bool | Array = False,
    ) -> Array:
        """Compute what the heads add to the residual stream, ``[B, T, D]``."""
        config = self.config
        batch, time, _ = inputs.shape
        # Queries of the inputs, keys and values of all positions so far.
        past_keys, past_values = past or (None, None)
        query = self._project("query", inputs, config.heads)
        key = self._project("key", inputs, config.kv_heads, past_keys)
        value = self._project("value", inputs, config.kv_heads, past_values)
        query, key = self._normalize("q_norm", query), self._normalize("k_norm", key)
        # Rotations; the queries are at the last positions.
        if angles is not None:
            cos, sin = _choose_angles(angles, local)
            query = apply_rotary(query, (cos[:, -time:], sin[:, -time:]))
            key = apply_rotary(key, (cos, sin))
        # Attention and the projection back to the stream.
        mixed = causal_attention(
            query,
            key,
            value,
            mask,
            scale=config.query_scale,
            cap=config.score_cap,
            window=config.window,
            local=local,
            pattern=Site(name="pattern") if self.heads else None,
        )
        mixed = Site(name="z")(mixed) if self.heads else mixed
        return nn.Dense(
            config.dim, use_bias=config.out_bias, dtype=self.dtype, name="out"
        )(mixed.reshape(batch, time, -1))

    def _project(
        self, name: str, inputs: Array, heads: int, earlier: Array | None = None
    ) -> Array:
        """Project to heads ``[B, P + T, heads, head_dim]``, earlier ones first."""
        config, (batch, time, _) = self.config, inputs.shape
        width = heads * config.head_dim
        dense = nn.Dense(width, use_bias=config.qkv_bias, dtype=self.dtype, name=name)
        rows = dense(inputs)
        if self.heads:
            split = Site(name=name[0])(rows.reshape(batch, time, heads, -1))
            rows = split.reshape(rows.shape)
        if earlier is not None:
            rows = jnp.concatenate([earlier.astype(rows.dtype), rows], axis=1)
        return rows.reshape(batch, -1, heads, config.head_dim)

    def _normalize(self, name: str, heads: Array) -> Array:
        """Normalize queries or keys, one by one or all heads of a position together."""
        if self.config.qk_norm == "none":
            return heads
        batch, width = heads.shape[0], heads.shape[-1]
        if self.config.qk_norm == "all":
            width *= heads.shape[-2]
        rows = Norm(self.config, name=name)(heads.reshape(batch, -1, width))
        return rows.reshape(heads.shape).astype(heads.dtype)


def _choose_angles(angles: LayerAngles, local: bool | Array) -> Angles:
    """Choose the rotations of a layer, which only a scan does not know beforehand."""
    everywhere, nearby = angles
    if nearby is None:
        return everywhere
    if isinstance(local, bool):
        return nearby if local else everywhere
    cos, sin = (jnp.where(local, a, b) for a, b in zip(nearby, everywhere, strict=True))
    return cos, sin


def soft_cap(values: Array, cap: float) -> Array:
    """Bound values softly: ``cap tanh(values / cap)``."""
    return jnp.tanh(values / cap) * cap


def causal_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    local: bool | Array = False,
    pattern: Callable[[Array], Array] | None = None,
) -> Array:
    """Mix values by causal attention, ``[B, T, H, head_dim]``.

    Softmax of ``query key / sqrt(head_dim)`` over the positions up to the query's own.
    It is written out because the gradient of ``jax.nn.dot_product_attention`` in
    bfloat16 raises where promotion of dtypes is forbidden.

    Two orders of the same operations are used.  In float32 the faster one is: queries
    are scaled instead of scores and mixed values divided instead of weights, which are
    both smaller arrays.  In bfloat16 every product is rounded, so that the exact one
    is: scores are still float32 when they are scaled, and weights are normalized
    before they are rounded.  Divided after the product, the two parts of the
    softmax's gradient would be rounded separately and not cancel
    (docs/decisions/language.md, "Softmax in bfloat16 divides before the product").

    Args:
      query: ``[B, T, H, head_dim]``, at the last ``T`` of the ``S`` positions.
      key: ``[B, S, kv_heads, head_dim]``; each serves ``H / kv_heads`` query heads.
      value: ``[B, S, kv_heads, head_dim]``.
      mask: ``[B, S]`` bool, ``False`` at keys that no other position attends to.
      scale: of the scores, instead of ``1 / sqrt(head_dim)``.
      cap: soft cap of the scores.
      window: number of positions that a query attends to where ``local`` is true.
      local: whether this layer is local.
      pattern: site of the weights ``[B, H, T, S]``, which are normalized for it.

    Returns:
      The mixed values, in the dtype of ``value``.
    """
    time, positions = query.shape[1], key.shape[1]
    scores = _scores(query, key, scale)
    if cap is not None:
        scores = soft_cap(scores, cap)
    allowed = _allowed(time, positions, mask, window, local)
    scores = jnp.where(allowed, scores, -jnp.inf)
    mixed = _mix(scores, value, pattern, low_precision=_is_low_precision(query))
    return jnp.moveaxis(mixed, 3, 1).reshape(query.shape)


def _is_low_precision(array: Array) -> bool:
    """Return whether products of this dtype are rounded to less than float32."""
    return jnp.finfo(array.dtype).bits < 32


def _scores(query: Array, key: Array, scale: float | None) -> Array:
    """Score every query with every key, ``[B, kv_heads, groups, T, S]`` in float32."""
    batch, time, _, width = query.shape
    factor: float = width**-0.5 if scale is None else scale
    low_precision = _is_low_precision(query)
    groups = query.reshape(batch, time, key.shape[2], -1, width)
    if not low_precision:
        groups = groups * jnp.asarray(factor, groups.dtype)
    scores = jnp.einsum(
        "bqkgd,bskd->bkgqs", groups, key, preferred_element_type=jnp.float32
    )
    return scores * factor if low_precision else scores


def _allowed(
    time: int,
    positions: int,
    mask: Array | None,
    window: int | None,
    local: bool | Array,
) -> Array:
    """Tell which positions a query attends to, broadcastable to the scores.

    None attends to later positions or to padding.  Padding attends to itself: the
    softmax over no position at all would be NaN, and spoil the gradients.
    """
    allowed = jnp.tri(time, positions, positions - time, dtype=bool)[None, None, None]
    if window is not None and local is not False:
        far = jnp.tri(time, positions, positions - time - window, dtype=bool)
        allowed &= ~(far & jnp.asarray(local))[None, None, None]
    if mask is not None:
        itself = jnp.eye(time, positions, positions - time, dtype=bool)
        allowed &= mask[:, None, None, None, :] | itself[None, None, None]
    return allowed


def _mix(
    scores: Array,
    value: Array,
    pattern: Callable[[Array], Array] | None,
    *,
    low_precision: bool,
) -> Array:
    """Average values under the softmax of scores, ``[B, kv_heads, groups, T, W]``."""
    if low_precision or pattern is not None:
        weights = jax.nn.softmax(scores).astype(value.dtype)
        if pattern is not None:
            heads = weights.reshape(scores.shape[0], -1, *scores.shape[-2:])
            weights = pattern(heads).reshape(weights.shape)
        return jnp.einsum("bkgqs,bskd->bkgqd", weights, value)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkgqs,bskd->bkgqd", weights.astype(value.dtype), value)
    return mixed / total.astype(value.dtype)


def layer_angles(
    config: DecoderConfig, num: int, positions: Array | None = None
) -> LayerAngles:
    """Compute the rotations of all layers, and those of local layers."""
    angles = rotary_angles(config, num, positions)
    if config.local_base is None:
        return angles, None
    plain = replace(
        config,
        rotary_base=config.local_base,
        rotary_divisors=None,
        rotary_scale=1.0,
        rotary_growth=None,
    )
    return angles, rotary_angles(plain, num, positions)


def rotary_angles(
    config: DecoderConfig, num: int, positions: Array | None = None
) -> Angles:
    """Compute cosines and sines of rotations.

    Position ``t`` turns pair ``i`` by ``t * base^(-2 i / rotary_dim) / divisor_i``.
    They are constants of the program: traced, they would be computed again in every
    block.

    Args:
      config: of the decoder.
      num: number ``S`` of positions.
      positions: ``[B, S]`` int, ``0 .. S - 1`` by default.

    Returns:
      :data:`Angles`.

    References:
      bloc97 (2023), "Dynamically scaled RoPE", for a base that grows with the number of
      positions beyond the context.
    """
    width, base = config.rotary_dim, config.rotary_base
    if config.rotary_growth is not None and num > config.context:
        growth = config.rotary_growth * num / config.context - config.rotary_growth + 1
        base *= growth ** (width / (width - 2))
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    # The reciprocal of a rounded power, as transformers has it: the last bit of a rate
    # is 6e-5 of an angle at position 1000.
    powers = np.float64(base) ** exponents.astype(np.float64)
    rates = np.float32(1) / powers.astype(np.float32)
    if config.rotary_divisors is not None:
        rates = rates / np.asarray(config.rotary_divisors, np.float32)
    angles = np.outer(np.arange(num, dtype=np.float32), rates)
    scale = np.float32(config.rotary_scale)
    cos, sin = jnp.asarray(np.cos(angles) * scale), jnp.asarray(np.sin(angles) * scale)
    if positions is None:
        return cos[None], sin[None]
    return cos[positions], sin[positions]


def apply_rotary(heads: Array, angles: Angles) -> Array:
    """Rotate queries or keys ``[B, S, H, head_dim]`` by the angles of their positions.

    Entry ``i`` is paired with entry ``i + rotary_dim / 2``; entries from
    ``rotary_dim`` on stay as they are.
    """
    cos, sin = (x[:, :, None, :] for x in angles)
    half = cos.shape[-1]
    first, second, unrotated = jnp.split(
        heads.astype(jnp.float32), [half, 2 * half], axis=-1
    )
    rotated = [first * cos - second * sin, second * cos + first * sin, unrotated]
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
