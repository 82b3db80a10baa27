"""The three shapes of decoder that cover most released language models."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and kinds of the parts of a :class:`Decoder`.

    Make one with :func:`gpt2`, :func:`neox` or :func:`llama`.

    Attributes:
      vocab: tokens ``V``.
      layers: blocks.
      dim: width ``D`` of the residual stream.
      heads: of the queries.
      kv_heads: of keys and values; each serves ``heads / kv_heads`` query heads.
      head_dim: width of a head.
      hidden: width of the MLP.
      context: positions that the model was trained on.
      positions: a learned vector each, or rotations of queries and keys.
      norm: ``"layer"`` (centred, with bias) or ``"rms"``.
      activation: of the MLP; ``"gelu_tanh"`` is the approximation of GPT-2.
      gated: whether the MLP's hidden units are ``activation(gate) * up``.
      parallel: whether attention and MLP read the same residual.
      rotary_dim: entries of a head that are rotated, the first ones.
      rotary_base: wavelengths grow up to ``2 pi`` times this.
      eps: of the norms.
      qkv_bias: whether queries, keys and values have a bias.
      out_bias: whether the attention's output has one.
      mlp_bias: whether the MLP's matrices have one.
      tied: whether the logits' matrix is the embedding.
      rotary_divisors: what the rate of each pair of entries of a head is divided by,
        ``rotary_dim / 2`` of them, for models that were trained on longer texts later;
        ``None`` for ones.
    """

    vocab: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    positions: Literal["learned", "rotary"]
    norm: Literal["layer", "rms"]
    activation: Activation
    gated: bool
    parallel: bool
    rotary_dim: int
    rotary_base: float
    eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    rotary_divisors: tuple[float, ...] | None = None

    def __post_init__(self: Self) -> None:
        """Check the sizes.

        Raises:
          ValueError: for sizes that do not fit, or values of another kind.
        """
        names = ("vocab", "layers", "dim", "heads", "kv_heads", "head_dim", "hidden")
        names += ("context",)
        sizes = {name: getattr(self, name) for name in names}
        if not all(_is_size(x) for x in sizes.values()):
            raise ValueError(f"decoder: sizes must be whole and positive, got {sizes}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"decoder: kv_heads must divide heads, got {self.kv_heads} and "
                f"{self.heads}"
            )
        rotary = self.positions == "rotary"
        width = self.rotary_dim
        if rotary and not (width % 2 == 0 and 2 <= width <= self.head_dim):
            raise ValueError(
                "decoder: rotary_dim must be even and in 2 .. head_dim "
                f"{self.head_dim}, got {width}"
            )
        scales = (self.eps, self.rotary_base) if rotary else (self.eps,)
        if not all(_is_positive(x) for x in scales):
            raise ValueError(
                "decoder: eps and rotary_base must be positive, got "
                f"{self.eps!r} and {self.rotary_base!r}"
            )
        slower = self.rotary_divisors
        good = slower is None or (
            isinstance(slower, tuple)
            and len(slower) == width // 2
            and all(_is_positive(x) for x in slower)
        )
        if not good:
            raise ValueError(
                f"decoder: rotary_divisors must be {width // 2} positive numbers in a "
                f"tuple, half of rotary_dim, got {slower!r}"
            )
        kinds = get_args(Activation)
        if self.activation not in kinds:
            raise ValueError(
                f"decoder: activation must be one of {', '.join(kinds)}, got "
                f"{self.activation!r}"
            )
        names = ("gated", "parallel", "qkv_bias", "out_bias", "mlp_bias", "tied")
        flags = {name: getattr(self, name) for name in names}
        if not all(isinstance(x, bool) for x in flags.values()):
            raise ValueError(f"decoder: flags must be True or False, got {flags}")


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
    """GPT-2: learned positions, LayerNorm, GELU.

    Args:
      vocab: tokens.
      layers: blocks.
      dim: width, a multiple of ``heads``.
      heads: of attention.
      hidden: of the MLP, ``4 * dim`` by default.
      context: positions.
      activation: of the MLP.
      eps: of LayerNorm.
      tied: whether the logits' matrix is the embedding.

    Returns:
      A configuration.

    Raises:
      ValueError: for sizes that do not fit, or values of another kind.

    References:
      Radford et al. (2019), "Language models are unsupervised multitask learners".
    """
    return DecoderConfig(
        vocab=vocab,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=_per_head("gpt2", dim, heads),
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
    """GPT-NeoX and Pythia: partly rotated heads, attention beside the MLP.

    Args:
      vocab: tokens.
      layers: blocks.
      dim: width, a multiple of ``heads``.
      heads: of attention.
      hidden: of the MLP, ``4 * dim`` by default.
      context: positions.
      activation: of the MLP.
      parallel: whether attention and MLP read the same residual.
      rotary_share: of a head's entries that are rotated.
      rotary_base: of the wavelengths.
      rotary_divisors: of the rates, one for every pair of entries that is rotated.
      eps: of LayerNorm.
      attention_bias: whether attention has biases.
      tied: whether the logits' matrix is the embedding.

    Returns:
      A configuration.

    Raises:
      ValueError: for sizes that do not fit, or values of another kind.

    References:
      Black et al. (2022), "GPT-NeoX-20B", arXiv 2204.06745; Su et al. (2021),
      "RoFormer", arXiv 2104.09864, for the rotations.
    """
    head_dim = _per_head("neox", dim, heads)
    if not (_is_positive(rotary_share) and rotary_share <= 1):
        raise ValueError(
            "neox: rotary_share must be a part of a head, above 0 and at most 1, got "
            f"{rotary_share!r}"
        )
    return DecoderConfig(
        vocab=vocab,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        hidden=4 * dim if hidden is None else hidden,
        context=context,
        positions="rotary",
        norm="layer",
        activation=activation,
        gated=False,
        parallel=parallel,
        rotary_dim=int(head_dim * rotary_share),
        rotary_base=rotary_base,
        rotary_divisors=rotary_divisors,
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
    """Llama: rotated heads, grouped queries, RMSNorm, a gated MLP.

    Args:
      vocab: tokens.
      layers: blocks.
      dim: width.
      heads: of the queries.
      kv_heads: of keys and values, ``heads`` by default.
      head_dim: width of a head, ``dim / heads`` by default.
      hidden: of the MLP.
      context: positions.
      activation: of the MLP's gate.
      rotary_base: of the wavelengths.
      rotary_divisors: of the rates, one for every pair of entries that is rotated.
      eps: of RMSNorm.
      attention_bias: whether attention has biases.
      mlp_bias: whether the MLP has biases.
      tied: whether the logits' matrix is the embedding.

    Returns:
      A configuration.

    Raises:
      ValueError: for sizes that do not fit, or values of another kind.

    References:
      Touvron et al. (2023), "LLaMA", arXiv 2302.13971; Ainslie et al. (2023), "GQA",
      arXiv 2305.13245, for the grouped queries; Shazeer (2020), "GLU variants",
      arXiv 2002.05202, for the MLP.
    """
    width = _per_head("llama", dim, heads) if head_dim is None else head_dim
    return DecoderConfig(
        vocab=vocab,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width,
        hidden=hidden,
        context=context,
        positions="rotary",
        norm="rms",
        activation=activation,
        gated=True,
        parallel=False,
        rotary_dim=width,
        rotary_base=rotary_base,
        rotary_divisors=rotary_divisors,
        eps=eps,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied=tied,
    )


def _per_head(who: str, dim: int, heads: int) -> int:
    if not _is_size(dim) or not _is_size(heads) or dim % heads:
        raise ValueError(f"{who}: heads must divide dim, got {heads!r} and {dim!r}")
    return dim // heads


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _is_positive(x: Any) -> bool:
    known = isinstance(x, int | float) and not isinstance(x, bool)
    return known and 0 < x < math.inf
