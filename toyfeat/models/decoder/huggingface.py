"""Loading of folders of ``transformers``: ``config.json`` and safetensors."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.models.decoder.checks import is_positive, show_value, show_values
from toyfeat.models.decoder.config import (
    Activation,
    DecoderConfig,
    gpt2,
    llama,
    neox,
)
from toyfeat.models.decoder.pieces import huggingface_pieces, param_shapes
from toyfeat.models.decoder.weights import (
    Source,
    assemble_params,
    list_pieces,
    naming_file,
    open_safetensors,
    read_entries,
)
from toyfeat.types import Params

_WHO = "load_decoder"
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "llama": "model."}
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Masks and tables that old checkpoints carry.
_IGNORED = r"attn\.(masked_)?bias$|attention\.(masked_)?bias$|rotary_emb\.inv_freq$"
# A tied model may store its embedding a second time.
_IGNORED_TIED = _IGNORED + r"|^lm_head\.weight$|^embed_out\.weight$"


def parse_config(entries: Mapping[str, Any]) -> tuple[str, DecoderConfig]:
    """Parse the content of a ``config.json``.

    Args:
      entries: content of the file.

    Returns:
      ``"gpt2"``, ``"gpt_neox"`` or ``"llama"``, and the configuration.

    Raises:
      ValueError: for another kind, an option that is not covered, or a missing entry.

    Example:
      >>> kind, config = parse_config({
      ...     "model_type": "gpt2", "vocab_size": 11, "n_layer": 2, "n_embd": 8,
      ...     "n_head": 2, "n_positions": 16,
      ... })
      >>> kind, config.hidden, config.tied
      ('gpt2', 32, True)
    """
    kind, config = _parse_sizes(entries)
    if config.positions == "rotary":
        config = _scale_rotations(config, _rope_entries(entries))
    return kind, config


def load_folder(folder: Path, dtype: Any) -> tuple[DecoderConfig, Params]:
    """Load configuration and parameters of a folder."""
    path = folder / "config.json"
    entries = read_entries(path, _WHO)
    with naming_file(_WHO, path):
        kind, config = _parse_sizes(entries)
    source = _strip_prefix(open_safetensors(_WHO, folder), _PREFIXES[kind])
    # The sizes must be those of the tensors before anything is made of them.
    ignored = _IGNORED_TIED if config.tied else _IGNORED
    pieces = huggingface_pieces(kind, config)
    pieces = list_pieces(_WHO, pieces, source, ignored=ignored)
    if config.tied:
        _check_tied(kind, source)
    with naming_file(_WHO, path):
        kind, config = parse_config(entries)
    return config, assemble_params(
        _WHO, param_shapes(config), pieces, source, dtype=dtype, ignored=ignored
    )


def _parse_sizes(entries: Mapping[str, Any]) -> tuple[str, DecoderConfig]:
    """Parse all but the divisors of rotations, which are as many as a head is wide."""
    if not isinstance(entries, Mapping):
        raise ValueError(
            f"{_WHO}: config.json must have entries, got {show_value(entries)}; "
            "fetch it again"
        )
    kind = entries.get("model_type")
    if kind not in tuple(_PARSERS):  # a list has no hash
        raise ValueError(
            f"{_WHO}: wanted a model of type {', '.join(_PARSERS)}, got "
            f"{show_value(kind)}; wrap another architecture with from_linen, "
            "from_nnx or from_function"
        )
    try:
        return kind, _PARSERS[kind](entries)
    except KeyError as error:
        raise _missing(error) from None


def _missing(error: KeyError) -> ValueError:
    return ValueError(f"{_WHO}: config.json has no entry {error}; fetch it again")


def _parse_gpt2(entries: Mapping[str, Any]) -> DecoderConfig:
    _check_covered(entries, "scale_attn_weights", True)
    _check_covered(entries, "scale_attn_by_inverse_layer_idx", False)
    _check_covered(entries, "add_cross_attention", False)
    return gpt2(
        vocab=entries["vocab_size"],
        layers=entries["n_layer"],
        dim=entries["n_embd"],
        heads=entries["n_head"],
        hidden=entries.get("n_inner"),
        context=entries["n_positions"],
        activation=_parse_activation(entries.get("activation_function", "gelu_new")),
        eps=entries.get("layer_norm_epsilon", 1e-5),
        tied=entries.get("tie_word_embeddings", True),
    )


def _parse_neox(entries: Mapping[str, Any]) -> DecoderConfig:
    # Newer entries on rotations override the older ones.
    rope = _rope_entries(entries)
    share = entries.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    base = entries.get("rotary_emb_base", rope.get("rope_theta", 10_000.0))
    return neox(
        vocab=entries["vocab_size"],
        layers=entries["num_hidden_layers"],
        dim=entries["hidden_size"],
        heads=entries["num_attention_heads"],
        hidden=entries["intermediate_size"],
        context=entries["max_position_embeddings"],
        activation=_parse_activation(entries.get("hidden_act", "gelu")),
        parallel=entries.get("use_parallel_residual", True),
        rotary_share=rope.get("partial_rotary_factor", share),
        rotary_base=rope.get("rope_theta", base),
        eps=entries.get("layer_norm_eps", 1e-5),
        attention_bias=entries.get("attention_bias", True),
        tied=entries.get("tie_word_embeddings", False),
    )


def _parse_llama(entries: Mapping[str, Any]) -> DecoderConfig:
    rope = _rope_entries(entries)
    for part in (entries, rope):  # heads are rotated as a whole
        _check_covered(part, "partial_rotary_factor", 1)
    return llama(
        vocab=entries["vocab_size"],
        layers=entries["num_hidden_layers"],
        dim=entries["hidden_size"],
        heads=entries["num_attention_heads"],
        kv_heads=entries.get("num_key_value_heads"),
        head_dim=entries.get("head_dim"),
        hidden=entries["intermediate_size"],
        context=entries.get("max_position_embeddings", 2048),
        activation=_parse_activation(entries.get("hidden_act", "silu")),
        rotary_base=rope.get("rope_theta", entries.get("rope_theta", 10_000.0)),
        eps=entries.get("rms_norm_eps", 1e-6),
        attention_bias=entries.get("attention_bias", False),
        mlp_bias=entries.get("mlp_bias", False),
        tied=entries.get("tie_word_embeddings", False),
    )


_PARSERS: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "gpt2": _parse_gpt2,
    "gpt_neox": _parse_neox,
    "llama": _parse_llama,
}


def _rope_entries(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entries on rotations, which newer files keep together.

    If a file has both names, transformers takes the older one and ignores the other.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if rope := entries.get(name):
            if not isinstance(rope, Mapping):
                raise ValueError(
                    f"{_WHO}: {name} must be entries, got {show_value(rope)}; fetch "
                    "it again"
                )
            return rope
    return {}


def _scale_rotations(config: DecoderConfig, rope: Mapping[str, Any]) -> DecoderConfig:
    """Set the divisors of rotations of models that were trained on longer texts."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return config
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"{_WHO}: rotations of type {show_value(kind)} are not covered, only "
            "'default', 'linear' and 'llama3'; use another model"
        )
    # The entries of the type, checked.
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor"]
        names += ["original_max_position_embeddings"]
    known = {"original_max_position_embeddings": config.context, **rope}
    try:
        sizes = {name: known[name] for name in names}
    except KeyError as error:
        raise _missing(error) from None
    if not all(is_positive(size) for size in sizes.values()):
        raise ValueError(
            f"{_WHO}: rotations of type {kind!r} want positive numbers, got "
            f"{show_values(sizes)}; fetch it again"
        )
    if sizes.get("low_freq_factor", 0) >= sizes.get("high_freq_factor", 1):
        raise ValueError(
            f"{_WHO}: rotations of type {kind!r} want high_freq_factor above "
            f"low_freq_factor, got {sizes}; fetch it again"
        )
    # Linear: all rates are divided by the factor.
    factor, pairs = sizes["factor"], config.rotary_dim // 2
    if kind == "linear":
        return replace(config, rotary_divisors=(float(factor),) * pairs)
    return replace(config, rotary_divisors=_llama3_divisors(config, *sizes.values()))


