"""Dictionaries from the files of sparsify."""

import reprlib
from pathlib import Path

import numpy as np

from toyfeat.dictionary.topk import TOPK
from toyfeat.dictionary.types import Config, Dictionary
from toyfeat.files.json import check_keys, field
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
_FACTOR = 32  # the default of sparsify's expansion_factor
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
    folder = files.open_folder(_WHO, path, "cfg.json", "sae.safetensors")
    config = _config(folder)
    state = tensors_of(folder.weights, _WHO)
    if set(state) != set(_NAMES):
        raise ValueError(
            f"{_WHO}: wanted tensors {sorted(_NAMES)} in {folder.weights}, got "
            f"{reprlib.repr(sorted(state))}"
        )
    tensors = {ours: np.asarray(state[theirs]) for theirs, ours in _NAMES.items()}
    # A linear layer of torch stores its matrix as [out, in].
    tensors["W_enc"] = tensors["W_enc"].T
    return files.dictionary_of(TOPK, config, tensors, _WHO, folder.weights)


def _config(folder: files.Files) -> Config:
    """Make a configuration from sparsify's settings."""
    # What is asked for and is not here, then keys that are not known at all.
    settings, source = folder.settings, folder.source
    for key, value in settings.items():
        if value and key in _ABSENT:
            raise ValueError(
                f"{_WHO}: {key} = {reprlib.repr(value)} asks for {_ABSENT[key]}; it is "
                f"in {source}"
            )
    for key in ("multi_topk", "normalize_decoder"):  # which change nothing here
        field(settings, key, bool, source, _WHO, default=False)
    check_keys(settings, _KNOWN, source, _WHO, ignore_off=True)
    activation = settings.get("activation", "topk")
    if activation != "topk":
        raise ValueError(
            f"{_WHO}: activation {reprlib.repr(activation)} is not known here; "
            f"known is 'topk', another one is in {source}"
        )
    dim = field(settings, "d_in", int, source, _WHO, low=1)
    # Latents by number, or, without one, by a multiple of the width.
    latents = field(settings, "num_latents", int, source, _WHO, low=0, default=0)
    factor = field(
        settings, "expansion_factor", int, source, _WHO, low=1, default=_FACTOR
    )
    transcodes = field(settings, "transcode", bool, source, _WHO, default=False)
    return Config(
        architecture=TOPK.name,
        d_in=dim,
        d_sae=latents or dim * factor,
        d_out=dim if transcodes else None,
        k=field(settings, "k", int, source, _WHO, low=1),
        apply_b_dec_to_input=not transcodes,
    )
