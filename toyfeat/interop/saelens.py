"""Dictionaries to and from the files of SAELens."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.data.tensors import library, tensors_of
from toyfeat.dictionary.coding import BY_BATCH, BY_EXAMPLE
from toyfeat.interop import beside, files
from toyfeat.types import Dictionary, DictionaryConfig, Params

_VERSION = "6.54.12"  # whose format this is; versions below 6 are read otherwise
_READ = ("standard", "topk", "abstopk", "jumprelu", "gated")


def save_saelens(
    path: str | Path,
    dictionary: Dictionary,
    params: Params,
    *,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a dictionary as ``SAE.load_from_disk`` of SAELens reads it.

    As SAELens does, :func:`toyfeat.batch_topk` and :func:`toyfeat.matryoshka` are
    saved as the ``jumprelu`` they are after training, the lengths of their
    decoder's rows folded in.  :func:`toyfeat.gradient_topk` and
    :func:`toyfeat.paired` are ``topk`` to SAELens, which does without gradients;
    what it has no tensor for (``W_read``, ``P``, ``grad_scale``) goes to
    ``toyfeat.safetensors`` beside, and :func:`load_saelens` gives them back whole.
    ``metadata["training_architecture"]`` names what they were.  Codes of a paired
    dictionary are, in SAELens, in units of what they add
    (``rescale_acts_by_decoder_norm``); its reconstructions are the same.

    Args:
      path: a folder, made if it is not there; ``toyfeat.safetensors`` (removed if
        there is nothing for it), ``sae_weights.safetensors`` and ``cfg.json`` in it
        are replaced, in that order and only when all are written, so that a failure
        leaves an older dictionary as it was.
      dictionary: what the parameters belong to.
      params: after training from :func:`toyfeat.folded`, in the units of the
        activations.
      metadata: JSON values such as ``model_name`` and ``hook_name``; the version, the
        training's architecture and its details are set here.

    Raises:
      ValueError: if the parameters are not those of the dictionary or not finite, or
        SAELens has no such architecture (a linear one, a transcoder with top-k codes).
      ImportError: without safetensors (``pip install "toyfeat[sae]"``).

    References:
      SAELens 6, ``save_inference_model``.
    """
    save_file = library("save_saelens").save_file
    _check_known(dictionary.config)
    tensors = {name: np.asarray(x, np.float32) for name, x in params.items()}
    files.check(dictionary.config, tensors, "save_saelens")
    if bad := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(
            f"save_saelens: {', '.join(bad)} must be finite; the training diverged"
        )
    config, extra, about = beside.apart(dictionary.config, tensors)
    about["training_architecture"] = dictionary.config.architecture
    tensors = {name: x for name, x in tensors.items() if name not in extra}
    name = config.architecture
    if name in BY_BATCH:
        tensors, name = _folded(config, tensors), "jumprelu"
    settings = _settings(config, name, {**(metadata or {}), **about})
    text = json.dumps(settings, indent=1) + "\n"
    writers = {
        "sae_weights.safetensors": lambda part: save_file(_flat(tensors), part),
        "cfg.json": lambda part: part.write_text(text, encoding="utf-8"),
    }
    if extra:
        writers = {beside.NAME: lambda part: save_file(_flat(extra), part)} | writers
    files.replace(Path(path), writers, () if extra else (beside.NAME,))


