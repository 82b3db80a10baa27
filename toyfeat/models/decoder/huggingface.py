"""Loading of folders of ``transformers``: ``config.json`` and safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.models.decoder.checks import show_value
from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.families import FAMILIES
from toyfeat.models.decoder.pieces import huggingface_pieces, param_shapes
from toyfeat.models.decoder.rotations import (
    missing_entry,
    rope_entries,
    scale_rotations,
)
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
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # others: "model."
# Masks and tables that old checkpoints carry.
_IGNORED = r"attn\.(masked_)?bias$|attention\.(masked_)?bias$|rotary_emb\.inv_freq$"
# A tied model may store its embedding a second time.
_IGNORED_TIED = _IGNORED + r"|^lm_head\.weight$|^embed_out\.weight$"


def parse_config(entries: Mapping[str, Any]) -> tuple[str, DecoderConfig]:
    """Parse the content of a ``config.json``.

    Args:
      entries: content of the file.

    Returns:
      The ``model_type``, a key of :data:`toyfeat.models.decoder.families.FAMILIES`, and
      the configuration.

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
        config = scale_rotations(config, rope_entries(entries))
    return kind, config


def load_folder(folder: Path, dtype: Any) -> tuple[DecoderConfig, Params]:
    """Load configuration and parameters of a folder."""
    path = folder / "config.json"
    entries = read_entries(path, _WHO)
    with naming_file(_WHO, path):
        kind, config = _parse_sizes(entries)
    source = _strip_prefix(
        open_safetensors(_WHO, folder), _PREFIXES.get(kind, "model.")
    )
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
    if kind not in tuple(FAMILIES):  # a list has no hash
        raise ValueError(
            f"{_WHO}: wanted a model of type {', '.join(FAMILIES)}, got "
            f"{show_value(kind)}; wrap another architecture with from_linen, "
            "from_nnx, from_equinox or from_function"
        )
    if quantized := entries.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ValueError(
            f"{_WHO}: wanted weights in floating point, got a checkpoint quantized by "
            f"{show_value(method)}; take the weights before they were quantized"
        )
    try:
        return kind, FAMILIES[kind](entries)
    except KeyError as error:
        raise missing_entry(error) from None


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
