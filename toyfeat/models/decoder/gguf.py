"""Loading of GGUF files of the Llama architecture."""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toyfeat.models.decoder.checks import shorten, show_value
from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.gguf_header import check_header
from toyfeat.models.decoder.pieces import gguf_pieces, param_shapes
from toyfeat.models.decoder.shapes import llama
from toyfeat.models.decoder.weights import (
    Source,
    assemble_params,
    list_pieces,
    naming_file,
)
from toyfeat.types import Params

_WHO = "load_decoder"
_DIVISORS = "rope_freqs.weight"
_ROTARY_BASE = 10_000.0  # what llama.cpp takes where a file has none
_IGNORED = r"^rope_freqs\.weight$"

_KNOWN = {
    f"llama.{name}"
    for name in (
        *("vocab_size", "block_count", "embedding_length", "feed_forward_length"),
        *("context_length", "attention.head_count", "attention.head_count_kv"),
        *("attention.key_length", "attention.value_length", "rope.dimension_count"),
        *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear"),
        *("rope.scaling.type", "rope.scaling.factor", "expert_count"),
        # What changes nothing without experts, or says how the file was made.
        *("expert_used_count", "tensor_data_layout", "rope.scaling.finetuned"),
        "rope.scaling.original_context_length",
    )
}


class GgufFile(NamedTuple):
    """Content of a file.

    Attributes:
      fields: metadata by name.
      source: tensors, dequantized when they are read.
    """

    fields: Mapping[str, Any]
    source: Source


def load_gguf(path: Path, dtype: Any) -> tuple[DecoderConfig, Params]:
    """Load configuration and parameters of a file."""
    fields, source = open_gguf(path)
    with naming_file(_WHO, path):
        config = _parse_config(fields, source.shapes)
    # The sizes must be those of the tensors before anything is made of them.
    pieces = list_pieces(_WHO, gguf_pieces(config), source, ignored=_IGNORED)
    with naming_file(_WHO, path):
        config = _set_rotary_divisors(config, fields, source)
    params = assemble_params(
        _WHO, param_shapes(config), pieces, source, dtype=dtype, ignored=_IGNORED
    )
    return config, params


def open_gguf(path: Path) -> GgufFile:
    """Open a file with the reader of the ``gguf`` library.

    Raises:
      ValueError: if the file is damaged.
    """
    library = _library()

    def type_size(number: int) -> tuple[int, int]:
        try:
            return library.GGML_QUANT_SIZES[library.GGMLQuantizationType(number)]
        except (ValueError, KeyError):
            raise ValueError(
                f"a tensor is of the type {number}, unknown to the gguf library"
            ) from None

    try:
        check_header(path, type_size)
        reader = library.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except OSError:
        raise
    except Exception as error:  # whatever the bytes happen to break
        raise ValueError(
            f"{_WHO}: {path} is not a whole GGUF file ({shorten(error)}); fetch it "
            "again"
        ) from error
    # The file lists sizes from the innermost on.
    shapes = {name: tuple(map(int, t.shape[::-1])) for name, t in tensors.items()}

    def dequantize(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            values = library.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{_WHO}: {path} stores {name} as {tensor.tensor_type.name}, which "
                "cannot be unpacked; use a file of another quantization"
            ) from error
        return np.asarray(values, np.float32).reshape(shapes[name])

    return GgufFile(fields, Source(str(path), shapes, dequantize))


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            f'{_WHO}: gguf is not installed: pip install "toyfeat[lm]"'
        ) from error


def _parse_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> DecoderConfig:
    """Parse the configuration: metadata, and two things that only tensors show."""
    _check_covered(fields)
    try:
        heads = fields["llama.attention.head_count"]
        return llama(
            vocab=(shapes["token_embd.weight"] or (0,))[0],
            layers=fields["llama.block_count"],
            dim=fields["llama.embedding_length"],
            heads=heads,
            kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=_parse_head_dim(fields),
            hidden=fields["llama.feed_forward_length"],
            context=fields["llama.context_length"],
            rotary_base=fields.get("llama.rope.freq_base", _ROTARY_BASE),
            eps=fields["llama.attention.layer_norm_rms_epsilon"],
            tied="output.weight" not in shapes,
        )
    except KeyError as error:
        raise ValueError(f"it has no entry {error}; fetch it again") from None


def _check_covered(fields: Mapping[str, Any]) -> None:
    """Raise for what a file may hold that :func:`llama` does not compute."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise ValueError(
            "wanted a GGUF file of the architecture 'llama', it has "
            f"{show_value(kind)}; use the safetensors of that model"
        )
    # An entry that is not known may change what the model computes.
    unknown = [n for n in fields if n.startswith("llama.") and n not in _KNOWN]
    if unknown:
        raise ValueError(
            f"its entry {show_value(unknown[0])} is not known here, and may change "
            "what the model computes; use the safetensors of that model"
        )
    if fields.get("llama.expert_count", 0):
        raise ValueError("it has experts, which are not covered; use a model without")


def _parse_head_dim(fields: Mapping[str, Any]) -> int | None:
    """Parse the width of a head; ``None`` if it follows from the number of heads."""
    width = fields.get("llama.attention.key_length")
    rotary_dim = fields.get("llama.rope.dimension_count", width)
    if width not in (None, rotary_dim):
        raise ValueError(
            "it rotates a part of every head only, which is not covered for GGUF "
            "files; use the safetensors of that model"
        )
    return rotary_dim


def _set_rotary_divisors(
    config: DecoderConfig, fields: Mapping[str, Any], source: Source
) -> DecoderConfig:
    """Set the divisors of the rotations: a factor, a tensor, or both."""
    # The factor divides all rates alike, the tensor each pair's own.
    divisors = np.full(config.rotary_dim // 2, _parse_rope_factor(fields))
    if _DIVISORS in source.shapes:
        shape = source.shapes[_DIVISORS]
        if shape != divisors.shape:
            raise ValueError(
                f"{_DIVISORS} is {shape}, wanted {divisors.shape}; fetch it again"
            )
        divisors = divisors * source.read(_DIVISORS)
    if np.all(divisors == 1):
        return config
    return replace(config, rotary_divisors=tuple(divisors.tolist()))


def _parse_rope_factor(fields: Mapping[str, Any]) -> float:
    """Parse the divisor of all rates of rotation."""
    # A factor without a type is linear for llama.cpp too.
    scaling = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scale_linear", 1)
    factor = fields.get("llama.rope.scaling.factor", factor)
    if scaling not in ("none", "linear"):
        raise ValueError(
            f"it has rotations scaled by {show_value(scaling)}, which is not "
            "covered; use the safetensors of that model"
        )
    if not isinstance(factor, int | float):
        raise ValueError(
            f"the factor of rotations must be a number, got {show_value(factor)}; "
            "fetch it again"
        )
    return 1.0 if scaling == "none" or not factor else float(factor)
