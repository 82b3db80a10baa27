"""A text encoder as a flax module, with named sites, and released weights.

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
from toyfeat.models.decoder.tokens import check_tokenizer, tokenizer_of
from toyfeat.models.weights import (
    Piece,
    assembled,
    folder_source,
    json_of,
    linear,
    plain,
)
from toyfeat.types import Array, Params

_IGNORED = r"position_ids$|^pooler\.|^cls\."


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
        """Unit vectors of sentences."""
        config, (tokens, mask) = self.config, sentences
        if tokens.ndim != 2 or tokens.shape[1] > config.context:
            raise ValueError(
                f"Encoder: wanted tokens [B, T] with T at most {config.context}, got "
                f"shape {tokens.shape}"
            )
        embed = partial(nn.Embed, features=config.dim)
        resid = embed(config.vocab, name="embed")(tokens)
        resid += embed(config.context, name="positions")(jnp.arange(tokens.shape[1]))[
            None
        ]
        resid += embed(2, name="kinds")(jnp.zeros((1, 1), jnp.int32))
        resid = _norm(config, "embed_norm")(resid)
        for i in range(config.layers):
            resid = Block(config, name=f"blocks_{i}")(resid, mask)
        weights = mask.astype(resid.dtype)[:, :, None]
        count = jnp.maximum(jnp.sum(weights, axis=1), 1.0)
        pooled = Site(name="pooled")(jnp.sum(weights * resid, axis=1) / count)
        length = jnp.linalg.norm(pooled, axis=1, keepdims=True)
        return pooled / jnp.maximum(length, 1e-9)


class Block(nn.Module):
    """Attention and an MLP, a LayerNorm behind each."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, resid: Array, mask: Array) -> Array:
        """The residual stream after the block."""
        config, dense = self.config, nn.Dense
        batch, time, _ = resid.shape
        shape = batch, time, config.heads, config.dim // config.heads
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
        hidden = nn.gelu(dense(config.hidden, name="up")(resid), approximate=False)
        hidden = Site(name="mlp_hidden")(hidden)
        out = Site(name="mlp_out")(dense(config.dim, name="down")(hidden))
        return Site(name="resid_post")(_norm(config, "mlp_norm")(resid + out))


class PretrainedEncoder(NamedTuple):
    """A released text encoder.

    Attributes:
      name: of its folder.
      config: for :class:`Encoder`.
      params: its variables.
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
    given = json_of(who, folder / "config.json")
    config = _config_of(who, given)
    source = folder_source(who, folder)
    shapes = {name.removeprefix("bert."): x for name, x in source.shapes.items()}
    whole = {name.removeprefix("bert."): name for name in source.shapes}
    source = source._replace(shapes=shapes, read=lambda n, s=source: s.read(whole[n]))
    example = Sentences(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))
    wanted = jax.eval_shape(Encoder(config).init, jax.random.key(0), example)
    pieces = _pieces(config)
    params = assembled(who, wanted, pieces, source, dtype=jnp.float32, ignored=_IGNORED)
    words = tokenizer_of(folder)
    if words is not None:
        check_tokenizer(who, words, config.vocab)
    return PretrainedEncoder(folder.name, config, params, words)


def sentences_of(
    model: PretrainedEncoder, texts: Sequence[str], length: int = 64
) -> Sentences:
    """Texts as tokens, cut at ``length`` and padded to it.

    Args:
      model: for its tokenizer.
      texts: at least one.
      length: tokens, special ones included.

    Returns:
      :class:`Sentences` of ``[B, length]``.

    Raises:
      ValueError: without texts or a tokenizer, or for a length that is not possible.
    """
    if model.tokenizer is None or isinstance(texts, str) or not len(texts):
        raise ValueError("sentences_of: wanted a model with a tokenizer and some texts")
    if not 3 <= length <= model.config.context:
        raise ValueError(
            f"sentences_of: length must be in 3 .. {model.config.context}, got {length}"
        )
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros((len(texts), length), np.float32)
    for i, text in enumerate(texts):
        ids = model.tokenizer.encode(text).ids
        if len(ids) > length:  # the last one says that the text ends
            ids = [*ids[: length - 1], ids[-1]]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    return Sentences(jnp.asarray(tokens), jnp.asarray(mask))


def _config_of(who: str, given: Mapping[str, Any]) -> EncoderConfig:
    kind = given.get("model_type") if isinstance(given, Mapping) else None
    if kind != "bert":
        raise ValueError(f"{who}: wanted a model of type 'bert', got {kind!r}")
    for name, wanted in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("type_vocab_size", 2),
    ):
        if given.get(name, wanted) != wanted:
            raise ValueError(f"{who}: {name} = {given[name]!r} is not covered")
    try:
        sizes = {
            "vocab": given["vocab_size"],
            "layers": given["num_hidden_layers"],
            "dim": given["hidden_size"],
            "heads": given["num_attention_heads"],
            "hidden": given["intermediate_size"],
            "context": given["max_position_embeddings"],
        }
    except KeyError as error:
        raise ValueError(f"{who}: config.json has no entry {error}") from None
    whole = all(type(x) is int and x > 0 for x in sizes.values())
    if not whole or sizes["dim"] % sizes["heads"]:
        raise ValueError(f"{who}: sizes must be whole and fit each other, got {sizes}")
    return EncoderConfig(**sizes, eps=float(given.get("layer_norm_eps", 1e-12)))


def _norm(config: EncoderConfig, name: str) -> nn.Module:
    return nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name=name)


def _pieces(config: EncoderConfig) -> Iterator[Piece]:
    dim, hidden = config.dim, config.hidden
    for name, other, num in (
        ("embed", "word", config.vocab),
        ("positions", "position", config.context),
        ("kinds", "token_type", 2),
    ):
        tensor = f"embeddings.{other}_embeddings.weight"
        yield from plain(f"{name}/embedding", tensor, (num, dim))
    norms = {"embed_norm": "embeddings.LayerNorm"}
    for i in range(config.layers):
        ours, theirs = f"blocks_{i}", f"encoder.layer.{i}"
        norms[f"{ours}/attn_norm"] = f"{theirs}.attention.output.LayerNorm"
        norms[f"{ours}/mlp_norm"] = f"{theirs}.output.LayerNorm"
        for name, other, shape in (
            ("query", "attention.self.query", (dim, dim)),
            ("key", "attention.self.key", (dim, dim)),
            ("value", "attention.self.value", (dim, dim)),
            ("out", "attention.output.dense", (dim, dim)),
            ("up", "intermediate.dense", (hidden, dim)),
            ("down", "output.dense", (dim, hidden)),
        ):
            yield from linear(f"{ours}/{name}", f"{theirs}.{other}", shape, True)
    for name, other in norms.items():
        yield from plain(f"{name}/scale", f"{other}.weight", (dim,))
        yield from plain(f"{name}/bias", f"{other}.bias", (dim,))