def _llama3_divisors(
    config: DecoderConfig, factor: float, low: float, high: float, context: float
) -> tuple[float, ...]:
    """Divisors of the rates of rotation of Llama 3, for a context that has grown.

    Waves that fit into the old context ``high`` times keep their rate, those that fit
    ``low`` times are divided by ``factor``, and rates between are mixed linearly.
    """
    pairs = config.rotary_dim // 2
    wavelengths = [
        2 * math.pi * config.rotary_base ** (i / pairs) for i in range(pairs)
    ]
    shares = [(context / length - low) / (high - low) for length in wavelengths]
    kept = [min(max(share, 0.0), 1.0) for share in shares]
    return tuple(1 / ((1 - k) / factor + k) for k in kept)


def _parse_activation(name: str) -> Activation:
    if name not in tuple(_ACTIVATIONS):
        raise ValueError(
            f"{_WHO}: wanted an activation of {', '.join(_ACTIVATIONS)}, got "
            f"{show_value(name)}; wrap the model with from_function"
        )
    return _ACTIVATIONS[name]


def _check_covered(entries: Mapping[str, Any], name: str, covered: bool | int) -> None:
    if entries.get(name, covered) != covered:
        raise ValueError(
            f"{_WHO}: {name} = {show_value(entries[name])} is not covered; wrap the "
            "model with from_function"
        )


def _strip_prefix(source: Source, prefix: str) -> Source:
    """Name tensors as in the model without a head."""
    names = {name.removeprefix(prefix): name for name in source.shapes}
    if len(names) < len(source.shapes):
        duplicate = next(
            n for n in names if {n, f"{prefix}{n}"} <= source.shapes.keys()
        )
        raise ValueError(
            f"{_WHO}: {source.name} has the tensor {duplicate} twice, also as "
            f"{prefix}{duplicate}; delete one of them"
        )
    return Source(
        source.name,
        {name: source.shapes[full_name] for name, full_name in names.items()},
        lambda name: source.read(names[name]),
    )


def _check_tied(kind: str, source: Source) -> None:
    """Raise if the files have a matrix of logits that is not the embedding."""
    head = {"gpt_neox": "embed_out.weight"}.get(kind, "lm_head.weight")
    embed = {"gpt2": "wte.weight", "gpt_neox": "embed_in.weight"}.get(
        kind, "embed_tokens.weight"
    )
    has_both = head in source.shapes and embed in source.shapes
    if has_both and not np.array_equal(source.read(head), source.read(embed)):
        raise ValueError(
            f"{_WHO}: {source.name} says that embeddings are tied "
            f"(tie_word_embeddings), but {head} is not {embed}; correct one of them"
        )
