"""Dictionaries from the files of Gemma Scope 1 and 2, JumpReLU codes all of them."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.jump_relu import JUMP_RELU
from toyfeat.dictionary.types import Config, Dictionary
from toyfeat.files.archives import array_from_npy, open_archive
from toyfeat.files.json import read_json
from toyfeat.files.safetensors import tensors_of
from toyfeat.interop import files
from toyfeat.interop.loaded import WHO, Loaded, make_loaded
from toyfeat.interop.transcoders import make_cross_layer
from toyfeat.types import Params

FILE = "params.npz"
"""Name of the file of Gemma Scope 1."""

_NAMES = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
_RENAMED = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
# Places in the names of folders, with hooks in TransformerLens' words.
_PLACES = {
    "resid_post": "hook_resid_post",
    "-res/": "hook_resid_post",
    "attn_out": "attn.hook_z",
    "-att/": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
    "-mlp/": "hook_mlp_out",
}
_TRANSCODER = "transcoder"
_FOLDERS = 6  # from the repository to the file, in the cache of the hub, too


def load_params(path: Path, who: str) -> tuple[Dictionary, Params]:
    """Read a JumpReLU dictionary of Gemma Scope 1.

    Codes are ``pre`` where ``pre = acts @ W_enc + b_enc > threshold``, so ``b_dec`` is
    not subtracted from the input.

    Args:
      path: of the file.
      who: the function, for messages.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      ValueError: if the file is damaged, or tensors are missing, too many, of other
        shapes or not finite.

    References:
      Lieberum et al. (2024), "Gemma Scope", section 2.
    """
    with path.open("rb") as file:
        try:
            with open_archive(file) as archive:
                tensors = {
                    name.removesuffix(".npy"): array_from_npy(archive.read(name))
                    for name in archive.namelist()
                }
        except Exception as error:  # a damaged archive fails in a dozen ways
            raise ValueError(
                f"{who}: {path} is not a whole archive of arrays ({error}); fetch it "
                "again"
            ) from error
    if set(tensors) != _NAMES or tensors["W_enc"].ndim != 2:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        raise ValueError(
            f"{who}: {path} must have the tensors {sorted(_NAMES)} of a JumpReLU "
            f"dictionary, got {shapes}; others cannot be read"
        )
    dim, latents = tensors["W_enc"].shape
    config = Config(
        architecture=JUMP_RELU.name,
        d_in=dim,
        d_sae=latents,
        d_out=dim if _innermost(_place(path.parent)) == _TRANSCODER else None,
        apply_b_dec_to_input=False,
        **JUMP_RELU.defaults,
    )
    return files.dictionary_of(JUMP_RELU, config, tensors, who, path)


def load_first(folder: Path) -> Loaded:
    """Read Gemma Scope 1, ``params.npz``.

    Dictionaries of embeddings take them as they are stored, before Gemma multiplies
    them by ``sqrt(D)``.
    """
    about = {"format": "Gemma Scope", **hook(folder)}
    return Loaded(*load_params(folder / FILE, WHO), about)


def load_second(folder: Path) -> Loaded:
    """Read Gemma Scope 2, ``params.safetensors``, with its affine path."""
    source = folder / "params.safetensors"
    tensors = renamed(source)
    # A transcoder, which the files do not name, reads one place and writes another.
    known = settings(folder)
    transcodes = "W_skip" in tensors or bool(known.get("hf_hook_point_out"))
    transcodes = transcodes or _innermost(_place(folder)) == _TRANSCODER
    about = {"format": "Gemma Scope 2", **hook(folder), **known}
    return make_loaded(source, tensors, about, transcodes=transcodes)


def load_second_layer(folder: Path, layer: int) -> Loaded:
    """Read a layer of a cross-layer transcoder of Gemma Scope 2.

    Its writers are ``w_dec [M, layers, D]``, of all layers of the model; those to
    layers before its own are never used.

    Raises:
      ValueError: for crosscoders, whose files have the same names, and if tensors are
        missing or of other shapes.
    """
    if "crosscoder" in _place(folder):
        raise ValueError(
            f"{WHO}: wanted a cross-layer transcoder, got a crosscoder in {folder}, "
            "whose layers are some of the model's; load it with its own library"
        )
    source = folder / f"params_layer_{layer}.safetensors"
    tensors = renamed(source)
    if "W_dec" in tensors and tensors["W_dec"].ndim == 3:
        tensors["W_dec"] = tensors["W_dec"][:, layer:]
    about = {"format": "Gemma Scope 2 cross-layer transcoder", **settings(folder)}
    return make_cross_layer(source, tensors, about, layer)


def renamed(source: Path) -> dict[str, np.ndarray]:
    """Read tensors with lower-case names; the path ``[D_in, D]`` is ``W_skip``."""
    stored = tensors_of(source, WHO)
    return {_RENAMED.get(name, name): np.asarray(x) for name, x in stored.items()}


def settings(folder: Path) -> dict[str, Any]:
    """Read the model and its hooks, in the words of transformers, if they are there."""
    source = folder / "config.json"
    known = read_json(source, WHO) if source.exists() else {}
    names = ("model_name", "hf_hook_point_in", "hf_hook_point_out")
    return {name: known[name] for name in names if name in known}


def hook(folder: Path) -> dict[str, Any]:
    """Read the hook off the names of folders, as far as they say it."""
    text = _place(folder)
    layers, place = re.findall(r"layer_(\d+)", text), _innermost(text)
    if not layers or place in ("", _TRANSCODER):
        return {}
    return {"hook_name": f"blocks.{layers[-1]}.{_PLACES[place]}"}


def _innermost(text: str) -> str:
    """Find the place, or a transcoder, that the innermost folder names, if one does.

    Folders of a reader's own, which the others are in, may be named like them.
    """
    names = (*_PLACES, _TRANSCODER)
    at, name = max((text.rfind(name), name) for name in names)
    return name if at >= 0 else ""


def _place(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-_FOLDERS:])
