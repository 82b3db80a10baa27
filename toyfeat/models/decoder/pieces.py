"""Tables of the tensors of released weights that make up a decoder's parameters."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.module import Decoder
from toyfeat.models.decoder.weights import (
    Piece,
    linear_pieces,
    plain_piece,
    transposed_piece,
)
from toyfeat.types import Params


def param_shapes(config: DecoderConfig) -> Params:
    """Shapes of the variables of a decoder."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)


def huggingface_pieces(kind: str, config: DecoderConfig) -> Iterator[Piece]:
    """Pieces of a checkpoint of ``transformers``.

    Args:
      kind: its ``model_type``.
      config: of the decoder.

    Returns:
      Pieces whose tensors are named as in the model without a head, without a prefix.
    """
    return _TABLES.get(kind, _llama_pieces)(config)


def gguf_pieces(config: DecoderConfig) -> Iterator[Piece]:
    """Pieces of a GGUF file of the Llama architecture."""
    dim, hidden = config.dim, config.hidden
    yield from plain_piece("embed/embedding", "token_embd.weight", (config.vocab, dim))
    yield from plain_piece("final_norm/scale", "output_norm.weight", (dim,))
    if not config.tied:
        yield from transposed_piece("head", "output.weight", (config.vocab, dim))
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"blk.{i}"
        # The norms have scales only.
        norms = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
        for name, other in norms.items():
            param, tensor = f"{ours}/{name}/scale", f"{theirs}.{other}.weight"
            yield from plain_piece(param, tensor, (dim,))
        # Rows of queries and keys are stored with the pairs of a rotation side by side.
        rows = {"query": ("attn_q", config.heads), "key": ("attn_k", config.kv_heads)}
        for name, (other, heads) in rows.items():
            shape = (heads * config.head_dim, dim)
            extract = partial(_split_pairs, config)
            param = f"{ours}/attn/{name}/kernel"
            yield Piece(param, f"{theirs}.{other}.weight", shape, extract)
        # The other matrices are stored transposed.
        wide = config.heads * config.head_dim
        for name, other, shape in (
            ("attn/value", "attn_v", (config.kv_heads * config.head_dim, dim)),
            ("attn/out", "attn_output", (dim, wide)),
            ("gate", "ffn_gate", (hidden, dim)),
            ("up", "ffn_up", (hidden, dim)),
            ("down", "ffn_down", (dim, hidden)),
        ):
            param = f"{ours}/{name}/kernel"
            yield from transposed_piece(param, f"{theirs}.{other}.weight", shape)


_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def _gpt2_pieces(config: DecoderConfig) -> Iterator[Piece]:
    dim, hidden = config.dim, config.hidden
    yield from plain_piece("embed/embedding", "wte.weight", (config.vocab, dim))
    yield from plain_piece("positions/embedding", "wpe.weight", (config.context, dim))
    yield from _norm_pieces("final_norm", "ln_f", config)
    if not config.tied:
        yield from transposed_piece("head", "lm_head.weight", (config.vocab, dim))
    # Queries, keys and values are the thirds of one matrix, stored as it is applied.
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"h.{i}"
        yield from _norm_pieces(f"{ours}/attn_norm", f"{theirs}.ln_1", config)
        yield from _norm_pieces(f"{ours}/mlp_norm", f"{theirs}.ln_2", config)
        for part, name in enumerate(("query", "key", "value")):
            for leaf, kind, shape in (
                ("kernel", "weight", (dim, 3 * dim)),
                ("bias", "bias", (3 * dim,)),
            ):
                extract = partial(_extract_third, part)
                param = f"{ours}/attn/{name}/{leaf}"
                yield Piece(param, f"{theirs}.attn.c_attn.{kind}", shape, extract)
        for name, other, shape in (
            ("attn/out", "attn.c_proj", (dim, dim)),
            ("up", "mlp.c_fc", (dim, hidden)),
            ("down", "mlp.c_proj", (hidden, dim)),
        ):  # matrices are stored as they are applied
            base = f"{ours}/{name}", f"{theirs}.{other}"
            yield from plain_piece(f"{base[0]}/kernel", f"{base[1]}.weight", shape)
            yield from plain_piece(f"{base[0]}/bias", f"{base[1]}.bias", shape[1:])


def _neox_pieces(config: DecoderConfig) -> Iterator[Piece]:
    dim, hidden = config.dim, config.hidden
    yield from plain_piece("embed/embedding", "embed_in.weight", (config.vocab, dim))
    yield from _norm_pieces("final_norm", "final_layer_norm", config)
    if not config.tied:
        yield from transposed_piece("head", "embed_out.weight", (config.vocab, dim))
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"layers.{i}"
        for name, other in _NORMS.items():
            yield from _norm_pieces(f"{ours}/{name}", f"{theirs}.{other}", config)
        # Queries, keys and values are one matrix, head by head.
        base = f"{theirs}.attention.query_key_value"
        for part, name in enumerate(("query", "key", "value")):
            extract = partial(_extract_from_heads, config, part)
            param = f"{ours}/attn/{name}"
            yield Piece(f"{param}/kernel", f"{base}.weight", (3 * dim, dim), extract)
            if config.qkv_bias:
                yield Piece(f"{param}/bias", f"{base}.bias", (3 * dim,), extract)
        for name, other, shape, bias in (
            ("attn/out", "attention.dense", (dim, dim), config.out_bias),
            ("up", "mlp.dense_h_to_4h", (hidden, dim), config.mlp_bias),
            ("down", "mlp.dense_4h_to_h", (dim, hidden), config.mlp_bias),
        ):
            yield from linear_pieces(f"{ours}/{name}", f"{theirs}.{other}", shape, bias)


