"""GGUF files of the Llama architecture."""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.models.decoder.config import DecoderConfig, llama
from toyfeat.models.decoder.pieces import gguf_pieces, shapes_of
from toyfeat.models.decoder.weights import Source, assembled
from toyfeat.types import Params

_WHO = "load_decoder"
_IGNORED = r"^rope_freqs\.weight$"


def read(path: Path, dtype: Any) -> tuple[DecoderConfig, Params]:
    """Configuration and parameters of a file."""
    library = _library()
    reader = opened(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The file lists sizes from the innermost on.
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in tensors.items()}

    def unpacked(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            values = library.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{_WHO}: {path} stores {name} as {tensor.tensor_type.name}, which "
                "cannot be unpacked"
            ) from error
        return np.asarray(values, np.float32).reshape(shapes[name])

    config = _config_of(fields, shapes, path)
    slower = np.full(config.rotary_dim // 2, _factor(fields, path))
    if "rope_freqs.weight" in tensors:
        wanted, found = slower.shape, shapes["rope_freqs.weight"]
        if found != wanted:
            raise ValueError(
                f"{_WHO}: {path}: rope_freqs.weight is {found}, wanted {wanted}"
            )
        slower = slower * unpacked("rope_freqs.weight")
    if np.any(slower != 1):
        config = replace(config, rotary_divisors=tuple(slower.tolist()))
    source = Source(str(path), shapes, unpacked)
    pieces = gguf_pieces(config)
    return config, assembled(
        _WHO, shapes_of(config), pieces, source, dtype=dtype, ignored=_IGNORED
    )


def opened(path: Path) -> Any:
    """The reader of the ``gguf`` library.

    Raises:
      ValueError: if the file is not whole.
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


def _config_of(
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
        turned = fields.get("llama.rope.dimension_count", width)
        if width not in (None, turned):
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
            head_dim=turned,
            hidden=fields["llama.feed_forward_length"],
            context=fields["llama.context_length"],
            rotary_base=fields.get("llama.rope.freq_base", 10_000.0),
            eps=fields["llama.attention.layer_norm_rms_epsilon"],
            tied="output.weight" not in shapes,
        )
    except KeyError as error:
        raise ValueError(f"{_WHO}: {path} has no entry {error}") from None


def _factor(fields: Mapping[str, Any], path: Path) -> Any:
    """Divisor of all rates of rotations."""
    # A factor without a type is linear for llama.cpp too.
    scaling = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scale_linear", 1)
    factor = fields.get("llama.rope.scaling.factor", factor)
    if scaling not in ("none", "linear"):
        raise ValueError(
            f"{_WHO}: {path} has rotations scaled by {scaling!r}, which is not covered"
        )
    return 1.0 if scaling == "none" or not factor else float(factor)
