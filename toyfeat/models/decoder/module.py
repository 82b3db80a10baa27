"""A decoder as a flax module, with named sites."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from toyfeat.models.decoder.attention import (
    Attention,
    KeyValues,
    LayerAngles,
    layer_angles,
    soft_cap,
)
from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.inputs import check_inputs, embedding_ids, token_positions
from toyfeat.models.decoder.parts import Norm, Site
from toyfeat.tap.linen import ACTS, PROBES
from toyfeat.types import Array

SITES = ("resid_pre", "attn_out", "mlp_hidden", "mlp_out", "resid_post")
"""Sites of a block: the residual stream before it, what attention adds to it, the
units of the MLP, what the MLP adds, and the residual stream after the block."""

HEAD_SITES = ("q", "k", "v", "pattern", "z")
"""Sites of the heads, ``"blocks_3/attn/q"``, in a decoder with ``heads``: queries, keys
and values ``[B, T, heads, head_dim]`` before they are normalized and rotated, the
weights of attention ``[B, heads, T, S]``, and the mixed values of every head."""

_ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Decoder(nn.Module):
    r"""A causal language model: tokens to logits of the next token.

    :func:`toyfeat.from_linen` makes a probed model of it.  The sites are
    ``"blocks_3/resid_pre"`` and so on (:data:`SITES`); with ``scan``,
    ``"blocks/resid_pre@3"``.  Everything else that the module calls is a site too,
    such as ``"blocks_3/resid_mid"``, ``"blocks_3/attn/query"`` and ``"final_norm"``;
    with ``heads`` also what each head does (:data:`HEAD_SITES`).

    With a ``start`` it runs on a residual stream instead of tokens, the value of
    ``"blocks_<start>/resid_pre"`` in the full model.  Parameters and sites keep their
    names, so that a gradient or a splice at a later layer does not pay for the earlier
    layers a second time.

    With a ``mask`` rows of several lengths are padded to one, on either side.
    Positions, learned and rotary, then count from the first token of a row on, 0 at
    it, as in transformers (``cumsum(mask) - 1``), and no token attends to padding, so
    that a row has the values that it has alone.  What comes out at padding is finite
    and means nothing; give the same mask to the readout
    (:func:`toyfeat.readouts.next_token_loss`).  A probed model takes
    ``(tokens, mask)`` as its inputs.

    Ids outside of the vocabulary are an error, except at padding.  Under ``jit`` ids
    cannot be seen; one outside makes its row NaN.

    With a ``past`` it runs on the positions after the first ``P``.  The past holds the
    values of ``"blocks_<i>/attn/key"`` and ``"blocks_<i>/attn/value"`` at those, for
    every block that is run, so that they are not computed again.

    Attributes:
      config: sizes and kinds of the parts.
      start: first block to run; ``None`` runs the model from tokens on, the number of
        layers only the last norm and the logits.
      scan: whether to trace one block for all layers, which compiles faster.
        Parameters are stacked (:func:`stack_blocks`), and probes are arrays, not
        functions.
      dtype: of the residual stream and the products; norms, rotations, softmax
        and logits are float32 in any case.
      remat: whether the backward pass recomputes the blocks to save memory.
      heads: whether queries, keys, values, weights and outputs of heads are sites.

    Example:
      >>> import jax, jax.numpy as jnp, toyfeat as ft
      >>> from toyfeat.models.decoder import Decoder, llama
      >>> model = Decoder(llama(vocab=11, layers=2, dim=8, heads=2, hidden=12))
      >>> tokens = jnp.arange(6).reshape(2, 3)
      >>> params = model.init(jax.random.key(0), tokens)
      >>> readout = ft.readouts.next_token_loss(tokens)
      >>> taps = ft.tap(
      ...     ft.from_linen(model), params, tokens,
      ...     sites="blocks_1/mlp_hidden", readout=readout,
      ... )
      >>> taps["blocks_1/mlp_hidden"].grads.shape
      (6, 1, 12)

    Raises:
      ValueError: when called, for a start that is not a layer, inputs of another
        shape or dtype, ids outside of the vocabulary, a mask of another shape or with
        other values than 0 and 1, more positions than there are learned ones (padding
        counts), a past that lacks blocks that are run, or a past for a scanned model.
    """

    config: DecoderConfig
    start: int | None = None
    scan: bool = False
    dtype: Any = jnp.float32
    remat: bool = False
    heads: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        mask: Array | None = None,
        past: Mapping[str, Array] | None = None,
    ) -> Array:
        """Compute the logits ``[B, T, V]`` in float32.

        Args:
          inputs: tokens ``[B, T]`` int, or with a start the residual stream
            ``[B, T, D]``.
          mask: ``[B, P + T]``, 1 at tokens and 0 at padding, of the positions of the
            past and the inputs; all are tokens by default.
          past: keys and values ``[B, P, kv_heads * head_dim]`` of the positions
            before, by site.
        """
        config, past = self.config, {} if past is None else past
        num_past = check_inputs(
            config, inputs, mask, past, start=self.start, scan=self.scan
        )
        # Positions count the tokens of a row; without padding they are 0, 1, 2, ...
        positions = None
        if mask is not None:
            mask = jnp.asarray(mask, bool)
            positions = token_positions(mask)
        embed = nn.Embed(config.vocab, config.dim, dtype=self.dtype, name="embed")
        # The residual stream before the first block.
        if self.start is None:
            ids = embedding_ids(inputs, mask, config.vocab)
            resid = self._embed(embed, ids, num_past, positions)
        else:
            resid = jnp.asarray(inputs, self.dtype)
        # Blocks, which share the rotations of the positions.
        angles = None
        if config.positions == "rotary":
            angles = layer_angles(config, num_past + inputs.shape[1], positions)
        resid = self._run_blocks(resid, past, angles, mask)
        # Norm and logits.
        normed = Norm(config, name="final_norm")(resid).astype(self.dtype)
        logits = _matmul_float32(normed, self._head(embed).astype(self.dtype))
        return (
            logits if config.logit_cap is None else soft_cap(logits, config.logit_cap)
        )

    def _embed(
        self, embed: nn.Embed, tokens: Array, num_past: int, positions: Array | None
    ) -> Array:
        """Embed tokens and, if they are learned, their positions."""
        config = self.config
        resid = jnp.asarray(embed(tokens), self.dtype)
        if config.embed_scale != 1:
            resid = resid * jnp.asarray(config.embed_scale, resid.dtype)
        if config.positions == "learned":
            table = nn.Embed(
                config.context, config.dim, dtype=self.dtype, name="positions"
            )
            # The past has taken the first positions.
            if positions is None:
                resid = resid + table(num_past + jnp.arange(tokens.shape[1]))[None]
            else:
                resid = resid + table(positions[:, -tokens.shape[1] :])
        return resid

    def _run_blocks(
        self,
        resid: Array,
        past: Mapping[str, Array],
        angles: LayerAngles | None,
        mask: Array | None,
    ) -> Array:
        """Run the blocks from the start on, in a loop or a scan."""
        # A loop has a module per block; a scan has one, with stacked parameters.
        config, start = self.config, self.start or 0
        block = nn.remat(Block) if self.remat else Block
        local = which_are_local(config)
        if not self.scan:
            for i in range(start, config.layers):
                name = f"blocks_{i}"
                earlier = _key_values(past, name) if past else None
                run = block(config, self.dtype, self.heads, local[i], name=name)
                resid, _ = run(resid, earlier, angles, mask)
        elif start < config.layers:
            # Every block has the same inputs, but not the same window.
            broadcast: Any = nn.broadcast
            is_mixed = len(set(local)) > 1
            in_axes: Any = (broadcast,) * 3 + (0 if is_mixed else broadcast,)
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, ACTS: 0, PROBES: 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                length=config.layers,
            )
            blocks = scanned(config, self.dtype, self.heads, local[0], name="blocks")
            is_local = jnp.asarray(local) if is_mixed else None
            resid, _ = blocks(resid, None, angles, mask, is_local)
        return resid

    def _head(self, embed: nn.Embed) -> Array:
        """Matrix ``[D, V]`` of the logits."""
        if self.config.tied:
            return embed.embedding.T
        shape = self.config.dim, self.config.vocab
        return self.param("head", nn.initializers.lecun_normal(), shape)


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream."""

    config: DecoderConfig
    dtype: Any
    heads: bool = False
    local: bool = False

    @nn.compact
    def __call__(
        self,
        resid: Array,
        past: KeyValues | None,
        angles: LayerAngles | None,
        mask: Array | None,
        is_local: Array | None = None,
    ) -> tuple[Array, None]:
        """Run the block on the residual stream; a scan wants the ``None``."""
        config = self.config
        local = self.local if is_local is None else is_local
        # Attention.
        resid = Site(name="resid_pre")(resid)
        normed = self._before("attn_norm", resid)
        attention = Attention(config, self.dtype, self.heads, name="attn")
        attn_out = attention(normed, past, angles, mask, local)
        attn_out = self._after("attn_post_norm", attn_out)
        attn_out = Site(name="attn_out")(attn_out)
        resid_mid = Site(name="resid_mid")(resid + attn_out)
        # MLP, of the stream before or after attention.
        source = resid if config.parallel else resid_mid
        normed = self._before("mlp_norm", source)
        dense = partial(nn.Dense, use_bias=config.mlp_bias, dtype=self.dtype)
        hidden = _ACTIVATIONS[config.activation](
            dense(config.hidden, name="gate" if config.gated else "up")(normed)
        )
        if config.gated:
            hidden = hidden * dense(config.hidden, name="up")(normed)
        hidden = Site(name="mlp_hidden")(hidden)
        mlp_out = dense(config.dim, name="down")(hidden)
        mlp_out = Site(name="mlp_out")(self._after("mlp_post_norm", mlp_out))
        return Site(name="resid_post")(resid_mid + mlp_out), None

    def _before(self, name: str, resid: Array) -> Array:
        """Normalize what a part of the block reads, where the model does."""
        if self.config.norms == "post":
            return resid.astype(self.dtype)
        return Norm(self.config, name=name)(resid).astype(self.dtype)

    def _after(self, name: str, out: Array) -> Array:
        """Normalize what a part of the block adds, where the model does."""
        if self.config.norms == "pre":
            return out
        return Norm(self.config, name=name)(out).astype(self.dtype)


def _matmul_float32(x: Array, matrix: Array) -> Array:
    """Multiply with a sum in float32, whatever the dtype of the factors."""
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def which_are_local(config: DecoderConfig) -> tuple[bool, ...]:
    """Say of every layer whether its queries see the positions in a window only."""
    if config.window is None or config.local_layers is None:
        return (config.window is not None,) * config.layers
    return config.local_layers[: config.layers]


def _key_values(past: Mapping[str, Array], block: str) -> KeyValues:
    return past[f"{block}/attn/key"], past[f"{block}/attn/value"]
