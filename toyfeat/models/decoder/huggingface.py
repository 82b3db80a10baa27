"""Folders of ``transformers``: ``config.json`` and safetensors."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.models.decoder.config import Activation, DecoderConfig, gpt2, llama, neox
from toyfeat.models.decoder.pieces import huggingface_pieces, shapes_of
from toyfeat.models.decoder.weights import Source, assembled, folder_source, json_of
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


def config_of(given: Mapping[str, Any]) -> tuple[str, DecoderConfig]:
    """Kind and configuration of the content of a ``config.json``.

    Args:
      given: what the file says.

    Returns:
      ``"gpt2"``, ``"gpt_neox"`` or ``"llama"``, and the configuration.

    Raises:
      ValueError: for another kind, an option that is not covered, or an entry that
        is missing.

    Example:
      >>> kind, config = config_of({
      ...     "model_type": "gpt2", "vocab_size": 11, "n_layer": 2, "n_embd": 8,
      ...     "n_head": 2, "n_positions": 16,
      ... })
      >>> kind, config.hidden, config.tied
      ('gpt2', 32, True)
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{_WHO}: config.json holds no entries, got {given!r}")
    kind = given.get("model_type")
    if kind not in tuple(_KINDS):  # a list has no hash
        raise ValueError(
            f"{_WHO}: wanted a model of type {', '.join(_KINDS)}, got {kind!r}; wrap "
            "another architecture with from_linen, from_nnx or from_function"
        )
    try:
        return kind, _KINDS[kind](given)
    except KeyError as error:
        raise ValueError(f"{_WHO}: config.json has no entry {error}") from None


def read(folder: Path, dtype: Any) -> tuple[DecoderConfig, Params]:
    """Configuration and parameters of a folder."""
    kind, config = config_of(json_of(_WHO, folder / "config.json"))
    source = _without_prefix(folder_source(_WHO, folder), _PREFIXES[kind])
    ignored = _IGNORED
    if config.tied:
        _check_tied(kind, source)
        ignored += r"|^lm_head\.weight$|^embed_out\.weight$"
    pieces = huggingface_pieces(kind, config)
    return config, assembled(
        _WHO, shapes_of(config), pieces, source, dtype=dtype, ignored=ignored
    )


def _of_gpt2(given: Mapping[str, Any]) -> DecoderConfig:
    _refuse(given, "scale_attn_weights", True)
    _refuse(given, "scale_attn_by_inverse_layer_idx", False)
    _refuse(given, "add_cross_attention", False)
    return gpt2(
        vocab=given["vocab_size"],
        layers=given["n_layer"],
        dim=given["n_embd"],
        heads=given["n_head"],
        hidden=given.get("n_inner"),
        context=given["n_positions"],
        activation=_activation(given.get("activation_function", "gelu_new")),
        eps=given.get("layer_norm_epsilon", 1e-5),
        tied=given.get("tie_word_embeddings", True),
    )


def _of_neox(given: Mapping[str, Any]) -> DecoderConfig:
    rope = _rope(given)
    share = given.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    base = given.get("rotary_emb_base", rope.get("rope_theta", 10_000.0))
    config = neox(
        vocab=given["vocab_size"],
        layers=given["num_hidden_layers"],
        dim=given["hidden_size"],
        heads=given["num_attention_heads"],
        hidden=given["intermediate_size"],
        context=given["max_position_embeddings"],
        activation=_activation(given.get("hidden_act", "gelu")),
        parallel=given.get("use_parallel_residual", True),
        rotary_share=rope.get("partial_rotary_factor", share),
        rotary_base=rope.get("rope_theta", base),
        eps=given.get("layer_norm_eps", 1e-5),
        attention_bias=given.get("attention_bias", True),
        tied=given.get("tie_word_embeddings", False),
    )
    return _slowed(config, rope)


