"""Configurations of decoders: sizes and kinds of their parts."""

from dataclasses import dataclass
from typing import Literal, Self, get_args

from toyfeat.models.decoder.checks import (
    MAX_SIZE,
    check_factors,
    check_rotary_dim,
    check_rotary_divisors,
    check_window,
    is_positive,
    is_size,
    show_value,
    show_values,
)

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
_SIZES = ("vocab", "layers", "dim", "heads", "kv_heads", "head_dim", "hidden")
_SIZES += ("context",)
_FACTORS = ("rotary_scale", "rotary_growth", "local_base", "query_scale")
_FACTORS += ("score_cap", "logit_cap", "embed_scale")
_KINDS = {"norms": ("pre", "post", "both"), "qk_norm": ("none", "head", "all")}
_FLAGS = ("gated", "parallel", "qkv_bias", "out_bias", "mlp_bias", "tied")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and kinds of the parts of a :class:`Decoder`.

    Make one with :func:`gpt2`, :func:`neox` or :func:`llama`, or from the
    ``config.json`` of a model (:func:`parse_config`).

    Attributes:
      vocab: size of the vocabulary ``V``.
      layers: number of blocks.
      dim: width ``D`` of the residual stream.
      heads: number of query heads.
      kv_heads: number of key and value heads; each serves ``heads / kv_heads`` query
        heads.
      head_dim: width of a head.
      hidden: width of the MLP.
      context: positions that the model was trained on.
      positions: ``"learned"`` adds a vector for each position, ``"rotary"`` rotates
        queries and keys.
      norm: ``"layer"`` (centred, with bias) or ``"rms"``.
      activation: of the MLP; ``"gelu_tanh"`` is the approximation of GPT-2.
      gated: whether the MLP's hidden units are ``activation(gate) * up``.
      parallel: whether attention and MLP read the same residual stream.
      rotary_dim: number of entries of a head that are rotated, the first ones.
      rotary_base: base of the wavelengths, which grow up to ``2 pi`` times this.
      eps: epsilon of the norms.
      qkv_bias: whether queries, keys and values have a bias.
      out_bias: whether the attention's output has a bias.
      mlp_bias: whether the MLP's matrices have a bias.
      tied: whether the matrix of the logits is the embedding.
      rotary_divisors: divisors of the rates of rotation, ``rotary_dim / 2`` of them,
        for models that were trained on longer texts later; ``None`` for ones.
      rotary_scale: factor of cosines and sines (YaRN).
      rotary_growth: factor by which the context grew, if the base depends on the
        number of positions (dynamic NTK); ``None`` for a fixed base.
      window: number of positions that a query of a local layer attends to, its own
        one included; ``None`` for all.
      local_layers: whether each layer is local, of these and of those that were cut
        off; ``None`` for all, if there is a window.
      local_base: ``rotary_base`` of local layers, which are not scaled; ``None`` for
        the same rotations.
      norms: ``"pre"`` normalizes what a part reads, ``"post"`` what it adds to the
        stream, ``"both"`` both.
      norm_offset: added to the scales of norms (1 in Gemma).
      qk_norm: ``"head"`` normalizes every query and key, ``"all"`` all heads together.
      query_scale: factor of the scores, ``head_dim^(-1/2)`` by default.
      score_cap: soft cap ``c tanh(x / c)`` of the scores, or ``None``.
      logit_cap: soft cap of the logits, or ``None``.
      embed_scale: factor of the embeddings.
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
    rotary_scale: float = 1.0
    rotary_growth: float | None = None
    window: int | None = None
    local_layers: tuple[bool, ...] | None = None
    local_base: float | None = None
    norms: Literal["pre", "post", "both"] = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["none", "head", "all"] = "none"
    query_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0

    def __post_init__(self: Self) -> None:
        """Check the sizes and kinds.

        Raises:
          ValueError: for sizes that do not fit, or values of another type.
        """
        # Sizes.
        sizes = {name: getattr(self, name) for name in _SIZES}
        if not all(is_size(size) for size in sizes.values()):
            raise ValueError(
                f"decoder: sizes must be whole and positive, at most {MAX_SIZE}, got "
                f"{show_values(sizes)}; give other sizes"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"decoder: kv_heads must divide heads, got {self.kv_heads} and "
                f"{self.heads}; give a divisor of heads"
            )
        # Scales and rotations.
        is_rotary = self.positions == "rotary"
        if is_rotary:
            check_rotary_dim(self.rotary_dim, self.head_dim)
        scales = (self.eps, self.rotary_base) if is_rotary else (self.eps,)
        if not all(is_positive(scale) for scale in scales):
            raise ValueError(
                "decoder: eps and rotary_base must be positive, got "
                f"{show_value(self.eps)} and {show_value(self.rotary_base)}; give "
                "finite numbers"
            )
        check_rotary_divisors(self.rotary_divisors, self.rotary_dim // 2)
        check_factors({name: getattr(self, name) for name in _FACTORS})
        check_window(self.window, self.local_layers, self.layers)
        # Kinds and flags.
        for name, kinds in {"activation": get_args(Activation), **_KINDS}.items():
            if getattr(self, name) not in kinds:
                raise ValueError(
                    f"decoder: {name} must be one of {', '.join(kinds)}, got "
                    f"{show_value(getattr(self, name))}; give one of these"
                )
        flags = {name: getattr(self, name) for name in _FLAGS}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise ValueError(
                f"decoder: flags must be True or False, got {show_values(flags)}; give "
                "bools"
            )
