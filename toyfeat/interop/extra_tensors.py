"""Tensors and settings that SAELens' files have no place for.

An architecture may be another one to SAELens (:class:`toyfeat.dictionary.SavedAs`).
Tensors that SAELens does not know go to a file of their own; ``cfg.json`` holds the
settings and the digest of all tensors in its metadata, so that a file that is left
from another dictionary is never taken for this one's.
"""

import hashlib
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.types import Architecture, Config, SavedAs
from toyfeat.files.json import field
from toyfeat.files.safetensors import tensors_of
from toyfeat.interop.files import config_field

FILE = "toyfeat.safetensors"
"""Name of the file of the tensors that SAELens does not know."""

_DETAILS = "training_architecture_details"
_DIGEST = "tensors_sha256"
_DEFAULTS = Config._field_defaults
_WHO = "load_saelens"
_WAY_OUT = (
    "save the dictionary again, or, to read what SAELens reads, take "
    "training_architecture out of the metadata in cfg.json"
)


def split_extra(
    architecture: Architecture,
    saved_as: SavedAs,
    config: Config,
    tensors: dict[str, np.ndarray],
) -> tuple[Config, dict[str, np.ndarray], dict[str, Any]]:
    """Split a dictionary into what SAELens reads and what it does not know.

    Args:
      architecture: of the dictionary.
      saved_as: how it is saved.
      config: its configuration.
      tensors: all of its tensors.

    Returns:
      The configuration that SAELens reads, the tensors that it does not know, and
      metadata from which :func:`join_extra` restores the rest.
    """
    if saved_as.fold is not None or saved_as.architecture == architecture.name:
        return config, {}, {}
    plain = _as_saelens(saved_as, config)
    details = {name: getattr(config, name) for name in saved_as.metadata}
    extra = {name: tensors[name] for name in saved_as.extra_tensors if name in tensors}
    if extra or not details:
        details[_DIGEST] = digest(tensors)
    return plain, extra, {_DETAILS: details}


def join_extra(
    source: Path,
    config: Config,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any],
    known: dict[str, Architecture],
) -> tuple[Config, dict[str, np.ndarray]]:
    """Put together what :func:`split_extra` was given.

    Files that it did not make stay as they are.

    Args:
      source: path of ``cfg.json``.
      config: from ``cfg.json``.
      tensors: from SAELens' file.
      metadata: from ``cfg.json``.
      known: architectures by name.

    Returns:
      The configuration and all tensors.

    Raises:
      FileNotFoundError: if the file of the extra tensors is missing.
      ValueError: if it or the weights are of another dictionary, of an architecture
        that is not known, or a setting is of another type.
    """
    name = field(metadata, "training_architecture", str, source, _WHO, default=None)
    details = field(metadata, _DETAILS, dict, source, _WHO, default=None) or {}
    saved_as = _split_form(source, name, details, known)
    if name is None or saved_as is None:
        return config, tensors
    # The configuration that was saved: its settings are in the metadata, what SAELens
    # was told instead is a default.
    full = config._replace(
        architecture=name,
        **{key: config_field(details, key, source, _WHO) for key in saved_as.metadata},
        **{key: _DEFAULTS[key] for key in saved_as.overrides},
    )
    # All of its tensors; those of SAELens' file are all if the digest is theirs.
    saved_digest = field(details, _DIGEST, str, source, _WHO, default=None)
    extra_file = source.parent / FILE
    is_whole = saved_digest in (None, digest(tensors))
    if not is_whole:
        if not extra_file.exists():
            raise FileNotFoundError(
                f"{_WHO}: there is no {extra_file}, which holds tensors of this {name} "
                f"dictionary that SAELens does not know; {_WAY_OUT}"
            )
        tensors = tensors | tensors_of(extra_file, _WHO)
        is_whole = saved_digest == digest(tensors)
    # Files of two dictionaries have another digest, or other settings.
    if not is_whole or _as_saelens(saved_as, full) != config:
        raise ValueError(
            f"{_WHO}: the files in {source.parent} are not of one {name} dictionary: "
            f"weights or settings were changed after it was saved; {_WAY_OUT}"
        )
    return full, tensors


def _split_form(
    source: Path,
    name: str | None,
    details: dict[str, Any],
    known: dict[str, Architecture],
) -> SavedAs | None:
    """Look up how a dictionary was split, ``None`` if it was not.

    Raises:
      ValueError: if it was, and its architecture or its settings are not known.
    """
    architecture = known.get(name or "")
    if architecture is None and name is not None and _DIGEST in details:
        raise ValueError(
            f"{_WHO}: the files in {source.parent} are of the architecture "
            f"{reprlib.repr(name)}, "
            "which is not known here; pass its record, architectures=(...,)"
        )
    saved_as = None if architecture is None else architecture.saved_as
    if saved_as is None or saved_as.fold is not None or saved_as.architecture == name:
        return None
    if not set(details) & {_DIGEST, *saved_as.metadata}:
        raise ValueError(
            f"{_WHO}: {_DETAILS} in {source} must have the settings of this {name} "
            f"dictionary, got {details}; {_WAY_OUT}"
        )
    return saved_as


def _as_saelens(saved_as: SavedAs, config: Config) -> Config:
    return config._replace(
        architecture=saved_as.architecture,
        **{name: _DEFAULTS[name] for name in saved_as.metadata},
        **saved_as.overrides,
    )


def digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes and float32 values of tensors in any order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], np.dtype("<f4"))
        sha.update(f"{name} {values.shape}\n".encode())
        sha.update(values.data)
    return sha.hexdigest()