def _of_llama(given: Mapping[str, Any]) -> DecoderConfig:
    rope = _rope(given)
    config = llama(
        vocab=given["vocab_size"],
        layers=given["num_hidden_layers"],
        dim=given["hidden_size"],
        heads=given["num_attention_heads"],
        kv_heads=given.get("num_key_value_heads"),
        head_dim=given.get("head_dim"),
        hidden=given["intermediate_size"],
        context=given.get("max_position_embeddings", 2048),
        activation=_activation(given.get("hidden_act", "silu")),
        rotary_base=rope.get("rope_theta", given.get("rope_theta", 10_000.0)),
        eps=given.get("rms_norm_eps", 1e-6),
        attention_bias=given.get("attention_bias", False),
        mlp_bias=given.get("mlp_bias", False),
        tied=given.get("tie_word_embeddings", False),
    )
    return _slowed(config, rope)


_KINDS: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "gpt2": _of_gpt2,
    "gpt_neox": _of_neox,
    "llama": _of_llama,
}


def _rope(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entries on rotations, which newer files keep together.

    Where a file has both, transformers takes the older name and none of the other.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if found := given.get(name):
            if not isinstance(found, Mapping):
                raise ValueError(f"{_WHO}: {name} must be entries, got {found!r}")
            return found
    return {}


def _slowed(config: DecoderConfig, rope: Mapping[str, Any]) -> DecoderConfig:
    """With the rates of rotations that longer texts were trained with."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return config
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"{_WHO}: rotations of type {kind!r} are not covered, only 'default', "
            "'linear' and 'llama3'"
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor"]
        names += ["original_max_position_embeddings"]
    known = {"original_max_position_embeddings": config.context, **rope}
    sizes = {name: known[name] for name in names}
    fit = all(isinstance(x, int | float) and 0 < x < math.inf for x in sizes.values())
    if not fit:
        raise ValueError(
            f"{_WHO}: rotations of type {kind!r} want positive numbers, got {sizes}"
        )
    if sizes.get("low_freq_factor", 0) >= sizes.get("high_freq_factor", 1):
        raise ValueError(
            f"{_WHO}: rotations of type {kind!r} want high_freq_factor above "
            f"low_freq_factor, got {sizes}"
        )
    factor, num = sizes["factor"], config.rotary_dim // 2
    if kind == "linear":
        return replace(config, rotary_divisors=(float(factor),) * num)
    _, low, high, context = sizes.values()
    waves = [
        2 * math.pi * config.rotary_base ** (i / num) for i in range(num)
    ]  # positions of a whole turn
    shares = [(context / wave - low) / (high - low) for wave in waves]
    kept = [min(max(share, 0.0), 1.0) for share in shares]
    return replace(
        config, rotary_divisors=tuple(1 / ((1 - k) / factor + k) for k in kept)
    )


def _activation(name: str) -> Activation:
    if name not in tuple(_ACTIVATIONS):
        raise ValueError(
            f"{_WHO}: wanted an activation of {', '.join(_ACTIVATIONS)}, got {name!r}"
        )
    return _ACTIVATIONS[name]


def _refuse(given: Mapping[str, Any], name: str, wanted: bool) -> None:
    if given.get(name, wanted) != wanted:
        raise ValueError(f"{_WHO}: {name} = {given[name]!r} is not covered")


def _without_prefix(source: Source, prefix: str) -> Source:
    """Names as in the model inside of the language model."""
    names = {name.removeprefix(prefix): name for name in source.shapes}
    return Source(
        source.name,
        {name: source.shapes[whole] for name, whole in names.items()},
        lambda name: source.read(names[name]),
    )


def _check_tied(kind: str, source: Source) -> None:
    """A matrix of logits in the files must be the embedding."""
    head = {"gpt_neox": "embed_out.weight"}.get(kind, "lm_head.weight")
    embed = {"gpt2": "wte.weight", "gpt_neox": "embed_in.weight"}.get(
        kind, "embed_tokens.weight"
    )
    if head in source.shapes and embed in source.shapes:
        same = np.array_equal(source.read(head), source.read(embed))
        if not same:
            raise ValueError(
                f"{_WHO}: {source.name} says that embeddings are tied "
                f"(tie_word_embeddings), but {head} is not {embed}"
            )
