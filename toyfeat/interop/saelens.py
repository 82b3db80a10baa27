"""Dictionaries to and from the files of SAELens."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.coding import BY_BATCH, BY_EXAMPLE
from toyfeat.interop import files
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
    decoder's rows folded in, and :func:`toyfeat.gradient_topk` as ``topk``;
    ``metadata["training_architecture"]`` names what they were.

    Args:
      path: a folder, made if it is not there; ``sae_weights.safetensors`` and
        ``cfg.json`` in it are replaced, in that order and only when both are
        written, so that a failure leaves an older dictionary as it was.
      dictionary: what the parameters belong to.
      params: from ``dictionary.init`` and training.
      metadata: JSON values such as ``model_name`` and ``hook_name``.

    Raises:
      ValueError: if the parameters are not those of the dictionary, or SAELens has
        no such architecture (a transcoder with top-k codes).
      ImportError: without safetensors (``pip install "toyfeat[sae]"``).

    Note:
      The format has one encoder and one decoder; readers that a dictionary has
      beside them are not saved yet.

    References:
      SAELens 6, ``save_inference_model``.
    """
    save_file = files.safetensors("save_saelens").save_file
    config = dictionary.config
    tensors = {name: np.asarray(x, np.float32) for name, x in params.items()}
    files.check(config, tensors, "save_saelens")
    name, extra = config.architecture, {}
    if name in BY_BATCH:
        tensors, name = _folded(config, tensors), "jumprelu"
    elif name in BY_EXAMPLE:
        name = "topk" if name == "gradient_topk" else name
        rescale = config.rescale_acts_by_decoder_norm
        extra = {"k": config.k, "rescale_acts_by_decoder_norm": rescale}
    if config.d_out is not None:
        name, extra = _transcoder(name), {**extra, "d_out": config.d_out}
        if name not in ("transcoder", "jumprelu_transcoder"):
            raise ValueError(f"save_saelens: SAELens has no {name}")
    settings = _settings(config, name, extra, metadata or {})
    text = json.dumps(settings, indent=1) + "\n"
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    writers = {
        "sae_weights.safetensors": lambda part: save_file(arrays, part),
        "cfg.json": lambda part: part.write_text(text, encoding="utf-8"),
    }
    files.replace(Path(path), writers)


def load_saelens(path: str | Path) -> tuple[Dictionary, Params]:
    """Read a dictionary that SAELens 6 or :func:`save_saelens` wrote.

    Args:
      path: the folder with ``cfg.json`` and ``sae_weights.safetensors``.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if the architecture or a setting is not known here, the format is
        older than 6, or tensors are missing or of other shapes.
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
    load_file = files.safetensors("load_saelens").load_file
    settings, weights = files.settings_and_weights(
        "load_saelens", path, "cfg.json", "sae_weights.safetensors"
    )
    version = str(settings.get("metadata", {}).get("sae_lens_version", "0"))
    if int(version.split(".")[0]) < 6:
        raise ValueError(
            f"load_saelens: wanted the format of SAELens 6 or newer, {path} says "
            f"{version}; load it with SAELens and save it again"
        )
    config = _config(settings)
    return files.loaded(config, load_file(weights), "load_saelens")


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


def _settings(
    config: DictionaryConfig,
    name: str,
    extra: dict[str, Any],
    metadata: dict[str, Any],
) -> dict[str, Any]:
    about = {
        "sae_lens_version": _VERSION,
        "training_architecture": config.architecture,
    }
    return {
        "architecture": name,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **extra,
        "metadata": {**metadata, **about},
    }


def _transcoder(name: str) -> str:
    return "transcoder" if name == "standard" else f"{name}_transcoder"


def _folded(config: DictionaryConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    norm = np.ones(config.d_sae, np.float32)
    if config.rescale_acts_by_decoder_norm:
        norm = np.linalg.norm(tensors["W_dec"], axis=1)
    return {
        "W_enc": tensors["W_enc"] * norm[None, :],
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
        "b_dec": tensors["b_dec"],
        "threshold": np.full(config.d_sae, tensors["topk_threshold"], np.float32),
    }
