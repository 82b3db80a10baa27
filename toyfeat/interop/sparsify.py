"""Dictionaries from the files of sparsify."""

from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.topk import TOPK
from toyfeat.dictionary.types import Config, Dictionary
from toyfeat.files.safetensors import tensors_of
from toyfeat.interop import files
from toyfeat.types import Params

_WHO = "load_sparsify"
_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}
_ABSENT = {
    "skip_connection": "a linear path beside the codes, which no dictionary here has",
    "signed": "codes of both signs, which sparsify no longer has",
}
_KNOWN = (
    *_ABSENT,
    *("activation", "d_in", "expansion_factor", "k", "multi_topk"),
    *("normalize_decoder", "num_latents", "transcode"),
)


def load_sparsify(path: str | Path) -> tuple[Dictionary, Params]:
    """Read a sparse autoencoder or transcoder that sparsify saved.

    The result is a :func:`toyfeat.dictionaries.topk` without
    ``rescale_acts_by_decoder_norm``, and with ``target_dim`` if it was trained to
    transcode.  ``multi_topk`` is a second loss with ``4 k`` codes; ``encode`` and
    ``decode`` of sparsify keep ``k`` in any case, and so does the result (``forward``
    of sparsify returns the reconstruction by ``4 k`` then).

    Args:
      path: the folder of one hook point with ``cfg.json`` and ``sae.safetensors``.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if there is a skip connection, another activation than ``topk``, or
        another setting that is not known here, or tensors are missing or of other
        shapes.
      ImportError: without safetensors.

    Example:
      >>> import json, pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> weights = {"encoder.weight": np.ones((8, 4)), "encoder.bias": np.ones(8)}
      >>> weights |= {"W_dec": np.ones((8, 4)), "b_dec": np.ones(4)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file(weights, f"{folder}/sae.safetensors")
      ...     text = json.dumps({"d_in": 4, "num_latents": 8, "k": 2})
      ...     _ = pathlib.Path(folder, "cfg.json").write_text(text)
      ...     sae, params = load_sparsify(folder)
      >>> sae.config.architecture, sae.config.k, params["W_enc"].shape
      ('topk', 2, (4, 8))

    References:
      Belrose et al., sparsify 1.3.3 (``eai-sparsify``), ``SparseCoder``.
    """
    settings, weights = files.settings_and_weights(
        _WHO, path, "cfg.json", "sae.safetensors"
    )
    config = _config(settings)
    state = tensors_of(weights, _WHO)
    if set(state) != set(_NAMES):
        raise ValueError(
            f"{_WHO}: wanted tensors {sorted(_NAMES)}, got {sorted(state)}"
        )
    tensors = {ours: np.asarray(state[theirs]) for theirs, ours in _NAMES.items()}
    tensors["W_enc"] = tensors["W_enc"].T
    return files.dictionary_of(TOPK, config, tensors, _WHO)


def _config(settings: dict[str, Any]) -> Config:
    for key, value in settings.items():
        if value and key in _ABSENT:
            raise ValueError(f"{_WHO}: {key} = {value!r} asks for {_ABSENT[key]}")
        if value and key not in _KNOWN:
            raise ValueError(f"{_WHO}: {key} = {value!r} is not known here")
    activation = settings.get("activation", "topk")
    if activation != "topk":
        raise ValueError(
            f"{_WHO}: activation {activation!r} is not known here; known is 'topk'"
        )
    missing = [name for name in ("d_in", "k") if name not in settings]
    if missing:
        raise ValueError(f"{_WHO}: cfg.json has no {', '.join(missing)}")
    dim = settings["d_in"]
    latents = settings.get("num_latents") or dim * settings.get("expansion_factor", 32)
    transcodes = bool(settings.get("transcode", False))
    return Config(
        architecture=TOPK.name,
        d_in=dim,
        d_sae=latents,
        d_out=dim if transcodes else None,
        k=settings["k"],
        apply_b_dec_to_input=not transcodes,
    )
