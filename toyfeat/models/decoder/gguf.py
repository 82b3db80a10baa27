"""Loading of GGUF files of the Llama architecture."""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.models.decoder.config import DecoderConfig, llama
from toyfeat.models.decoder.pieces import gguf_pieces, param_shapes
from toyfeat.models.decoder.weights import Source, assemble_params
from toyfeat.types import Params

_WHO = "load_decoder"
_IGNORED = r"^rope_freqs\.weight$"


def load_gguf(path: Path, dtype: Any) -> tuple[DecoderConfig, Params]:
    """Load configuration and parameters of a file."""
    library = _library()
    reader = open_gguf(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The file lists sizes from the innermost on.
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in tensors.items()}

    def dequantize(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            values = library.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{_WHO}: {path} stores {name} as {tensor.tensor_type.name}, which "
                "cannot be unpacked"
            ) from error
        return np.asarray(values, np.float32).reshape(shapes[name])

    # Configuration; divisors of the rotations are a factor, a tensor, or both.
    config = _parse_config(fields, shapes, path)
    divisors = np.full(config.rotary_dim // 2, _parse_rope_factor(fields, path))
    if "rope_freqs.weight" in tensors:
        shape = shapes["rope_freqs.weight"]
        if shape != divisors.shape:
            raise ValueError(
                f"{_WHO}: {path}: rope_freqs.weight is {shape}, wanted {divisors.shape}"
            )
        divisors = divisors * dequantize("rope_freqs.weight")
    if np.any(divisors != 1):
        config = replace(config, rotary_divisors=tuple(divisors.tolist()))
    # Parameters.
    params = assemble_params(
        _WHO,
        param_shapes(config),
        gguf_pieces(config),
        Source(str(path), shapes, dequantize),
        dtype=dtype,
        ignored=_IGNORED,
    )
    return config, params


def open_gguf(path: Path) -> Any:
    """Open a file with the reader of the ``gguf`` library.

    Raises:
      ValueError: if the file is damaged.
    """
    library = _library()
    try:
        return library.GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # whatever the bytes happen to break
        raise ValueError(
            f"{_WHO}: {path} is not a whole GGUF file ({error}); fetch it again"
        ) from error


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            f'{_WHO}: gguf is not installed: pip install "toyfeat[lm]"'
        ) from error


def _parse_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> DecoderConfig:
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise ValueError(
            f"{_WHO}: wanted a GGUF file of the architecture 'llama', {path} has "
            f"{kind!r}; use the safetensors of that model"
        )
    if fields.get("llama.expert_count", 0):
        raise ValueError(f"{_WHO}: {path} has experts, which are not covered")
    try:
        heads = fields["llama.attention.head_count"]
        width = fields.get("llama.attention.key_length")
        rotary_dim = fields.get("llama.rope.dimension_count", width)
        if width not in (None, rotary_dim):
            raise ValueError(
                f"{_WHO}: {path} rotates a part of every head only, which is not "
                "covered for GGUF files"
            )
        return llama(
            vocab=shapes["token_embd.weight"][0],
            layers=fields["llama.block_count"],
            dim=fields["llama.embedding_length"],
            heads=heads,
            kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=rotary_dim,
            hidden=fields["llama.feed_forward_length"],
            context=fields["llama.context_length"],
            rotary_base=fields.get("llama.rope.freq_base", 10_000.0),
            eps=fields["llama.attention.layer_norm_rms_epsilon"],
            tied="output.weight" not in shapes,
        )
    except KeyError as error:
        raise ValueError(f"{_WHO}: {path} has no entry {error}") from None


def _parse_rope_factor(fields: Mapping[str, Any], path: Path) -> float:
    """Parse the divisor of all rates of rotation."""
    # A factor without a type is linear for llama.cpp too.
    scaling = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scale_linear", 1)
    factor = fields.get("llama.rope.scaling.factor", factor)
    if scaling not in ("none", "linear"):
        raise ValueError(
            f"{_WHO}: {path} has rotations scaled by {scaling!r}, which is not covered"
        )
    return 1.0 if scaling == "none" or not factor else float(factor)
