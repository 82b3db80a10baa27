"""Configurations of GPT-2, GPT-NeoX and Llama by their sizes."""

from typing import Any

from toyfeat.models.decoder.checks import check_rotary_share, divide_heads
from toyfeat.models.decoder.config import Activation, DecoderConfig


def gpt2(
    *,
    vocab: int = 50257,
    layers: int = 12,
    dim: int = 768,
    heads: int = 12,
    hidden: int | None = None,
    context: int = 1024,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-5,
    tied: bool = True,
) -> DecoderConfig:
    """Configure GPT-2: learned positions, LayerNorm, GELU.

    Args:
      vocab: size of the vocabulary.
      layers: number of blocks.
      dim: width, a multiple of ``heads``.
      heads: number of attention heads.
      hidden: width of the MLP, ``4 * dim`` by default.
      context: number of positions.
      activation: of the MLP.
      eps: epsilon of LayerNorm.
      tied: whether the matrix of the logits is the embedding.

    Returns:
      The configuration.

    Raises:
      ValueError: for sizes that do not fit, or values of another type.

    References:
      Radford et al. (2019), "Language models are unsupervised multitask learners".
    """
    return DecoderConfig(
        vocab=vocab,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=divide_heads("gpt2", dim, heads),
        hidden=4 * dim if hidden is None else hidden,
        context=context,
        positions="learned",
        norm="layer",
        activation=activation,
        gated=False,
        parallel=False,
        rotary_dim=0,
        rotary_base=0.0,
        eps=eps,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=tied,
    )


def neox(
    *,
    vocab: int = 50304,
    layers: int = 6,
    dim: int = 512,
    heads: int = 8,
    hidden: int | None = None,
    context: int = 2048,
    activation: Activation = "gelu",
    parallel: bool = True,
    rotary_share: float = 0.25,
    rotary_base: float = 10_000.0,
    rotary_divisors: tuple[float, ...] | None = None,
    eps: float = 1e-5,
    attention_bias: bool = True,
    tied: bool = False,
) -> DecoderConfig:
    """Configure GPT-NeoX and Pythia: partly rotated heads, parallel MLP.

    Args:
      vocab: size of the vocabulary.
      layers: number of blocks.
      dim: width, a multiple of ``heads``.
      heads: number of attention heads.
      hidden: width of the MLP, ``4 * dim`` by default.
      context: number of positions.
      activation: of the MLP.
      parallel: whether attention and MLP read the same residual stream.
      rotary_share: share of a head's entries that is rotated.
      rotary_base: base of the wavelengths.
      rotary_divisors: divisors of the rates of rotation, one for each pair of entries.
      eps: epsilon of LayerNorm.
      attention_bias: whether attention has biases.
      tied: whether the matrix of the logits is the embedding.

    Returns:
      The configuration.

    Raises:
      ValueError: for sizes that do not fit, or values of another type.

    References:
      Black et al. (2022), "GPT-NeoX-20B", arXiv 2204.06745; Su et al. (2021),
      "RoFormer", arXiv 2104.09864, for the rotations.
    """
    # Only the first entries of a head are rotated.
    head_dim = divide_heads("neox", dim, heads)
    check_rotary_share(rotary_share)
    width = int(head_dim * rotary_share)
    return DecoderConfig(
        vocab=vocab,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        hidden=4 * dim if hidden is None else hidden,
        context=context,
        norm="layer",
        activation=activation,
        gated=False,
        parallel=parallel,
        **_rotations(width, rotary_base, rotary_divisors),
        eps=eps,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=True,
        tied=tied,
    )


def llama(
    *,
    vocab: int = 49152,
    layers: int = 30,
    dim: int = 576,
    heads: int = 9,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int = 1536,
    context: int = 8192,
    activation: Activation = "silu",
    rotary_base: float = 10_000.0,
    rotary_divisors: tuple[float, ...] | None = None,
    eps: float = 1e-5,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
) -> DecoderConfig:
    """Configure Llama: rotated heads, grouped queries, RMSNorm, a gated MLP.

    Args:
      vocab: size of the vocabulary.
      layers: number of blocks.
      dim: width.
      heads: number of query heads.
      kv_heads: number of key and value heads, ``heads`` by default.
      head_dim: width of a head, ``dim / heads`` by default.
      hidden: width of the MLP.
      context: number of positions.
      activation: of the MLP's gate.
      rotary_base: base of the wavelengths.
      rotary_divisors: divisors of the rates of rotation, one for each pair of entries.
      eps: epsilon of RMSNorm.
      attention_bias: whether attention has biases.
      mlp_bias: whether the MLP has biases.
      tied: whether the matrix of the logits is the embedding.

    Returns:
      The configuration.

    Raises:
      ValueError: for sizes that do not fit, or values of another type.

    References:
      Touvron et al. (2023), "LLaMA", arXiv 2302.13971; Ainslie et al. (2023), "GQA",
      arXiv 2305.13245, for the grouped queries; Shazeer (2020), "GLU variants",
      arXiv 2002.05202, for the MLP.
    """
    # A head need not be an equal share of the width, and all of it is rotated.
    width = divide_heads("llama", dim, heads) if head_dim is None else head_dim
    return DecoderConfig(
        vocab=vocab,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width,
        hidden=hidden,
        context=context,
        norm="rms",
        activation=activation,
        gated=True,
        parallel=False,
        **_rotations(width, rotary_base, rotary_divisors),
        eps=eps,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied=tied,
    )


def _rotations(
    width: int, base: float, divisors: tuple[float, ...] | None
) -> dict[str, Any]:
    """Fields of a configuration whose positions are rotations."""
    return {
        "positions": "rotary",
        "rotary_dim": width,
        "rotary_base": base,
        "rotary_divisors": divisors,
    }
