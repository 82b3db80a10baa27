"""Published dictionaries of every format, with what is known about them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toyfeat.dictionary.jump_relu import JUMP_RELU
from toyfeat.dictionary.standard import STANDARD
from toyfeat.dictionary.types import Config, Dictionary
from toyfeat.files.json import field, read_json
from toyfeat.files.safetensors import tensors_of
from toyfeat.interop import files
from toyfeat.interop.dictionary_learning import load_dictionary_learning
from toyfeat.interop.saelens import load_saelens, saelens_metadata
from toyfeat.interop.sparsify import load_sparsify
from toyfeat.types import Params

_WHO = "load_dictionary"
_SHOWN = 8  # files of a folder that a message lists
# Places in the names of Gemma Scope's folders, with hooks in TransformerLens' words.
_PLACES = {
    "resid_post": "hook_resid_post",
    "-res": "hook_resid_post",
    "attn": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
    "-mlp": "hook_mlp_out",
}


class Loaded(NamedTuple):
    """A dictionary of another library.

    Attributes:
      dictionary: its functions.
      params: its tensors, float32.
      metadata: what its files say about it: ``format``, and as far as known
        ``model_name`` and ``hook_name`` (:func:`toyfeat.interop.site_name`).
    """

    dictionary: Dictionary
    params: Params
    metadata: dict[str, Any]


def load_dictionary(path: str | Path, *, layer: int | None = None) -> Loaded:
    """Read a dictionary of any format that is known here; nothing is downloaded.

    ============================  ====================================================
    SAELens                       ``cfg.json``, ``sae_weights.safetensors``, also
                                  before version 6
    Gemma Scope                   ``params.npz``
    Gemma Scope 2                 ``params.safetensors``, with its affine skip
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

    Returns:
      :class:`Loaded`.

    Raises:
      FileNotFoundError: if there is no such folder, or no file of a format in it.
      ValueError: if a file is damaged, or is of a kind that is not known here.
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
    if not path.exists():
        raise FileNotFoundError(
            f"{_WHO}: there is no {path}; give a folder on this disk (of the hub: "
            "toyfeat fetch hub:OWNER/NAME/FOLDER says where it is)"
        )
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    names = {entry.name for entry in folder.iterdir()}
    for wanted, read in _READERS.items():
        if set(wanted) <= names and (file is None or file.name in wanted):
            return read(folder)
    # One file per layer.
    if file is not None:
        match = re.fullmatch(r"layer_(\d+)\.safetensors", file.name)
        layer = int(match[1]) if match else layer
    for wanted, read_layer in _LAYER_READERS.items():
        names_of_layer = {name.format(layer) for name in wanted}
        if layer is not None and names_of_layer <= names:
            return read_layer(folder, layer)
    listed = ", ".join(sorted(names)[:_SHOWN]) or "nothing"
    raise FileNotFoundError(
        f"{_WHO}: {folder} must have files of a known format"
        f"{'' if layer is None else f' for layer {layer}'}, it has {listed}; give the "
        "folder of one dictionary, or layer= where there is one file per layer"
    )


def _saelens(folder: Path) -> Loaded:
    about = saelens_metadata(folder)
    return Loaded(*load_saelens(folder), {"format": "SAELens", **about})


def _gemma_scope(folder: Path) -> Loaded:
    about = {"format": "Gemma Scope", **_scope_hook(folder)}
    return Loaded(*load_saelens(folder), about)


def _gemma_scope_2(folder: Path) -> Loaded:
    """Read JumpReLU codes whose tensors have lower-case names."""
    source = folder / "params.safetensors"
    stored = tensors_of(source, _WHO)
    named = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    tensors = {named.get(name, name): np.asarray(x) for name, x in stored.items()}
    # A transcoder, which the files do not name, reads one place and writes another.
    settings = folder / "config.json"
    known = read_json(settings, _WHO) if settings.exists() else {}
    place = str(known.get("hf_hook_point_out") or "") or str(folder.resolve())
    transcodes = "W_skip" in tensors or bool(known.get("hf_hook_point_out"))
    transcodes = transcodes or "transcoder" in place
    about = {"format": "Gemma Scope 2", **_scope_hook(folder)}
    about |= {k: known[k] for k in ("model_name",) if k in known}
    about |= {k: v for k, v in known.items() if k.startswith("hf_hook_point")}
    return _made(source, tensors, about, transcodes=transcodes)


