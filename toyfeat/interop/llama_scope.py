"""Dictionaries from the files of Llama Scope."""

import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toyfeat.files.json import field, read_json
from toyfeat.files.safetensors import tensors_of
from toyfeat.files.tensors import finite_tensors
from toyfeat.interop.loaded import WHO, Loaded, make_loaded

_AXES = {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2, "decoder.bias": 1}
_CHOICES = {
    "act_fn": ("jumprelu", "topk", "relu"),
    "norm_activation": ("dataset-wise", "inference"),
}


class _Settings(NamedTuple):
    """Settings that change what is computed.

    Attributes:
      codes: kind of the codes.
      threshold: of all codes, in units of activations, in which a row of the decoder
        has length 1 if ``by_length``.
      k: codes that are kept, or ``None``.
      by_length: whether lengths of rows count for which codes are kept.
      centred: whether the bias of the decoder is subtracted from what is read.
      lengths: mean lengths of what is read and of what is written, ``None`` if they
        are folded into the weights.
    """

    codes: str
    threshold: float
    k: int | None
    by_length: bool
    centred: bool
    lengths: tuple[float, float] | None


def load_llama_scope(folder: Path) -> Loaded:
    """Read a dictionary of activations of mean length ``sqrt(D)``, scales folded.

    With ``s = sqrt(D) / mean length``, of what is read and of what is written, codes
    are those of ``s_in x``, and what is written is divided by ``s_out``.  Codes are in
    units of the rows of ``W_dec`` as they are stored, as in SAELens, or of rows of
    length 1 where lengths count for which are the ``k`` largest.

    References:
      He et al. (2024), "Llama Scope"; ``SparseAutoEncoder.from_pretrained`` of
      Language-Model-SAEs at its release, whose codes are in units of rows of length 1.
    """
    source = folder / "hyperparams.json"
    raw = read_json(source, WHO)
    settings = _settings(raw, source)
    # Matrices are stored as torch has them, [out, in].
    weights = folder / "checkpoints" / "final.safetensors"
    stored = finite_tensors(tensors_of(weights, WHO), weights, WHO)
    shapes = {name: x.shape for name, x in stored.items()}
    if {name: len(shape) for name, shape in shapes.items()} != _AXES:
        raise ValueError(
            f"{WHO}: {weights} must have weights and biases of encoder and decoder, "
            f"got {shapes}; fetch it again"
        )
    encoder, decoder = stored["encoder.weight"].T, stored["decoder.weight"].T
    # Fold the scales.
    read = written = 1.0
    if settings.lengths is not None:
        read = encoder.shape[0] ** 0.5 / settings.lengths[0]
        written = decoder.shape[1] ** 0.5 / settings.lengths[1]
    tensors = {
        "W_enc": encoder * read,
        "b_enc": stored["encoder.bias"],
        "W_dec": decoder / written,
        "b_dec": stored["decoder.bias"] / written,
    }
    # A threshold in units of activations becomes one in units of codes.
    if settings.codes == "jumprelu":
        units = np.full(encoder.shape[1], 1 / read)
        if settings.by_length:
            units = np.linalg.norm(decoder / written, axis=1)
            units = np.where(units > 0, units, 1)  # a latent that writes nothing
        tensors["threshold"] = np.asarray(settings.threshold / units, np.float32)
    about, transcodes = _hooks(raw)
    return make_loaded(
        weights,
        tensors,
        about,
        transcodes=transcodes,
        apply_b_dec_to_input=settings.centred,
        k=settings.k,
        rescale=settings.by_length,
    )


def _settings(raw: dict[str, Any], source: Path) -> _Settings:
    """Look up the settings that change what is computed.

    Raises:
      ValueError: for values that are not known here, or of another type.
    """
    chosen = {}
    for name, known in _CHOICES.items():
        chosen[name] = field(raw, name, str, source, WHO, default=known[0])
        if chosen[name] not in known:
            raise ValueError(
                f"{WHO}: {name} in {source} must be one of {', '.join(known)}, got "
                f"{reprlib.repr(chosen[name])}; load it with its own library"
            )
    if raw.get("use_glu_encoder"):
        raise ValueError(
            f"{WHO}: wanted an encoder that is a matrix, got use_glu_encoder in "
            f"{source}; load it with its own library"
        )
    k = None
    if chosen["act_fn"] == "topk":  # whatever the threshold, as its own library does
        k = field(raw, "top_k", int, source, WHO, low=1)
    by_length, centred = (
        field(raw, name, bool, source, WHO, default=False)
        for name in (
            "sparsity_include_decoder_norm",
            "apply_decoder_bias_to_pre_encoder",
        )
    )
    lengths = None
    if chosen["norm_activation"] == "dataset-wise":
        lengths = _lengths(raw, source)
    threshold = field(raw, "jump_relu_threshold", float, source, WHO, default=0.0)
    return _Settings(chosen["act_fn"], threshold, k, by_length, centred, lengths)


def _lengths(raw: dict[str, Any], source: Path) -> tuple[float, float]:
    """Look up the mean lengths of what is read and of what is written."""
    norms = field(raw, "dataset_average_activation_norm", dict, source, WHO)
    read = field(norms, "in", float, source, WHO)
    written = field(norms, "out", float, source, WHO, default=read)
    if min(read, written) <= 0:
        raise ValueError(
            f"{WHO}: dataset_average_activation_norm in {source} must be a mean length "
            f"above 0, got {read} and {written}; fetch it again"
        )
    return read, written


def _hooks(raw: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Look up the hooks, and whether what is written is another one."""
    about: dict[str, Any] = {"format": "Llama Scope"}
    read, written = (raw.get(f"hook_point_{side}") for side in ("in", "out"))
    if isinstance(read, str):
        about["hook_name"] = read
    transcodes = isinstance(written, str) and written != read
    if transcodes:
        about["hook_name_out"] = written
    return about, transcodes
