"""Where every parameter of a decoder is in the files of released weights."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.module import Decoder
from toyfeat.types import Params

Take = Callable[[np.ndarray], np.ndarray]


class Piece(NamedTuple):
    """A parameter as a part of a tensor in a file.

    Attributes:
      param: path of the parameter, ``"blocks_0/attn/query/kernel"``.
      tensor: name in the file.
      shape: of the tensor.
      take: the parameter out of the tensor.
    """

    param: str
    tensor: str
    shape: tuple[int, ...]
    take: Take


class Source(NamedTuple):
    """Tensors of files, read one at a time.

    Attributes:
      name: of the file or folder, for messages.
      shapes: name to shape.
      read: name to array.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def assembled(
    who: str,
    config: DecoderConfig,
    pieces: Iterable[Piece],
    source: Source,
    *,
    dtype: Any,
    ignored: str,
) -> Params:
    """Parameters of a decoder out of files, every tensor accounted for.

    Args:
      who: the function to name in errors.
      config: of the decoder.
      pieces: where its parameters are.
      source: the files.
      dtype: of the parameters.
      ignored: pattern of tensors that are no parameters.

    Returns:
      ``{"params": ...}`` for ``Decoder(config)``.

    Raises:
      ValueError: naming the tensors that are missing, left over or of another shape.
    """
    pieces = list(pieces)
    used = {piece.tensor for piece in pieces}
    missing = sorted(used - source.shapes.keys())
    left = [n for n in source.shapes if n not in used and not re.search(ignored, n)]
    wrong = sorted(
        f"{p.tensor} is {source.shapes[p.tensor]}, wanted {p.shape}"
        for p in {p.tensor: p for p in pieces}.values()
        if p.tensor in source.shapes and tuple(source.shapes[p.tensor]) != p.shape
    )
    for trouble, names in (
        ("misses the tensors", missing),
        ("has tensors of other shapes:", wrong),
        ("has tensors that this kind of model does not have:", left),
    ):
        if names:
            raise ValueError(
                f"{who}: {source.name} {trouble} {_some(names)}; do its configuration "
                "and its weights belong together?"
            )
    flat: dict[tuple[str, ...], jax.Array] = {}
    tensors: dict[str, np.ndarray] = {}  # the last one, which pieces share
    for piece in pieces:
        if piece.tensor not in tensors:
            tensors = {piece.tensor: source.read(piece.tensor)}
        taken = piece.take(tensors[piece.tensor])
        flat[tuple(piece.param.split("/"))] = jnp.asarray(taken).astype(dtype)
    _check_complete(who, config, flat)
    return {"params": unflatten_dict(flat)}


def huggingface_pieces(kind: str, config: DecoderConfig) -> Iterator[Piece]:
    """Pieces of the checkpoints of ``transformers``: ``gpt2``, ``gpt_neox``, ``llama``.

    Names have the prefix of the model inside the language model.
    """
    return _TABLES[kind](config)


def gguf_pieces(config: DecoderConfig) -> Iterator[Piece]:
    """Pieces of a GGUF file of the Llama architecture."""
    dim, hidden = config.dim, config.hidden
    yield from _plain("embed/embedding", "token_embd.weight", (config.vocab, dim))
    yield from _plain("final_norm/scale", "output_norm.weight", (dim,))
    if not config.tied:
        yield from _dense("head", "output.weight", (config.vocab, dim))
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"blk.{i}"
        norms = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
        for name, other in norms.items():
            yield from _plain(
                f"{ours}/{name}/scale", f"{theirs}.{other}.weight", (dim,)
            )
        rows = {"query": ("attn_q", config.heads), "key": ("attn_k", config.kv_heads)}
        for name, (other, heads) in rows.items():
            shape = (heads * config.head_dim, dim)
            take = partial(_unpaired, config)
            param = f"{ours}/attn/{name}/kernel"
            yield Piece(param, f"{theirs}.{other}.weight", shape, take)
        wide = config.heads * config.head_dim
        for name, other, shape in (
            ("attn/value", "attn_v", (config.kv_heads * config.head_dim, dim)),
            ("attn/out", "attn_output", (dim, wide)),
            ("gate", "ffn_gate", (hidden, dim)),
            ("up", "ffn_up", (hidden, dim)),
            ("down", "ffn_down", (dim, hidden)),
        ):
            param = f"{ours}/{name}/kernel"
            yield from _dense(param, f"{theirs}.{other}.weight", shape)


def _gpt2(config: DecoderConfig) -> Iterator[Piece]:
    dim, hidden = config.dim, config.hidden
    yield from _plain("embed/embedding", "wte.weight", (config.vocab, dim))
    yield from _plain("positions/embedding", "wpe.weight", (config.context, dim))
    yield from _norm("final_norm", "ln_f", config)
    if not config.tied:
        yield from _dense("head", "lm_head.weight", (config.vocab, dim))
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"h.{i}"
        yield from _norm(f"{ours}/attn_norm", f"{theirs}.ln_1", config)
        yield from _norm(f"{ours}/mlp_norm", f"{theirs}.ln_2", config)
        for part, name in enumerate(("query", "key", "value")):
            for leaf, kind, shape in (
                ("kernel", "weight", (dim, 3 * dim)),
                ("bias", "bias", (3 * dim,)),
            ):
                take = partial(_third, part)
                param = f"{ours}/attn/{name}/{leaf}"
                yield Piece(param, f"{theirs}.attn.c_attn.{kind}", shape, take)
        for name, other, shape in (
            ("attn/out", "attn.c_proj", (dim, dim)),
            ("up", "mlp.c_fc", (dim, hidden)),
            ("down", "mlp.c_proj", (hidden, dim)),
        ):  # matrices are stored as they are applied
            base = f"{ours}/{name}", f"{theirs}.{other}"
            yield from _plain(f"{base[0]}/kernel", f"{base[1]}.weight", shape)
            yield from _plain(f"{base[0]}/bias", f"{base[1]}.bias", shape[1:])