def _scope_hook(folder: Path) -> dict[str, Any]:
    """Read the hook off the names of folders, as far as they say it."""
    text = str(folder.resolve())
    layer = re.search(r"layer_(\d+)", text)
    place = next((hook for part, hook in _PLACES.items() if part in text), None)
    if layer is None or place is None or "transcoder" in text:
        return {}
    return {"hook_name": f"blocks.{layer[1]}.{place}"}


def _llama_scope(folder: Path) -> Loaded:
    """Read JumpReLU codes of activations of mean length ``sqrt(D)``, scales folded.

    The encoder takes activations times ``sqrt(D) / mean length``; one threshold is for
    all latents, and scaled the same way, as in SAELens.
    """
    source = folder / "hyperparams.json"
    settings = read_json(source, _WHO)
    if settings.get("sparsity_include_decoder_norm") or settings.get("use_glu_encoder"):
        raise ValueError(
            f"{_WHO}: wanted plain JumpReLU codes, got sparsity_include_decoder_norm "
            f"or use_glu_encoder in {source}; load it with its own library"
        )
    norms = field(settings, "dataset_average_activation_norm", dict, source, _WHO)
    length = field(norms, "in", float, source, _WHO, low=0)
    threshold = field(settings, "jump_relu_threshold", float, source, _WHO)
    weights = folder / "checkpoints" / "final.safetensors"
    stored = {
        k: np.asarray(x, np.float32) for k, x in tensors_of(weights, _WHO).items()
    }
    missing = _missing(stored, ["encoder", "decoder"])
    if missing or length <= 0:
        raise ValueError(
            f"{_WHO}: {weights} must have weights and biases of encoder and decoder, "
            f"and a mean length above 0, got {sorted(stored)} and {length}; fetch it "
            "again"
        )
    encoder, decoder = stored["encoder.weight"].T, stored["decoder.weight"].T
    # Activations and reconstructions are in units in which their mean length is
    # sqrt(D): codes of x are those of s x, and what is written is divided by s.
    scale = float(np.sqrt(encoder.shape[0]) / length)
    tensors = {
        "W_enc": encoder * scale,
        "b_enc": stored["encoder.bias"],
        "W_dec": decoder / scale,
        "b_dec": stored["decoder.bias"] / scale,
        "threshold": np.full(encoder.shape[1], threshold * scale, np.float32),
    }
    about = {"format": "Llama Scope"}
    if isinstance(settings.get("hook_point_in"), str):
        about["hook_name"] = settings["hook_point_in"]
    return _made(weights, tensors, about, transcodes=False)


def _missing(stored: dict[str, Any], layers: list[str]) -> list[str]:
    """List what some linear layers of torch lack."""
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return [name for name in names if name not in stored]


def _transcoder(folder: Path, layer: int) -> Loaded:
    """Read a transcoder whose encoder is stored as ``[latents, D]``."""
    source = folder / f"layer_{layer}.safetensors"
    tensors = {k: np.asarray(x) for k, x in tensors_of(source, _WHO).items()}
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    if "W_skip" in tensors:  # as torch stores it, [out, in]
        tensors["W_skip"] = tensors["W_skip"].T
    about = {"format": "transcoder", **_config_yaml(folder, layer)}
    return _made(source, tensors, about, transcodes=True)


