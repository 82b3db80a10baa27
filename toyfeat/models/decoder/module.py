"""A decoder as a flax module, with named sites."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.tap.linen import ACTS, PROBES
from toyfeat.types import Array

SITES = ("resid_pre", "attn_out", "mlp_hidden", "mlp_out", "resid_post")
"""Sites of a block: the residual stream before it, what attention adds to it, the
units of the MLP, what the MLP adds, and the residual stream after the block."""

_ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


Past = tuple[Array, Array]
"""Keys and values of the positions before, as the matrices gave them."""

Turns = tuple[Array, Array]
"""Cosines and sines ``[S, rotary_dim / 2]`` of what every position is turned by."""


class Decoder(nn.Module):
    r"""A causal language model: tokens to logits of the next token.

    :func:`toyfeat.from_linen` makes a probed model of it.  The sites are
    ``"blocks_3/resid_pre"`` and so on (:data:`SITES`); with ``scan``,
    ``"blocks/resid_pre@3"``.  Everything else that the module calls is a site too,
    such as ``"blocks_3/attn/query"`` and ``"final_norm"``.

    With a ``start`` it runs on a residual stream instead of tokens: what
    ``"blocks_<start>/resid_pre"`` is for the whole model.  With the same parameters
    the sites have the same names, so that a gradient or a splice at a later layer
    does not pay for the layers before it a second time.

    With a ``past`` it runs on the positions behind those that it has seen: the values
    of ``"blocks_<i>/attn/key"`` and ``"blocks_<i>/attn/value"`` at the first ``P``
    positions, for every block that is run.  What does not change at the positions
    before is not computed again.

    Attributes:
      config: sizes and kinds.
      start: first block that is run, ``None`` for all of the model; the number of
        layers runs the last norm and the logits only.
      scan: one traced block for all layers: compiles once instead of once a layer;
        parameters are stacked (:func:`stacked`), and sites take arrays as probes, no
        functions.
      dtype: of the residual stream and the products; norms, rotations, softmax
        and logits are float32 in any case.
      remat: whether a backward pass computes blocks again instead of keeping what
        they computed.

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
      ValueError: when called, for a start that is no layer, inputs of another shape
        or kind, more positions than there are learned ones, or a past that is not of
        the blocks that are run, or of a scanned model.
    """

    config: DecoderConfig
    start: int | None = None
    scan: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, inputs: Array, past: Mapping[str, Array] | None = None) -> Array:
        """Logits ``[B, T, V]`` in float32.

        Args:
          inputs: tokens ``[B, T]`` int, or with a start the residual stream
            ``[B, T, D]``.
          past: keys and values ``[B, P, kv_heads * head_dim]`` of the positions
            before, by site.
        """
        config = self.config
        before = _check_inputs(self, inputs, past or {})
        embed = nn.Embed(config.vocab, config.dim, dtype=self.dtype, name="embed")
        from_tokens, start = self.start is None, self.start or 0
        resid = embed(inputs) if from_tokens else inputs
        resid = jnp.asarray(resid, self.dtype)
        if config.positions == "learned" and from_tokens:
            where = nn.Embed(
                config.context, config.dim, dtype=self.dtype, name="positions"
            )
            seen = before + jnp.arange(inputs.shape[1])
            resid = resid + where(seen)[None]
        turns = None
        if config.positions == "rotary":
            turns = turns_of(config, before + inputs.shape[1])
        block = nn.remat(Block) if self.remat else Block
        if self.scan and start < config.layers:
            same: Any = nn.broadcast  # for every block
            layers = nn.scan(
                block,
                variable_axes={"params": 0, ACTS: 0, PROBES: 0},
                split_rngs={"params": True},
                in_axes=same,
                length=config.layers,
            )
            blocks = layers(config, self.dtype, name="blocks")
            resid, _ = blocks(resid, None, turns)
        elif not self.scan:
            for i in range(start, config.layers):
                name = f"blocks_{i}"
                mine = _past_of(name, past) if past else None
                resid, _ = block(config, self.dtype, name=name)(resid, mine, turns)
        last = Norm(config, name="final_norm")(resid)
        if config.tied:
            table = embed.embedding.astype(self.dtype)
            return _product(last.astype(self.dtype), table.T)
        kernel = self.param(
            "head", nn.initializers.lecun_normal(), (config.dim, config.vocab)
        )
        return _product(last.astype(self.dtype), kernel.astype(self.dtype))


class Site(nn.Module):
    """A place with a name: what goes in comes out."""

    def __call__(self, value: Array) -> Array:
        """The value."""
        return value


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, resid: Array, past: Past | None, turns: Turns | None
    ) -> tuple[Array, None]:
        """The residual stream after the block."""
        config = self.config
        resid = Site(name="resid_pre")(resid)
        read = Norm(config, name="attn_norm")(resid).astype(self.dtype)
        added = Attention(config, self.dtype, name="attn")(read, past, turns)
        added = Site(name="attn_out")(added)
        between = resid + added
        source = resid if config.parallel else between
        read = Norm(config, name="mlp_norm")(source).astype(self.dtype)
        dense = partial(nn.Dense, use_bias=config.mlp_bias, dtype=self.dtype)
        hidden = _ACTIVATIONS[config.activation](
            dense(config.hidden, name="gate" if config.gated else "up")(read)
        )
        if config.gated:
            hidden = hidden * dense(config.hidden, name="up")(read)
        hidden = Site(name="mlp_hidden")(hidden)
        out = Site(name="mlp_out")(dense(config.dim, name="down")(hidden))
        return Site(name="resid_post")(between + out), None


class Attention(nn.Module):
    """Causal attention of grouped heads."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, read: Array, past: Past | None, turns: Turns | None) -> Array:
        """Compute what the heads add to the residual stream."""
        config = self.config
        batch, time, _ = read.shape

        def heads(name: str, num: int, before: Array | None = None) -> Array:
            dense = nn.Dense(
                num * config.head_dim,
                use_bias=config.qkv_bias,
                dtype=self.dtype,
                name=name,
            )
            rows = dense(read)
            if before is not None:
                rows = jnp.concatenate([before.astype(rows.dtype), rows], axis=1)
            return rows.reshape(batch, -1, num, config.head_dim)

        keys, values = past or (None, None)
        query = heads("query", config.heads)
        key = heads("key", config.kv_heads, keys)
        value = heads("value", config.kv_heads, values)
        if turns is not None:
            query = rotated(query, (turns[0][-time:], turns[1][-time:]))
            key = rotated(key, turns)
        mixed = attended(query, key, value)
        return nn.Dense(
            config.dim, use_bias=config.out_bias, dtype=self.dtype, name="out"
        )(mixed.reshape(batch, time, -1))


