"""What SAELens' files have no place for: in a file beside them and in metadata.

:func:`toyfeat.gradient_topk` and :func:`toyfeat.paired` are ``topk`` to SAELens.
Tensors it does not know go to ``toyfeat.safetensors``; ``cfg.json`` holds what the
dictionary was and the digest of all of its tensors, so that a file that is left from
another dictionary is never taken for this one's.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.data.tensors import tensors_of
from toyfeat.dictionary.coding import BY_GRADIENTS
from toyfeat.types import DictionaryConfig

NAME = "toyfeat.safetensors"
_TENSORS = ("W_read", "P", "grad_scale")
_DIGEST, _WEIGHT = "tensors_sha256", "gradient_weight"


def apart(
    config: DictionaryConfig, tensors: dict[str, np.ndarray]
) -> tuple[DictionaryConfig, dict[str, np.ndarray], dict[str, Any]]:
    """The ``topk`` that SAELens sees, tensors that it does not, and metadata.

    A paired dictionary compares codes times the lengths of their rows, which is what
    ``rescale_acts_by_decoder_norm`` does.
    """
    if config.architecture not in BY_GRADIENTS:
        return config, {}, {}
    plain = config._replace(architecture="topk", gradient_weight=0.0)
    about: dict[str, Any] = {_WEIGHT: config.gradient_weight}
    if config.architecture == "paired":
        plain, about = plain._replace(rescale_acts_by_decoder_norm=True), {}
    extra = {name: tensors[name] for name in _TENSORS if name in tensors}
    if extra:
        about[_DIGEST] = digest(tensors)
    return plain, extra, {"training_architecture_details": about}


def together(
    folder: Path,
    config: DictionaryConfig,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any],
) -> tuple[DictionaryConfig, dict[str, np.ndarray]]:
    """What :func:`apart` was given; files that it did not make stay as they are.

    Raises:
      FileNotFoundError: if the file beside is missing.
      ValueError: if it or the weights are of another dictionary.
    """
    name = metadata.get("training_architecture")
    about = metadata.get("training_architecture_details")
    about = about if isinstance(about, dict) else {}
    if name not in BY_GRADIENTS or not set(about) & {_DIGEST, _WEIGHT}:
        return config, tensors
    full = config._replace(architecture=name, gradient_weight=about.get(_WEIGHT, 0.0))
    if name == "paired":
        full = DictionaryConfig(name, config.d_in, config.d_sae, k=config.k)
    way_out = (
        "save the dictionary again, or, to read what SAELens reads, take "
        "training_architecture out of the metadata in cfg.json"
    )
    if _DIGEST in about:
        if not (folder / NAME).exists():
            raise FileNotFoundError(
                f"load_saelens: there is no {folder / NAME}, which holds tensors of "
                f"this {name} dictionary that SAELens does not know; {way_out}"
            )
        tensors = tensors | tensors_of(folder / NAME, "load_saelens")
    same = _DIGEST not in about or about[_DIGEST] == digest(tensors)
    if not same or apart(full, tensors)[0] != config:
        raise ValueError(
            f"load_saelens: the files in {folder} are not of one {name} dictionary: "
            f"weights or settings were changed after it was saved; {way_out}"
        )
    return full, tensors


def digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes and float32 values, however they are laid out."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], np.dtype("<f4"))
        sha.update(f"{name} {values.shape}\n".encode())
        sha.update(values.data)
    return sha.hexdigest()
