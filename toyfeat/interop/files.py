"""Reading, checking and replacing files of dictionaries, for every library."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.base import make_dictionary
from toyfeat.dictionary.types import Architecture, Config, Dictionary
from toyfeat.files.json import field, list_field, read_json
from toyfeat.files.tensors import finite_tensors
from toyfeat.types import Params

_READERS = {
    "sae_weights.safetensors": "load_saelens",
    "sae.safetensors": "load_sparsify",
    "ae.pt": "load_dictionary_learning",
    "params.npz": "load_saelens",
}
_DEFAULTS = Config._field_defaults
_KINDS: dict[str, type] = {
    **dict.fromkeys(("d_in", "d_sae", "d_out", "k"), int),
    **dict.fromkeys(("rescale_acts_by_decoder_norm", "apply_b_dec_to_input"), bool),
    **dict.fromkeys(("bandwidth", "gradient_weight"), float),
}
_MAX_SIZE = 2**31 - 1  # JAX indexes arrays by int32
_MAX_LISTED = 6  # files in a message, about what a person reads


class Files(NamedTuple):
    """Files of a dictionary.

    Attributes:
      settings: values of the JSON file.
      source: path of the JSON file.
      weights: path of the weights.
    """

    settings: dict[str, Any]
    source: Path
    weights: Path


def open_folder(who: str, path: str | Path, settings: str, weights: str) -> Files:
    """Read the object in a JSON file of a folder, and find the weights beside it.

    Args:
      who: the function, for messages.
      path: the folder.
      settings: name of the JSON file.
      weights: name of the file of weights.

    Returns:
      :class:`Files`.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if the settings are not a JSON object.
    """
    folder = Path(path)
    for name in (settings, weights):
        if not (folder / name).exists():
            raise FileNotFoundError(_missing(who, folder, name))
    source = folder / settings
    return Files(read_json(source, who), source, folder / weights)


def _missing(who: str, folder: Path, name: str) -> str:
    """Say that a file is missing, what is there instead, and what to do."""
    # Likely reasons in order: no folder, a save that was cut off, another library's.
    text = f"{who}: there is no {folder / name}"
    if not folder.is_dir():
        return (
            f"{text}; give a folder on this disk. Of the Hugging Face hub: fetch it "
            "first, hf download OWNER/NAME --local-dir FOLDER"
        )
    if (folder / f".{name}.old").exists():
        return f"{text}; a save was cut off here, save again"
    names = sorted(path.name for path in folder.iterdir())
    readers = [reader for file, reader in _READERS.items() if file in names]
    if name not in readers and readers and readers[0] != who:
        return f"{text}; this folder is one for {readers[0]}"
    listed = ", ".join(names[:_MAX_LISTED]) or "nothing"
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return f"{text}, the folder has {listed}{more}; give the folder that has it"


def config_field(values: dict[str, Any], name: str, source: Path, who: str) -> Any:
    """Look up a field of :class:`toyfeat.dictionary.types.Config` in settings.

    Returns:
      The value, as its type, or the default of the field.

    Raises:
      ValueError: if it is of another type or out of range, or missing and required.
    """
    # Sizes are required, all else has the default of the configuration.
    options = {} if name in ("d_in", "d_sae") else {"default": _DEFAULTS[name]}
    if name == "matryoshka_widths":
        widths = list_field(values, name, int, source, who, low=1, high=_MAX_SIZE)
        return tuple(widths)
    kind = _KINDS[name]
    bounds: dict[str, float] = {}
    if kind is int:
        bounds = {"low": 1, "high": _MAX_SIZE}
    elif kind is float:
        bounds = {"low": 0}
    return field(values, name, kind, source, who, **options, **bounds)


def dictionary_of(
    architecture: Architecture,
    config: Config,
    tensors: dict[str, Any],
    who: str,
    source: Path,
) -> tuple[Dictionary, Params]:
    """Make the dictionary of a configuration, with its tensors as float32.

    Args:
      architecture: of the dictionary.
      config: its settings.
      tensors: its tensors.
      who: the function, for messages.
      source: the file of the tensors, for messages.

    Raises:
      ValueError: if the configuration does not fit, or tensors are missing, too many,
        of other shapes, not real numbers or not finite.
    """
    try:
        dictionary = make_dictionary(architecture, config)
    except ValueError as error:
        raise ValueError(f"{who}: {source.parent}: {error}") from error
    check_tensors(dictionary, tensors, f"{who}: {source}")
    arrays = finite_tensors(tensors, source, who)
    return dictionary, {name: jnp.asarray(x) for name, x in arrays.items()}


def check_tensors(dictionary: Dictionary, tensors: dict[str, Any], who: str) -> None:
    """Check the names and shapes of the tensors of a dictionary.

    Raises:
      ValueError: if tensors are missing, too many or of other shapes.
    """
    start = jax.eval_shape(dictionary.init, jax.random.key(0))
    wanted = {name: x.shape for name, x in start.items()}
    shapes = {name: tuple(np.shape(x)) for name, x in tensors.items()}
    # Gradients may be compared in units of their own, of any number of readouts.
    scale = shapes.get("grad_scale", ())
    if dictionary.architecture.reads_gradients and len(scale) == 1:
        wanted["grad_scale"] = scale
    if "W_skip" in shapes and dictionary.config.d_out is not None:
        wanted["W_skip"] = (dictionary.config.d_in, dictionary.config.d_out)
    if shapes != wanted:
        raise ValueError(
            f"{who}: {dictionary.architecture.name} wants tensors {wanted}, got "
            f"{shapes}"
        )


def checked_tensors(
    dictionary: Dictionary, params: Params, who: str
) -> dict[str, np.ndarray]:
    """Return parameters as float32, or refuse what SAELens could not read.

    Args:
      dictionary: what the parameters belong to.
      params: its parameters.
      who: name of the function, for errors.

    Raises:
      ValueError: for a linear path, other tensors than the dictionary's, or NaN.
    """
    tensors = {name: np.asarray(x, np.float32) for name, x in params.items()}
    if "W_skip" in tensors:
        raise ValueError(
            f"{who}: wanted codes alone, got a linear path beside them (W_skip); "
            "keep the published files, or write the tensors with toyfeat.save_tree"
        )
    check_tensors(dictionary, tensors, who)
    if bad := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(
            f"{who}: {', '.join(bad)} must be finite; the training diverged"
        )
    return tensors
