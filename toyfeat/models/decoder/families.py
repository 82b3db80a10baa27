"""Families of language models: their ``config.json`` as a configuration here."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from toyfeat.models.decoder.checks import show_value
from toyfeat.models.decoder.config import Activation, DecoderConfig
from toyfeat.models.decoder.rotations import rope_entries
from toyfeat.models.decoder.shapes import gpt2, llama, neox

_WHO = "load_decoder"
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_GLOBAL_BASE, _LOCAL_BASE = 1e6, 1e4  # of Gemma 3, where a file does not say


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
    rope = rope_entries(entries)
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
    for part in (entries, rope_entries(entries)):  # heads are rotated as a whole
        _check_covered(part, "partial_rotary_factor", 1)
    return replace(
        _llama_like(entries, eps=1e-6),
        out_bias=entries.get("attention_bias", False),
        mlp_bias=entries.get("mlp_bias", False),
    )


def _llama_like(
    entries: Mapping[str, Any],
    *,
    eps: float,
    bias: bool = False,
    tied: bool = False,
    base: float = 10_000.0,
) -> DecoderConfig:
    """Parse what all families after Llama share; defaults are those of the family."""
    rope = rope_entries(entries)
    activation = entries.get("hidden_activation", entries.get("hidden_act", "silu"))
    return llama(
        vocab=entries["vocab_size"],
        layers=entries["num_hidden_layers"],
        dim=entries["hidden_size"],
        heads=entries["num_attention_heads"],
        kv_heads=entries.get("num_key_value_heads"),
        head_dim=entries.get("head_dim"),
        hidden=entries["intermediate_size"],
        context=entries.get("max_position_embeddings", 2048),
        activation=_parse_activation(activation),
        rotary_base=rope.get("rope_theta", entries.get("rope_theta", base)),
        eps=entries.get("rms_norm_eps", eps),
        attention_bias=entries.get("attention_bias", bias),
        tied=entries.get("tie_word_embeddings", tied),
    )


def _parse_mistral(entries: Mapping[str, Any]) -> DecoderConfig:
    config = _llama_like(entries, eps=1e-6)
    return replace(config, window=entries.get("sliding_window", 4096), out_bias=False)


def _parse_qwen2(entries: Mapping[str, Any]) -> DecoderConfig:
    config = _llama_like(entries, eps=1e-6, bias=True)
    return _with_windows(replace(config, qkv_bias=True, out_bias=False), entries)


def _parse_qwen3(entries: Mapping[str, Any]) -> DecoderConfig:
    config = _llama_like({"head_dim": 128, **entries}, eps=1e-6)
    config = replace(config, qk_norm="head", out_bias=config.qkv_bias)
    return _with_windows(config, entries)


def _with_windows(config: DecoderConfig, entries: Mapping[str, Any]) -> DecoderConfig:
    """Set the windows of Qwen, which only the upper layers have, if any."""
    if not entries.get("use_sliding_window", False):
        return config
    upper = entries.get("max_window_layers", 28)
    default = tuple(i >= upper for i in range(config.layers))
    return _localized(config, entries, entries.get("sliding_window", 4096), default)


def _localized(
    config: DecoderConfig,
    entries: Mapping[str, Any],
    window: int | None,
    default: tuple[bool, ...],
) -> DecoderConfig:
    """Set the window, and which layers have it."""
    kinds = entries.get("layer_types")
    is_local = default
    if kinds is not None:
        known = {"sliding_attention": True, "full_attention": False}
        is_list = isinstance(kinds, list) and len(kinds) == config.layers
        if not is_list or any(kind not in tuple(known) for kind in kinds):
            raise ValueError(
                f"{_WHO}: layer_types must be a list of {', '.join(known)}, one for "
                f"each layer, got {show_value(kinds)}; wrap the model with "
                "from_function"
            )
        is_local = tuple(known[kind] for kind in kinds)
    return replace(config, window=window, local_layers=is_local)


def _parse_gemma2(entries: Mapping[str, Any]) -> DecoderConfig:
    config = _gemma_like({"head_dim": 256, **entries}, base=10_000.0)
    config = replace(
        config,
        score_cap=entries.get("attn_logit_softcapping", 50.0),
        logit_cap=entries.get("final_logit_softcapping", 30.0),
    )
    # Every second layer is local, from the first on.
    default = tuple(i % 2 == 0 for i in range(config.layers))
    return _localized(config, entries, entries.get("sliding_window", 4096), default)


def _parse_gemma3(entries: Mapping[str, Any]) -> DecoderConfig:
    config = _gemma_like({"head_dim": 256, **entries}, base=_GLOBAL_BASE)
    rope = entries.get("rope_parameters") or {}
    local = rope.get("sliding_attention") or {}
    config = replace(
        config,
        qk_norm="head",
        score_cap=entries.get("attn_logit_softcapping"),
        logit_cap=entries.get("final_logit_softcapping"),
        local_base=local.get(
            "rope_theta", entries.get("rope_local_base_freq", _LOCAL_BASE)
        ),
    )
    # All layers but every sixth are local.
    period = entries.get("sliding_window_pattern", 6)
    default = tuple((i + 1) % period != 0 for i in range(config.layers))
    return _localized(config, entries, entries.get("sliding_window", 4096), default)


def _gemma_like(entries: Mapping[str, Any], *, base: float) -> DecoderConfig:
    """Parse what Gemma 2 and 3 share."""
    if entries.get("use_bidirectional_attention"):
        _check_covered(entries, "use_bidirectional_attention", False)
    entries = {"hidden_activation": "gelu_pytorch_tanh", **entries}
    config = _llama_like(entries, eps=1e-6, tied=True, base=base)
    scale = entries.get("query_pre_attn_scalar", 256)
    return replace(
        config,
        norms="both",
        norm_offset=1.0,
        query_scale=scale**-0.5,
        embed_scale=config.dim**0.5,
    )


def _parse_olmo2(entries: Mapping[str, Any]) -> DecoderConfig:
    return replace(_llama_like(entries, eps=1e-5), norms="post", qk_norm="all")


def _parse_phi3(entries: Mapping[str, Any]) -> DecoderConfig:
    rope = rope_entries(entries)
    config = _llama_like(entries, eps=1e-5)
    share = rope.get("partial_rotary_factor", entries.get("partial_rotary_factor", 1.0))
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(
            f"{_WHO}: partial_rotary_factor must be a part of a head, above 0 and at "
            f"most 1, got {show_value(share)}; fetch it again"
        )
    width = int(config.head_dim * share)
    return replace(config, rotary_dim=width, window=entries.get("sliding_window"))


FAMILIES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "gpt2": _parse_gpt2,
    "gpt_neox": _parse_neox,
    "llama": _parse_llama,
    "mistral": _parse_mistral,
    "qwen2": _parse_qwen2,
    "qwen3": _parse_qwen3,
    "gemma2": _parse_gemma2,
    "gemma3_text": _parse_gemma3,
    "olmo2": _parse_olmo2,
    "phi3": _parse_phi3,
}
"""Model types of ``transformers``, with the functions that read their entries."""


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