def load_saelens(path: str | Path) -> tuple[Dictionary, Params]:
    """Read a dictionary that SAELens 6 or :func:`save_saelens` wrote.

    What :func:`save_saelens` wrote is given back as it was, but for
    :func:`toyfeat.batch_topk` and :func:`toyfeat.matryoshka`, which are
    :func:`toyfeat.jump_relu` now.

    Args:
      path: the folder with ``cfg.json``, ``sae_weights.safetensors`` and, where there
        is more than SAELens knows, ``toyfeat.safetensors``.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if the architecture or a setting is not known here, the format is
        older than 6, tensors are missing or of other shapes, or
        ``toyfeat.safetensors`` does not belong to the weights.
      ImportError: without safetensors.

    Example:
      >>> import jax, tempfile
      >>> from toyfeat import standard
      >>> sae = standard(4, 16)
      >>> params = sae.init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_saelens(folder, sae, params)
      ...     again, same = load_saelens(folder)
      >>> again.config == sae.config, bool((same["W_dec"] == params["W_dec"]).all())
      (True, True)
    """
    settings, weights = files.settings_and_weights(
        "load_saelens", path, "cfg.json", "sae_weights.safetensors"
    )
    metadata = settings.get("metadata") or {}
    version = str(metadata.get("sae_lens_version", "0"))
    if int(version.split(".")[0]) < 6:
        raise ValueError(
            f"load_saelens: wanted the format of SAELens 6 or newer, {path} says "
            f"{version}; load it with SAELens and save it again"
        )
    tensors = tensors_of(weights, "load_saelens")
    config = _config(settings)
    config, tensors = beside.together(Path(path), config, tensors, metadata)
    return files.loaded(config, tensors, "load_saelens")


def _config(settings: dict[str, Any]) -> DictionaryConfig:
    full = str(settings.get("architecture"))
    name = full.removesuffix("_transcoder") if full != "transcoder" else "standard"
    out = settings["d_out"] if "transcoder" in full else None
    for key in ("normalize_activations", "reshape_activations"):
        if settings.get(key, "none") not in ("none", None):
            raise ValueError(
                f"load_saelens: {key} = {settings[key]!r} is not known here; fold it "
                "into the weights with SAELens first"
            )
    if name not in _READ or (name == "gated" and out is not None):
        raise ValueError(
            f"load_saelens: architecture {full!r} is not known here; known are "
            f"{', '.join(_READ)}, and transcoders of all but gated"
        )
    sizes = settings["d_in"], settings["d_sae"]
    return DictionaryConfig(
        name,
        *sizes,
        d_out=out,
        k=settings.get("k"),
        rescale_acts_by_decoder_norm=settings.get(
            "rescale_acts_by_decoder_norm", False
        ),
        apply_b_dec_to_input=settings.get("apply_b_dec_to_input", out is None),
        bandwidth=files.BANDWIDTH if name == "jumprelu" else 0.0,
    )


def _check_known(config: DictionaryConfig) -> None:
    """Raises a ValueError if SAELens has no such architecture."""
    name = config.architecture
    if name == "linear":
        raise ValueError(
            "save_saelens: SAELens has no linear architecture; write the parameters, "
            "or the basis they are from, with toyfeat.save_tree"
        )
    if config.d_out is not None and name not in ("standard", "jumprelu", *BY_BATCH):
        name = "topk" if name == "gradient_topk" else name
        raise ValueError(f"save_saelens: SAELens has no {name}_transcoder")


def _flat(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def _settings(
    config: DictionaryConfig, name: str, metadata: dict[str, Any]
) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if name in BY_EXAMPLE:
        rescale = config.rescale_acts_by_decoder_norm
        more = {"k": config.k, "rescale_acts_by_decoder_norm": rescale}
    if config.d_out is not None:
        name = "transcoder" if name == "standard" else f"{name}_transcoder"
        more["d_out"] = config.d_out
    return {
        "architecture": name,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **more,
        "metadata": {**metadata, "sae_lens_version": _VERSION},
    }


def _folded(config: DictionaryConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    norm = np.ones(config.d_sae, np.float32)
    if config.rescale_acts_by_decoder_norm:
        norm = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
        norm = np.where(norm > 0, norm, 1).astype(np.float32)
    return {
        "W_enc": tensors["W_enc"] * norm[None, :],
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
        "b_dec": tensors["b_dec"],
        "threshold": np.full(config.d_sae, tensors["topk_threshold"], np.float32),
    }
