"""Reading, checking and replacing files of dictionaries, for every library."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.base import make_dictionary
from toyfeat.dictionary.types import Architecture, Config, Dictionary
from toyfeat.types import Params


def settings_and_weights(
    who: str, path: str | Path, settings: str, weights: str
) -> tuple[dict[str, Any], Path]:
    """Read the object in a JSON file of a folder, and find the weights beside it.

    Args:
      who: the function, for messages.
      path: the folder.
      settings: name of the JSON file.
      weights: name of the file of weights.

    Returns:
      The object, and the path of the weights.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if the settings are not a JSON object.
    """
    folder = Path(path)
    for name in (settings, weights):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{who}: there is no {folder / name}")
    text = (folder / settings).read_text(encoding="utf-8")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{who}: {folder / settings} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{who}: wanted an object in {folder / settings}, got {text[:80]!r}"
        )
    return values, folder / weights


def dictionary_of(
    architecture: Architecture, config: Config, tensors: dict[str, Any], who: str
) -> tuple[Dictionary, Params]:
    """Make the dictionary of a configuration, with its tensors as float32.

    Raises:
      ValueError: if the configuration does not fit, or tensors are missing, too many
        or of other shapes.
    """
    try:
        dictionary = make_dictionary(architecture, config)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
    check_tensors(dictionary, tensors, who)
    params = {name: jnp.asarray(x, jnp.float32) for name, x in tensors.items()}
    return dictionary, params


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
    if shapes != wanted:
        raise ValueError(
            f"{who}: {dictionary.architecture.name} wants tensors {wanted}, got "
            f"{shapes}"
        )


def replace(
    folder: Path,
    writers: dict[str, Callable[[Path], object]],
    obsolete: tuple[str, ...] = (),
) -> None:
    """Replace files of a folder when all of the new ones are written.

    Args:
      folder: made if it does not exist.
      writers: file name to what writes that file at a path; the order of the
        names is the order in which the files appear.
      obsolete: names of files that are removed at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.part" for name in writers}
    try:
        for name, write in writers.items():
            write(parts[name])
        for name, part in parts.items():
            os.replace(part, folder / name)
        for name in obsolete:
            (folder / name).unlink(missing_ok=True)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
