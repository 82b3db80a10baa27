"""Dictionaries to and from the files of SAELens."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.coding import BY_BATCH, BY_EXAMPLE, of_config
from toyfeat.types import Dictionary, DictionaryConfig, Params

_VERSION = "6.54.12"  # whose format this is; versions below 6 are read otherwise
_READ = ("standard", "topk", "abstopk", "jumprelu", "gated")
_BANDWIDTH = 0.05  # is not in the files


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
      path: a folder, made if it is not there; ``cfg.json`` and
        ``sae_weights.safetensors`` in it are overwritten.
      dictionary: what the parameters belong to.
      params: from ``dictionary.init`` and training.
      metadata: JSON values such as ``model_name`` and ``hook_name``.

    Raises:
      ValueError: if the parameters are not those of the dictionary, or SAELens has
        no such architecture (a transcoder with top-k codes).
      ImportError: without safetensors (``pip install "toyfeat[sae]"``).

    References:
      SAELens 6, ``save_inference_model``.
    """
    save_file = _safetensors("save_saelens").save_file
    config = dictionary.config
    tensors = {name: np.asarray(x, np.float32) for name, x in params.items()}
    _check(config, tensors, "save_saelens")
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
    about = {
        **(metadata or {}),
        "sae_lens_version": _VERSION,
        "training_architecture": config.architecture,
    }
    settings = {
        "architecture": name,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **extra,
        "metadata": about,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=1)  # before a file is touched
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(arrays, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(text + "\n", encoding="utf-8")


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
    load_file = _safetensors("load_saelens").load_file
    folder = Path(path)
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"load_saelens: there is no {folder / name}")
    settings = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    version = str(settings.get("metadata", {}).get("sae_lens_version", "0"))
    if int(version.split(".")[0]) < 6:
        raise ValueError(
            f"load_saelens: wanted the format of SAELens 6 or newer, {folder} says "
            f"{version}; load it with SAELens and save it again"
        )
    dictionary = _of_settings(settings)
    tensors = load_file(folder / "sae_weights.safetensors")
    _check(dictionary.config, tensors, "load_saelens")
    return dictionary, {k: jnp.asarray(v, jnp.float32) for k, v in tensors.items()}


def _safetensors(who: str) -> Any:
    """The library, which is wanted for files only."""
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError(
            f'{who}: safetensors is not installed: pip install "toyfeat[sae]"'
        ) from error


def _of_settings(settings: dict[str, Any]) -> Dictionary:
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
    config = DictionaryConfig(
        name,
        *sizes,
        d_out=out,
        k=settings.get("k"),
        rescale_acts_by_decoder_norm=settings.get(
            "rescale_acts_by_decoder_norm", False
        ),
        apply_b_dec_to_input=settings.get("apply_b_dec_to_input", out is None),
        bandwidth=_BANDWIDTH if name == "jumprelu" else 0.0,
    )
    return of_config(config)


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


def _check(config: DictionaryConfig, tensors: dict[str, Any], who: str) -> None:
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
    found = {name: tuple(np.shape(x)) for name, x in tensors.items()}
    if found != wanted:
        raise ValueError(
            f"{who}: {config.architecture} wants tensors {wanted}, got {found}"
        )
