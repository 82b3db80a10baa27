"""A BERT text encoder as a flax module with named sites, and released weights.

References:
  Devlin et al. (2019), "BERT", arXiv 1810.04805; Reimers and Gurevych (2019),
  "Sentence-BERT", arXiv 1908.10084, for the mean over tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.models.decoder.module import Site
from toyfeat.models.decoder.tokens import check_tokenizer, load_tokenizer
from toyfeat.models.decoder.weights import (
    Piece,
    assemble_params,
    linear_pieces,
    open_safetensors,
    plain_piece,
    read_entries,
)
from toyfeat.types import Array, Params

_IGNORED = r"position_ids$|^pooler\.|^cls\."  # tensors that embeddings do not need


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an :class:`Encoder`.

    Attributes:
      vocab: tokens.
      layers: blocks.
      dim: width ``D``.
      heads: of attention.
      hidden: width of the MLP.
      context: positions.
      eps: of LayerNorm.
    """

    vocab: int
    layers: int
    dim: int
    heads: int
    hidden: int
    context: int
    eps: float = 1e-12


class Sentences(NamedTuple):
    """Texts as tokens.

    Attributes:
      tokens: ``[B, T]`` int.
      mask: ``[B, T]``, 0 at padding.
    """

    tokens: Array
    mask: Array


class Encoder(nn.Module):
    """Sentences to unit vectors ``[B, D]``: BERT, the mean over tokens, its length 1.

    Sites are ``"blocks_3/attn_out"``, ``"blocks_3/mlp_hidden"``,
    ``"blocks_3/mlp_out"``, ``"blocks_3/resid_post"``, and ``"pooled"``, the mean before
    it is scaled.  :func:`toyfeat.from_linen` makes a probed model of it;
    :class:`Sentences` are its inputs, ``probed(params, (sentences,), {})``.

    Attributes:
      config: sizes.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, sentences: Sentences) -> Array:
        """Embed sentences as unit vectors ``[B, dim]``."""
        config, (tokens, mask) = self.config, sentences
        if tokens.ndim != 2 or tokens.shape[1] > config.context:
            raise ValueError(
                f"Encoder: wanted tokens [B, T] with T at most {config.context}, got "
                f"shape {tokens.shape}"
            )
        # Tokens, their positions, and the kind of sentence (all are of kind 0).
        embed = partial(nn.Embed, features=config.dim)
        resid = embed(config.vocab, name="embed")(tokens)
        resid += embed(config.context, name="positions")(jnp.arange(tokens.shape[1]))[
            None
        ]
        resid += embed(2, name="kinds")(jnp.zeros((1, 1), jnp.int32))
        resid = _norm(config, "embed_norm")(resid)
        for i in range(config.layers):
            resid = Block(config, name=f"blocks_{i}")(resid, mask)
        # Mean over the tokens that are not padding, at unit length.
        weights = mask.astype(resid.dtype)[:, :, None]
        count = jnp.maximum(jnp.sum(weights, axis=1), 1.0)
        pooled = Site(name="pooled")(jnp.sum(weights * resid, axis=1) / count)
        length = jnp.linalg.norm(pooled, axis=1, keepdims=True)
        return pooled / jnp.maximum(length, 1e-9)


class Block(nn.Module):
    """A transformer block: attention and an MLP, each followed by a LayerNorm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, resid: Array, mask: Array) -> Array:
        """Run the block on the residual stream ``[B, T, dim]``."""
        config, dense = self.config, nn.Dense
        batch, time, _ = resid.shape
        shape = batch, time, config.heads, config.dim // config.heads
        # Attention to all tokens that are not padding.
        query, key, value = (
            dense(config.dim, name=name)(resid).reshape(shape)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=(mask > 0)[:, None, None, :]
        )
        added = dense(config.dim, name="out")(mixed.reshape(batch, time, -1))
        added = Site(name="attn_out")(added)
        resid = _norm(config, "attn_norm")(resid + added)
        # MLP.
        hidden = nn.gelu(dense(config.hidden, name="up")(resid), approximate=False)
        hidden = Site(name="mlp_hidden")(hidden)
        out = Site(name="mlp_out")(dense(config.dim, name="down")(hidden))
        return Site(name="resid_post")(_norm(config, "mlp_norm")(resid + out))


class PretrainedEncoder(NamedTuple):
    """A released text encoder.

    Attributes:
      name: name of its folder.
      config: for :class:`Encoder`.
      params: variables of the encoder.
      tokenizer: of the ``tokenizers`` library, or ``None``.
    """

    name: str
    config: EncoderConfig
    params: Params
    tokenizer: Any


