"""Published dictionaries of every format, with what is known about them."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from toyfeat.checks import check_int
from toyfeat.dictionary.types import Architecture
from toyfeat.interop.dictionary_learning import load_dictionary_learning
from toyfeat.interop.gemma_scope import load_first, load_second, load_second_layer
from toyfeat.interop.llama_scope import load_llama_scope
from toyfeat.interop.loaded import WHO, Loaded
from toyfeat.interop.saelens import load_saelens, saelens_metadata
from toyfeat.interop.sparsify import load_sparsify
from toyfeat.interop.transcoders import load_cross_layer, load_transcoder

_LAYER_FILE = r"(?:params_layer|layer|W_enc|W_dec)_(\d{1,4})\.safetensors"
_SHOWN = 8  # files of a folder that a message lists


def load_dictionary(
    path: str | Path,
    *,
    layer: int | None = None,
    architectures: Sequence[Architecture] = (),
) -> Loaded:
    """Read a dictionary of any format that is known here; nothing is downloaded.

    ============================  ====================================================
    SAELens                       ``cfg.json``, ``sae_weights.safetensors``, also
                                  before version 6
    Gemma Scope                   ``params.npz``
    Gemma Scope 2                 ``params.safetensors``, with its affine skip;
                                  ``params_layer_<i>.safetensors``, a layer of a
                                  cross-layer transcoder
    Llama Scope                   ``hyperparams.json``,
                                  ``checkpoints/final.safetensors``
    transcoders (circuit-tracer)  ``layer_<i>.safetensors``: the file, or the folder and
                                  ``layer``
    cross-layer transcoders       ``W_enc_<i>.safetensors``, ``W_dec_<i>.safetensors``:
                                  the folder and ``layer``
    sparsify                      ``cfg.json``, ``sae.safetensors``
    dictionary_learning           ``config.json``, ``ae.pt``
    ============================  ====================================================

    A layer of a cross-layer transcoder writes to its own MLP and to those of later
    layers.  Its reconstruction is all that it writes, ``[N, layers * D]``, its own
    layer first; what a layer writes at all is the sum over the layers before it.

    Args:
      path: a folder, or a file of it.
      layer: of a folder with one file per layer.
      architectures: records of your own architectures, as in :func:`load_saelens`.

    Returns:
      :class:`Loaded`.

    Raises:
      FileNotFoundError: if there is no such folder, or no file of a format in it.
      ValueError: if a file is damaged, or is of a kind that is not known here.
      TypeError: if ``layer`` is no number.
      ImportError: without safetensors (``pip install "toyfeat[sae]"``).

    Example:
      >>> import jax, tempfile
      >>> import toyfeat as ft
      >>> sae = ft.dictionaries.standard(4, 16)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ft.interop.save_saelens(
      ...         folder, sae, sae.init(jax.random.key(0)),
      ...         metadata={"hook_name": "blocks_3/resid_post"},
      ...     )
      ...     loaded = ft.interop.load_dictionary(folder)
      >>> loaded.metadata["format"], loaded.metadata["hook_name"]
      ('SAELens', 'blocks.3.hook_resid_post')
    """
    path = Path(path)
    if layer is not None:
        layer = check_int(WHO, "layer", layer, least=0, about=", or None")
    if not path.exists():
        raise FileNotFoundError(
            f"{WHO}: there is no {path}; give a folder on this disk (of the hub: "
            "toyfeat fetch hub:OWNER/NAME/FOLDER says where it is)"
        )
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    names = {entry.name for entry in folder.iterdir()}
    readers = {_SAELENS: partial(_saelens, architectures=architectures), **_READERS}
    for wanted, read in readers.items():
        if set(wanted) <= names and (file is None or file.name in wanted):
            return read(folder)
    # One file per layer.
    if file is not None:
        match = re.fullmatch(_LAYER_FILE, file.name)
        layer = int(match[1]) if match else layer
    for wanted, read_layer in _LAYER_READERS.items():
        names_of_layer = {name.format(layer) for name in wanted}
        if layer is not None and names_of_layer <= names:
            return read_layer(folder, layer)
    listed = ", ".join(sorted(names)[:_SHOWN]) or "nothing"
    raise FileNotFoundError(
        f"{WHO}: {folder} must have files of a known format"
        f"{'' if layer is None else f' for layer {layer}'}, it has {listed}; give the "
        "folder of one dictionary, or layer= where there is one file per layer"
    )


def _saelens(folder: Path, architectures: Sequence[Architecture]) -> Loaded:
    about = {"format": "SAELens", **saelens_metadata(folder)}
    return Loaded(*load_saelens(folder, architectures=architectures), about)


def _sparsify(folder: Path) -> Loaded:
    return Loaded(*load_sparsify(folder), {"format": "sparsify"})


def _dictionary_learning(folder: Path) -> Loaded:
    return Loaded(*load_dictionary_learning(folder), {"format": "dictionary_learning"})


_SAELENS = ("cfg.json", "sae_weights.safetensors")
_READERS: dict[tuple[str, ...], Callable[[Path], Loaded]] = {
    ("params.npz",): load_first,
    ("params.safetensors",): load_second,
    ("hyperparams.json", "checkpoints"): load_llama_scope,
    ("sae.safetensors",): _sparsify,
    ("ae.pt",): _dictionary_learning,
}
_LAYER_READERS: dict[tuple[str, ...], Callable[[Path, int], Loaded]] = {
    ("layer_{}.safetensors",): load_transcoder,
    ("params_layer_{}.safetensors",): load_second_layer,
    ("W_enc_{}.safetensors", "W_dec_{}.safetensors"): load_cross_layer,
}
