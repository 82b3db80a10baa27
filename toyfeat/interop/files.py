"""What reading and writing dictionaries of every library have in common."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.coding import BY_BATCH, BY_GRADIENTS, of_config
from toyfeat.dictionary.paired import paired
from toyfeat.types import Dictionary, DictionaryConfig, Params

BANDWIDTH = 0.05
"""Of a threshold's derivative, where the files do not tell it."""


def settings_and_weights(
    who: str, path: str | Path, settings: str, weights: str
) -> tuple[dict[str, Any], Path]:
    """The object in a JSON file of a folder, and where the weights beside it are.

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
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{who}: {folder / settings} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{who}: wanted an object in {folder / settings}, got {text[:80]!r}"
        )
    return found, folder / weights


def loaded(
    config: DictionaryConfig, tensors: dict[str, Any], who: str
) -> tuple[Dictionary, Params]:
    """The dictionary of a configuration with its tensors, float32."""
    if config.architecture == "paired":
        assert config.k is not None  # whose files have it
        dictionary = paired(config.d_in, config.d_sae, config.k)
    else:
        dictionary = of_config(config)
    check(config, tensors, who)
    return dictionary, {k: jnp.asarray(v, jnp.float32) for k, v in tensors.items()}


def check(config: DictionaryConfig, tensors: dict[str, Any], who: str) -> None:
    """Raises a ValueError if tensors are missing, too many or of other shapes."""
    dim, latents = config.d_in, config.d_sae
    out = dim if config.d_out is None else config.d_out
    wanted = {"W_enc": (dim, latents), "W_dec": (latents, out), "b_dec": (out,)}
    names = {
        "gated": ("b_gate", "b_mag", "r_mag"),
        "jumprelu": ("b_enc", "threshold"),
    }.get(config.architecture, ("b_enc",))
    wanted |= {name: (latents,) for name in names}
    if config.architecture in BY_BATCH:
        wanted["topk_threshold"] = ()
    if config.architecture == "paired":
        wanted |= {"W_read": (latents, dim), "P": (dim, latents)}
    found = {name: tuple(np.shape(x)) for name, x in tensors.items()}
    scale = found.get("grad_scale", ())  # of as many readouts as there were
    if config.architecture in BY_GRADIENTS and len(scale) == 1:
        wanted["grad_scale"] = scale
    if found != wanted:
        raise ValueError(
            f"{who}: {config.architecture} wants tensors {wanted}, got {found}"
        )


def replace(
    folder: Path,
    writers: dict[str, Callable[[Path], object]],
    gone: tuple[str, ...] = (),
) -> None:
    """Files of a folder, written beside the old ones, which go when all are whole.

    Args:
      folder: made if it is not there.
      writers: file name to what writes that file at a path; the order of the
        names is the order in which the files appear.
      gone: names of files that are removed when all are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.part" for name in writers}
    try:
        for name, write in writers.items():
            write(parts[name])
        for name, part in parts.items():
            os.replace(part, folder / name)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