def _cross_layer(folder: Path, layer: int) -> Loaded:
    """Read one layer of a cross-layer transcoder, ``W_dec [latents, layers, D]``."""
    source = folder / f"W_dec_{layer}.safetensors"
    stored = dict(tensors_of(folder / f"W_enc_{layer}.safetensors", _WHO))
    stored |= tensors_of(source, _WHO)
    tensors = {
        name.removesuffix(f"_{layer}"): np.asarray(x, np.float32)
        for name, x in stored.items()
    }
    names = {"W_enc", "W_dec", "b_enc", "b_dec"}
    if not names <= set(tensors) or tensors["W_dec"].ndim != 3:
        shapes = {name: x.shape for name, x in tensors.items()}
        raise ValueError(
            f"{_WHO}: a cross-layer transcoder must have {sorted(names)} with W_dec of "
            f"[latents, layers, D], got {shapes}; others cannot be read"
        )
    # All layers that are written to are one output; the bias is of the first.
    latents, layers, width = tensors["W_dec"].shape
    tensors["W_enc"] = tensors["W_enc"].T
    tensors["W_dec"] = tensors["W_dec"].reshape(latents, layers * width)
    bias = np.zeros((layers, width), np.float32)
    bias[0] = tensors["b_dec"]
    tensors["b_dec"] = bias.reshape(-1)
    about = {"format": "cross-layer transcoder", **_config_yaml(folder, layer)}
    about["layers"] = list(range(layer, layer + layers))
    return _made(source, tensors, about, transcodes=True)


def _config_yaml(folder: Path, layer: int) -> dict[str, Any]:
    """Read the model and the hooks of a ``config.yaml``, which has a key per line."""
    source = folder / "config.yaml"
    if not source.is_file():
        return {}
    text = source.read_text(encoding="utf-8", errors="replace")
    pairs = dict(re.findall(r"(?m)^(\w+):[ \t]*[\"']?([^\"'\n#]+?)[\"']?[ \t]*$", text))
    about = {"model_name": pairs["model_name"]} if "model_name" in pairs else {}
    hooks = {"hook_name": "feature_input_hook", "hook_name_out": "feature_output_hook"}
    for name, key in hooks.items():
        if key in pairs:
            about[name] = f"blocks.{layer}.{pairs[key]}"
    return about


def _made(
    source: Path, tensors: dict[str, Any], about: dict[str, Any], *, transcodes: bool
) -> Loaded:
    """Make a dictionary of tensors: JumpReLU codes if there are thresholds."""
    shapes = {name: np.shape(x) for name, x in tensors.items()}
    needed = [shapes.get(name, ()) for name in ("W_enc", "W_dec")]
    if [len(shape) for shape in needed] != [2, 2]:
        raise ValueError(
            f"{_WHO}: {source} must have an encoder and a decoder as matrices, got "
            f"{shapes}; others cannot be read"
        )
    (dim, latents), (_, out) = needed
    architecture = JUMP_RELU if "threshold" in tensors else STANDARD
    config = Config(
        architecture=architecture.name,
        d_in=dim,
        d_sae=latents,
        d_out=out if transcodes or out != dim else None,
        apply_b_dec_to_input=False,
        **architecture.defaults,
    )
    made = files.dictionary_of(architecture, config, tensors, _WHO, source)
    return Loaded(*made, about)


def _sparsify(folder: Path) -> Loaded:
    return Loaded(*load_sparsify(folder), {"format": "sparsify"})


def _dictionary_learning(folder: Path) -> Loaded:
    return Loaded(*load_dictionary_learning(folder), {"format": "dictionary_learning"})


_READERS: dict[tuple[str, ...], Callable[[Path], Loaded]] = {
    ("cfg.json", "sae_weights.safetensors"): _saelens,
    ("params.npz",): _gemma_scope,
    ("params.safetensors",): _gemma_scope_2,
    ("hyperparams.json", "checkpoints"): _llama_scope,
    ("sae.safetensors",): _sparsify,
    ("ae.pt",): _dictionary_learning,
}
_LAYER_READERS: dict[tuple[str, ...], Callable[[Path, int], Loaded]] = {
    ("layer_{}.safetensors",): _transcoder,
    ("W_enc_{}.safetensors", "W_dec_{}.safetensors"): _cross_layer,
}