def attended(query: Array, key: Array, value: Array) -> Array:
    """Values mixed by causal attention, ``[B, T, H, head_dim]``.

    A head of keys and values serves a group of query heads; queries are of the last
    positions that there are keys of.  The gradient of
    ``jax.nn.dot_product_attention`` in bfloat16 raises where promotion of types is
    forbidden, so it is written out.
    """
    batch, time, _, width = query.shape
    groups = query.reshape(batch, time, key.shape[2], -1, width)
    rounded = jnp.finfo(query.dtype).bits < 32
    if not rounded:  # there are fewer queries than scores
        groups = groups * jnp.asarray(width**-0.5, groups.dtype)
    scores = jnp.einsum(
        "bqkgd,bskd->bkgqs", groups, key, preferred_element_type=jnp.float32
    )
    if rounded:
        scores = scores * width**-0.5
    known = key.shape[1]
    seen = jnp.tri(time, known, known - time, dtype=bool)[None, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    if rounded:
        weights = jax.nn.softmax(scores).astype(value.dtype)
        mixed = jnp.einsum("bkgqs,bskd->bkgqd", weights, value)
    else:
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bkgqs,bskd->bkgqd", weights.astype(value.dtype), value)
        mixed = mixed / total.astype(value.dtype)
    return jnp.moveaxis(mixed, 3, 1).reshape(query.shape)


def turns_of(config: DecoderConfig, num: int) -> Turns:
    """Cosines and sines of the rotations of the first ``num`` positions.

    Constants of the program: traced, they would be computed again in every block.
    """
    width = config.rotary_dim
    powers = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    rates = np.float32(config.rotary_base) ** -powers
    if config.rotary_divisors is not None:
        rates = rates / np.asarray(config.rotary_divisors, np.float32)
    angles = np.outer(np.arange(num, dtype=np.float32), rates)
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def rotated(heads: Array, turns: Turns) -> Array:
    """Queries or keys ``[B, T, H, head_dim]``, turned by the angles of ``T`` positions.

    Entry ``i`` is paired with entry ``i + rotary_dim / 2``; entries from
    ``rotary_dim`` on stay.
    """
    cos, sin = (x[None, :, None, :] for x in turns)
    half = cos.shape[-1]
    whole = heads.astype(jnp.float32)
    a, b, rest = jnp.split(whole, [half, 2 * half], axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return turned.astype(heads.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm in float32, whatever the type of the stream.

    Products of rows are written as such: the sums of rows in the gradients of flax's
    modules are slow on a CPU (``docs/decisions/language.md``).
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The stream ``[B, T, D]``, every position by itself."""
        config = self.config
        shape, centred = (x.shape[-1],), config.norm == "layer"
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        x = x.astype(jnp.float32)
        if centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        length = jax.lax.rsqrt(exact("btd,btd->bt", x, x) / x.shape[-1] + config.eps)
        x = exact("btd,bt->btd", x, length) * scale[None, None].astype(jnp.float32)
        if centred:
            bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
            x = x + bias[None, None].astype(jnp.float32)
        return x


def _product(x: Array, matrix: Array) -> Array:
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def _past_of(block: str, past: Mapping[str, Array]) -> Past:
    return past[f"{block}/attn/key"], past[f"{block}/attn/value"]


def _check_inputs(model: Decoder, inputs: Array, past: Mapping[str, Array]) -> int:
    """Check the inputs, and count the positions of the past."""
    config, start = model.config, model.start
    shape, dtype = jnp.shape(inputs), jnp.result_type(inputs)
    if start is not None and not 0 <= start <= config.layers:
        raise ValueError(
            f"Decoder: start must be in 0 .. {config.layers}, the layers, got {start}"
        )
    if model.scan and start not in (None, 0, config.layers):
        raise ValueError(
            f"Decoder: a scanned model runs all its layers, start {start} wants some; "
            "use scan=False and unstacked parameters"
        )
    if start is None:
        good = len(shape) == 2 and jnp.issubdtype(dtype, jnp.integer)
        wanted = "tokens [B, T] of integers"
    else:
        good = len(shape) == 3 and shape[2] == config.dim
        good = good and jnp.issubdtype(dtype, jnp.floating)
        wanted = f"the residual stream [B, T, {config.dim}] before block {start}"
    if not good:
        raise ValueError(f"Decoder: wanted {wanted}, got shape {shape} of {dtype}")
    if not shape[1]:
        raise ValueError("Decoder: there is no position, the inputs are empty")
    before = _check_past(model, shape[0], past) if past else 0
    learned = config.positions == "learned" and start is None
    if learned and before + shape[1] > config.context:
        raise ValueError(
            f"Decoder: there are {config.context} learned positions, got "
            f"{before + shape[1]} tokens; cut the text into pieces"
        )
    return before


def _check_past(model: Decoder, batch: int, past: Mapping[str, Array]) -> int:
    config = model.config
    if model.scan:
        raise ValueError("Decoder: a scanned model takes no past; use scan=False")
    blocks = range(model.start or 0, config.layers)
    wanted = [f"blocks_{i}/attn/{name}" for i in blocks for name in ("key", "value")]
    missing = [site for site in wanted if site not in past]
    if missing:
        raise ValueError(
            f"Decoder: the past wants keys and values of {len(blocks)} blocks, such as "
            f"{missing[0]!r}, got {sorted(past)}"
        )
    shapes = {jnp.shape(past[site]) for site in wanted}
    width = config.kv_heads * config.head_dim
    shape = next(iter(shapes), (batch, 0, width))
    if len(shapes) > 1 or len(shape) != 3 or (shape[0], shape[2]) != (batch, width):
        raise ValueError(
            f"Decoder: the past must be of one shape [{batch}, P, {width}], got "
            f"{sorted(shapes)}"
        )
    return shape[1]