def _llama_pieces(config: DecoderConfig) -> Iterator[Piece]:
    dim, hidden = config.dim, config.hidden
    yield from plain_piece(
        "embed/embedding", "embed_tokens.weight", (config.vocab, dim)
    )
    yield from _norm_pieces("final_norm", "norm", config)
    if not config.tied:
        yield from transposed_piece("head", "lm_head.weight", (config.vocab, dim))
    # Query heads may share keys and values, whose matrices are narrower then.
    wide = config.heads * config.head_dim
    narrow = config.kv_heads * config.head_dim
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"layers.{i}"
        for name, other, width in _llama_norms(config):
            param, tensor = f"{ours}/{name}/scale", f"{theirs}.{other}.weight"
            yield from plain_piece(param, tensor, (width,))
        for name, other, shape, bias in (
            ("attn/query", "self_attn.q_proj", (wide, dim), config.qkv_bias),
            ("attn/key", "self_attn.k_proj", (narrow, dim), config.qkv_bias),
            ("attn/value", "self_attn.v_proj", (narrow, dim), config.qkv_bias),
            ("attn/out", "self_attn.o_proj", (dim, wide), config.out_bias),
            ("gate", "mlp.gate_proj", (hidden, dim), config.mlp_bias),
            ("up", "mlp.up_proj", (hidden, dim), config.mlp_bias),
            ("down", "mlp.down_proj", (dim, hidden), config.mlp_bias),
        ):
            yield from linear_pieces(f"{ours}/{name}", f"{theirs}.{other}", shape, bias)


def _phi3_pieces(config: DecoderConfig) -> Iterator[Piece]:
    """Pieces of Phi-3, whose matrices that read the stream are stored as one."""
    parts = {
        "self_attn.qkv_proj": {
            "attn/query": config.heads * config.head_dim,
            "attn/key": config.kv_heads * config.head_dim,
            "attn/value": config.kv_heads * config.head_dim,
        },
        "mlp.gate_up_proj": {"gate": config.hidden, "up": config.hidden},
    }
    for i in range(config.layers):
        for tensor, widths in parts.items():
            start, total = 0, sum(widths.values())
            for param, width in widths.items():
                yield Piece(
                    f"blocks_{i}/{param}/kernel",
                    f"layers.{i}.{tensor}.weight",
                    (total, config.dim),
                    partial(_extract_rows, start, start + width),
                )
                start += width
    # All other tensors are those of Llama.
    stored_apart = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for piece in _llama_pieces(config):
        if piece.tensor.split(".")[-2] not in stored_apart:
            yield piece


# Other kinds have the names of Llama's tensors.
_TABLES = {"gpt2": _gpt2_pieces, "gpt_neox": _neox_pieces, "phi3": _phi3_pieces}


def _llama_norms(config: DecoderConfig) -> Iterator[tuple[str, str, int]]:
    """List the norms of a block after Llama: parameter, tensor, width."""
    reads, adds = config.norms != "post", config.norms != "pre"
    if reads:
        yield "attn_norm", "input_layernorm", config.dim
        mlp_norm = "pre_feedforward_layernorm" if adds else "post_attention_layernorm"
        yield "mlp_norm", mlp_norm, config.dim
    if adds:
        yield "attn_post_norm", "post_attention_layernorm", config.dim
        yield "mlp_post_norm", "post_feedforward_layernorm", config.dim
    if config.qk_norm != "none":
        each = config.qk_norm == "head"
        widths = config.heads, config.kv_heads
        query, key = (config.head_dim * (1 if each else heads) for heads in widths)
        yield "attn/q_norm", "self_attn.q_norm", query
        yield "attn/k_norm", "self_attn.k_norm", key


def _norm_pieces(param: str, tensor: str, config: DecoderConfig) -> Iterator[Piece]:
    yield from plain_piece(f"{param}/scale", f"{tensor}.weight", (config.dim,))
    if config.norm == "layer":
        yield from plain_piece(f"{param}/bias", f"{tensor}.bias", (config.dim,))


def _extract_third(part: int, tensor: np.ndarray) -> np.ndarray:
    """Extract queries, keys or values, which follow each other."""
    return np.split(tensor, 3, axis=-1)[part]


def _extract_rows(start: int, stop: int, tensor: np.ndarray) -> np.ndarray:
    """Extract the matrix in some rows of one that is stored as ``[out, in]``."""
    return tensor[start:stop].T


def _extract_from_heads(
    config: DecoderConfig, part: int, tensor: np.ndarray
) -> np.ndarray:
    """Extract queries, keys or values, which follow each other within every head."""
    heads = tensor.reshape(config.heads, 3, config.head_dim, *tensor.shape[1:])
    return heads[:, part].reshape(-1, *tensor.shape[1:]).T


def _split_pairs(config: DecoderConfig, tensor: np.ndarray) -> np.ndarray:
    """Order the rows of a head by halves; in a GGUF file pairs are side by side."""
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, tensor.shape[1])
    return pairs.swapaxes(1, 2).reshape(tensor.shape).T