def _neox(config: DecoderConfig) -> Iterator[Piece]:
    dim, hidden = config.dim, config.hidden
    yield from _plain("embed/embedding", "embed_in.weight", (config.vocab, dim))
    yield from _norm("final_norm", "final_layer_norm", config)
    if not config.tied:
        yield from _dense("head", "embed_out.weight", (config.vocab, dim))
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"layers.{i}"
        yield from _norm(f"{ours}/attn_norm", f"{theirs}.input_layernorm", config)
        yield from _norm(
            f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm", config
        )
        base = f"{theirs}.attention.query_key_value"
        for part, name in enumerate(("query", "key", "value")):
            take = partial(_of_heads, config, part)
            param = f"{ours}/attn/{name}"
            yield Piece(f"{param}/kernel", f"{base}.weight", (3 * dim, dim), take)
            if config.qkv_bias:
                yield Piece(f"{param}/bias", f"{base}.bias", (3 * dim,), take)
        for name, other, shape, bias in (
            ("attn/out", "attention.dense", (dim, dim), config.out_bias),
            ("up", "mlp.dense_h_to_4h", (hidden, dim), config.mlp_bias),
            ("down", "mlp.dense_4h_to_h", (dim, hidden), config.mlp_bias),
        ):
            yield from _linear(f"{ours}/{name}", f"{theirs}.{other}", shape, bias)


def _llama(config: DecoderConfig) -> Iterator[Piece]:
    dim, hidden = config.dim, config.hidden
    yield from _plain("embed/embedding", "embed_tokens.weight", (config.vocab, dim))
    yield from _norm("final_norm", "norm", config)
    if not config.tied:
        yield from _dense("head", "lm_head.weight", (config.vocab, dim))
    wide = config.heads * config.head_dim
    narrow = config.kv_heads * config.head_dim
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"layers.{i}"
        yield from _norm(f"{ours}/attn_norm", f"{theirs}.input_layernorm", config)
        yield from _norm(
            f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm", config
        )
        for name, other, shape, bias in (
            ("attn/query", "self_attn.q_proj", (wide, dim), config.qkv_bias),
            ("attn/key", "self_attn.k_proj", (narrow, dim), config.qkv_bias),
            ("attn/value", "self_attn.v_proj", (narrow, dim), config.qkv_bias),
            ("attn/out", "self_attn.o_proj", (dim, wide), config.out_bias),
            ("gate", "mlp.gate_proj", (hidden, dim), config.mlp_bias),
            ("up", "mlp.up_proj", (hidden, dim), config.mlp_bias),
            ("down", "mlp.down_proj", (dim, hidden), config.mlp_bias),
        ):
            yield from _linear(f"{ours}/{name}", f"{theirs}.{other}", shape, bias)


_TABLES = {"gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama}


def _plain(param: str, tensor: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    yield Piece(param, tensor, shape, np.asarray)


def _dense(param: str, tensor: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """A matrix that is stored as ``[out, in]``."""
    yield Piece(param, tensor, shape, np.transpose)


def _linear(
    param: str, tensor: str, shape: tuple[int, ...], bias: bool
) -> Iterator[Piece]:
    yield from _dense(f"{param}/kernel", f"{tensor}.weight", shape)
    if bias:
        yield from _plain(f"{param}/bias", f"{tensor}.bias", shape[:1])


def _norm(param: str, tensor: str, config: DecoderConfig) -> Iterator[Piece]:
    yield from _plain(f"{param}/scale", f"{tensor}.weight", (config.dim,))
    if config.norm == "layer":
        yield from _plain(f"{param}/bias", f"{tensor}.bias", (config.dim,))


def _third(part: int, tensor: np.ndarray) -> np.ndarray:
    """Queries, keys or values, which follow each other."""
    return np.split(tensor, 3, axis=-1)[part]


def _of_heads(config: DecoderConfig, part: int, tensor: np.ndarray) -> np.ndarray:
    """Queries, keys or values, which follow each other within every head."""
    heads = tensor.reshape(config.heads, 3, config.head_dim, *tensor.shape[1:])
    return heads[:, part].reshape(-1, *tensor.shape[1:]).T


def _unpaired(config: DecoderConfig, tensor: np.ndarray) -> np.ndarray:
    """Rows of a head for rotations of halves; a GGUF file has pairs side by side."""
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, tensor.shape[1])
    return pairs.swapaxes(1, 2).reshape(tensor.shape).T


def _check_complete(
    who: str, config: DecoderConfig, flat: Mapping[tuple[str, ...], Any]
) -> None:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(wanted)
    }
    found = {"/".join(path): x.shape for path, x in flat.items()}
    assert shapes == found, f"{who}: {set(shapes.items()) ^ set(found.items())}"


def _some(names: list[str]) -> str:
    text = ", ".join(names[:4])
    return text if len(names) <= 4 else f"{text} and {len(names) - 4} more"
