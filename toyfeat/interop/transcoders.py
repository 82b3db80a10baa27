"""Transcoders from the files of circuit-tracer, a layer at a time."""

import re
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.files.safetensors import tensors_of
from toyfeat.interop.loaded import WHO, Loaded, make_loaded

_THRESHOLD = "activation_function.threshold"
_LINE = r"""(?m)^(\w+):[ \t]*["']?([^"'\n#]+?)["']?[ \t]*(?:[ \t]#.*)?$"""
_HOOKS = {"hook_name": "feature_input_hook", "hook_name_out": "feature_output_hook"}


def load_transcoder(folder: Path, layer: int) -> Loaded:
    """Read a transcoder whose encoder is stored as ``[M, D]``.

    ``config.yaml`` says if the ``k`` largest codes are kept; those below 0 are 0 here,
    and negative codes in circuit-tracer, where fewer than ``k`` are above.
    """
    source = folder / f"layer_{layer}.safetensors"
    tensors = {k: np.asarray(x) for k, x in tensors_of(source, WHO).items()}
    if _THRESHOLD in tensors:
        tensors["threshold"] = tensors.pop(_THRESHOLD)
    for name in ("W_enc", "W_skip"):  # as torch stores them, [out, in]
        if name in tensors:
            tensors[name] = tensors[name].T
    known = _config(folder)
    about = {"format": "transcoder", **_about(known, layer)}
    k = _kept(known, folder)
    return make_loaded(source, tensors, about, transcodes=True, k=k)


def load_cross_layer(folder: Path, layer: int) -> Loaded:
    """Read a layer of a cross-layer transcoder, ``W_dec [M, layers, D]``.

    Raises:
      ValueError: if the ``k`` largest codes are kept, over all layers or in each.
    """
    source = folder / f"W_dec_{layer}.safetensors"
    stored = dict(tensors_of(folder / f"W_enc_{layer}.safetensors", WHO))
    stored |= tensors_of(source, WHO)
    tensors = {
        name.removesuffix(f"_{layer}"): np.asarray(x) for name, x in stored.items()
    }
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    known = _config(folder)
    if _kept(known, folder) is not None:
        raise ValueError(
            f"{WHO}: wanted a cross-layer transcoder of ReLU or JumpReLU codes, got "
            f"topk in {folder / 'config.yaml'}; load it with its own library"
        )
    about = {"format": "cross-layer transcoder", **_about(known, layer)}
    return make_cross_layer(source, tensors, about, layer)


def make_cross_layer(
    source: Path, tensors: dict[str, np.ndarray], about: dict[str, Any], layer: int
) -> Loaded:
    """Make a layer of a cross-layer transcoder, whose output is of all its layers.

    The bias and the linear path are of the first of them, its own.

    Args:
      source: the file of the writers, for messages.
      tensors: ``W_enc [D, M]``, ``W_dec [M, layers, D]``, ``b_dec [D]``, ``W_skip
        [D, D]`` and so on.
      about: the metadata, to which ``layers`` is added.
      layer: its own.

    Raises:
      ValueError: if tensors are missing, or writers are not of layers.
    """
    names = {"W_enc", "W_dec", "b_enc", "b_dec"}
    decoder = np.shape(tensors.get("W_dec", ()))
    if not names <= set(tensors) or len(decoder) != 3 or not decoder[1]:
        shapes = {name: x.shape for name, x in tensors.items()}
        raise ValueError(
            f"{WHO}: {source} must have {sorted(names)} of a cross-layer transcoder "
            f"with W_dec of [latents, layers, D] up to layer {layer} or later, got "
            f"{shapes}; others cannot be read"
        )
    latents, layers, width = decoder
    tensors["W_dec"] = tensors["W_dec"].reshape(latents, layers * width)
    later = (layers - 1) * width
    for name in ("b_dec", "W_skip"):
        if name in tensors and tensors[name].ndim:
            tensor = tensors[name]
            zeros = np.zeros((*tensor.shape[:-1], later), tensor.dtype)
            tensors[name] = np.concatenate([tensor, zeros], axis=-1)
    about["layers"] = list(range(layer, layer + layers))
    return make_loaded(source, tensors, about, transcodes=True)


def _config(folder: Path) -> dict[str, str]:
    """Read a ``config.yaml``, which has a key per line.

    Raises:
      ValueError: for a file that has text and no such line: what it says of the
        activation function must not be missed.
    """
    source = folder / "config.yaml"
    if not source.is_file():
        return {}
    text = source.read_text(encoding="utf-8-sig", errors="replace")
    pairs = re.findall(_LINE, text)
    if text.strip() and not pairs:
        raise ValueError(
            f"{WHO}: {source} must have a line 'key: value' for every setting, got "
            "none; write it as YAML, or take the file away for transcoders with ReLU"
        )
    return {key: value for key, value in pairs if value not in ("null", "~")}


def _about(known: dict[str, str], layer: int) -> dict[str, Any]:
    """Name the model and the hooks of a layer."""
    about = {"model_name": known["model_name"]} if "model_name" in known else {}
    for name, key in _HOOKS.items():
        if key in known:
            about[name] = f"blocks.{layer}.{known[key]}"
    return about


def _kept(known: dict[str, str], folder: Path) -> int | None:
    """Look up how many codes are kept, ``None`` for all.

    Raises:
      ValueError: for another activation function, or without the number.
    """
    activation, k = known.get("activation", "relu"), known.get("k", "")
    if activation in ("relu", "jump_relu", "jumprelu"):
        return None
    if activation != "topk" or re.fullmatch(r"[1-9]\d{0,8}", k) is None:
        raise ValueError(
            f"{WHO}: config.yaml in {folder} must have relu, jump_relu or topk with k "
            f"as activation, got {reprlib.repr(activation)} with k "
            f"{reprlib.repr(k) if k else 'left out'}; write what the transcoders were "
            "trained with"
        )
    return int(k)