def load_encoder(folder: str | Path) -> PretrainedEncoder:
    """Read a BERT from a folder of ``transformers``.

    Args:
      folder: with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    Returns:
      :class:`PretrainedEncoder`, parameters in float32.

    Raises:
      FileNotFoundError: if the folder or a file is not there.
      ValueError: for another kind of model, an option that is not covered, tensors that
        are missing or do not fit, a file that is not whole, a tokenizer with tokens
        that the model does not have.
      ImportError: without the ``lm`` extra.
    """
    folder, who = Path(folder), "load_encoder"
    config = _config_from_json(who, read_entries(folder / "config.json", who))
    # Names of tensors may have a prefix, if the file is of a model with a head.
    source = open_safetensors(who, folder)
    shapes = {name.removeprefix("bert."): x for name, x in source.shapes.items()}
    full_names = {name.removeprefix("bert."): name for name in source.shapes}
    source = source._replace(
        shapes=shapes, read=lambda name, s=source: s.read(full_names[name])
    )
    # The tensors in the tree of the module.
    example = Sentences(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))
    expected = jax.eval_shape(Encoder(config).init, jax.random.key(0), example)
    params = assemble_params(
        who, expected, _pieces(config), source, dtype=jnp.float32, ignored=_IGNORED
    )
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        check_tokenizer(who, tokenizer, config.vocab, folder)
    return PretrainedEncoder(
        name=folder.name, config=config, params=params, tokenizer=tokenizer
    )


def sentences_from_texts(
    model: PretrainedEncoder, texts: Sequence[str], length: int = 64
) -> Sentences:
    """Tokenize texts; cuts them at ``length`` and pads them to it.

    Args:
      model: for its tokenizer.
      texts: at least one.
      length: tokens per text, special ones included.

    Returns:
      :class:`Sentences` of ``[B, length]``.

    Raises:
      ValueError: without texts or a tokenizer, or for a length that is not possible.
    """
    if model.tokenizer is None or isinstance(texts, str) or not len(texts):
        raise ValueError(
            "sentences_from_texts: wanted a model with a tokenizer and some texts"
        )
    if not 3 <= length <= model.config.context:
        raise ValueError(
            f"sentences_from_texts: length must be in 3 .. {model.config.context}, "
            f"got {length}"
        )
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros((len(texts), length), np.float32)
    for i, text in enumerate(texts):
        ids = model.tokenizer.encode(text).ids
        if len(ids) > length:  # keep the last token, which marks the end
            ids = [*ids[: length - 1], ids[-1]]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    return Sentences(jnp.asarray(tokens), jnp.asarray(mask))


def _config_from_json(who: str, entries: Mapping[str, Any]) -> EncoderConfig:
    """Read and check ``config.json``."""
    kind = entries.get("model_type") if isinstance(entries, Mapping) else None
    if kind != "bert":
        raise ValueError(f"{who}: wanted a model of type 'bert', got {kind!r}")
    # Options that the module has no other form of.
    for name, covered in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("type_vocab_size", 2),
    ):
        if entries.get(name, covered) != covered:
            raise ValueError(f"{who}: {name} = {entries[name]!r} is not covered")
    try:
        sizes = {
            "vocab": entries["vocab_size"],
            "layers": entries["num_hidden_layers"],
            "dim": entries["hidden_size"],
            "heads": entries["num_attention_heads"],
            "hidden": entries["intermediate_size"],
            "context": entries["max_position_embeddings"],
        }
    except KeyError as error:
        raise ValueError(f"{who}: config.json has no entry {error}") from None
    are_counts = all(type(x) is int and x > 0 for x in sizes.values())
    if not are_counts or sizes["dim"] % sizes["heads"]:
        raise ValueError(f"{who}: sizes must be whole and fit each other, got {sizes}")
    return EncoderConfig(**sizes, eps=float(entries.get("layer_norm_eps", 1e-12)))


def _norm(config: EncoderConfig, name: str) -> nn.Module:
    return nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name=name)


def _pieces(config: EncoderConfig) -> Iterator[Piece]:
    """List the leaves of the module with the tensors that they come from."""
    dim, hidden = config.dim, config.hidden
    for name, theirs, num in (
        ("embed", "word", config.vocab),
        ("positions", "position", config.context),
        ("kinds", "token_type", 2),
    ):
        tensor = f"embeddings.{theirs}_embeddings.weight"
        yield from plain_piece(f"{name}/embedding", tensor, (num, dim))
    norms = {"embed_norm": "embeddings.LayerNorm"}
    for i in range(config.layers):
        block, layer = f"blocks_{i}", f"encoder.layer.{i}"
        norms[f"{block}/attn_norm"] = f"{layer}.attention.output.LayerNorm"
        norms[f"{block}/mlp_norm"] = f"{layer}.output.LayerNorm"
        for name, theirs, shape in (
            ("query", "attention.self.query", (dim, dim)),
            ("key", "attention.self.key", (dim, dim)),
            ("value", "attention.self.value", (dim, dim)),
            ("out", "attention.output.dense", (dim, dim)),
            ("up", "intermediate.dense", (hidden, dim)),
            ("down", "output.dense", (dim, hidden)),
        ):
            yield from linear_pieces(
                f"{block}/{name}", f"{layer}.{theirs}", shape, True
            )
    for name, theirs in norms.items():
        yield from plain_piece(f"{name}/scale", f"{theirs}.weight", (dim,))
        yield from plain_piece(f"{name}/bias", f"{theirs}.bias", (dim,))
