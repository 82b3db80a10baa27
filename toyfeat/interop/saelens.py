"""Dictionaries to and from the files of SAELens."""

import json
import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.table import ARCHITECTURES
from toyfeat.dictionary.types import Architecture, Config, Dictionary, SavedAs
from toyfeat.files.atomic import replace_files
from toyfeat.files.json import check_keys, field, read_json
from toyfeat.files.safetensors import saver, tensors_of
from toyfeat.interop import extra_tensors, files, gemma_scope
from toyfeat.interop.hooks import in_their_words
from toyfeat.interop.legacy_saelens import is_legacy, upgrade
from toyfeat.types import Params

_VERSION = "6.54.12"  # whose format this is
_SHOWN = 40  # letters of a version that a message shows
_OLDEST = 6  # version of SAELens; older formats have other settings
_LOAD = "load_saelens"
_CONFIG = "cfg.json"
_SWITCHES = ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input")
_KNOWN = (
    *("architecture", "d_in", "d_sae", "d_out", "k", *_SWITCHES),
    *("normalize_activations", "reshape_activations", "dtype", "device", "metadata"),
    # Settings of the training, which do not change what is computed.
    *("decoder_init_norm", "use_sparse_activations", "aux_loss_coefficient"),
    *("l1_coefficient", "l1_warm_up_steps", "lp_norm", "topk_threshold_lr"),
    *("l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_tanh_scale"),
    *("jumprelu_sparsity_loss_mode", "jumprelu_ste_to_input"),
)


def save_saelens(
    path: str | Path,
    dictionary: Dictionary,
    params: Params,
    *,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a dictionary as ``SAE.load_from_disk`` of SAELens reads it.

    As SAELens does, :func:`toyfeat.dictionaries.batch_topk` and
    :func:`toyfeat.dictionaries.matryoshka` are saved as the ``jumprelu`` that they are
    after training, the lengths of their decoder's rows folded in.
    :func:`toyfeat.dictionaries.gradient_topk` and :func:`toyfeat.dictionaries.paired`
    are ``topk`` to SAELens, which has no gradients; tensors that it does not know
    (``W_read``, ``P``, ``grad_scale``) go to ``toyfeat.safetensors``, and
    :func:`load_saelens` restores the whole dictionary.
    ``metadata["training_architecture"]`` is its name.  An architecture of your own is
    saved as the ``saved_as`` of its record says.  Codes of a paired dictionary are, in
    SAELens, in units of the output (``rescale_acts_by_decoder_norm``); its
    reconstructions are the same.

    Args:
      path: a folder, made if it does not exist; ``toyfeat.safetensors`` (removed if
        there is nothing for it), ``sae_weights.safetensors`` and ``cfg.json`` in it
        are replaced, in that order and only when all are written, so that a failure
        leaves an older dictionary as it was.
      dictionary: what the parameters belong to.
      params: after training from :func:`toyfeat.denormalized`, in the units of the
        activations.
      metadata: JSON values such as ``model_name`` and ``hook_name``; the version, the
        training's architecture and its details are set here, and a ``hook_name`` that
        is a site of a decoder is written as TransformerLens names it
        (:func:`hook_name`).
        :func:`saelens_metadata` reads them again.

    Raises:
      ValueError: if the parameters are not those of the dictionary or not finite,
        SAELens has no such architecture (a linear one, a transcoder with top-k codes),
        or a number in the metadata is not finite.
      TypeError: if the metadata have a value that JSON does not have.
      OSError: if a file cannot be written; names it, and the old files stay.
      ImportError: without safetensors (``pip install "toyfeat[sae]"``).

    References:
      SAELens 6, ``save_inference_model``.
    """
    save_file: Any = saver("save_saelens")
    architecture, config = dictionary.architecture, dictionary.config
    saved_as = _saved_as(architecture, config)
    tensors = files.checked_tensors(dictionary, params, "save_saelens")
    # Split off what SAELens does not know, fold what it has in another form.
    config, extra, about = extra_tensors.split_extra(
        architecture, saved_as, config, tensors
    )
    about["training_architecture"] = architecture.name
    tensors = {name: x for name, x in tensors.items() if name not in extra}
    if saved_as.fold is not None:
        tensors = saved_as.fold(config, tensors)
    # Write all files, then put them in place.
    _check_metadata(metadata or {}, "metadata")
    metadata = {**(metadata or {}), **about}
    if isinstance(metadata.get("hook_name"), str):
        metadata["hook_name"] = in_their_words(metadata["hook_name"])
    settings = _settings(architecture, saved_as, config, metadata)
    text = json.dumps(settings, indent=1) + "\n"
    writers = {
        "sae_weights.safetensors": lambda part: save_file(_contiguous(tensors), part),
        "cfg.json": lambda part: part.write_text(text, encoding="utf-8"),
    }
    if extra:
        extra_writer = {
            extra_tensors.FILE: lambda part: save_file(_contiguous(extra), part)
        }
        writers = extra_writer | writers
    obsolete = () if extra else (extra_tensors.FILE,)
    replace_files("save_saelens", Path(path), writers, obsolete)


def load_saelens(
    path: str | Path, *, architectures: Sequence[Architecture] = ()
) -> tuple[Dictionary, Params]:
    """Read a dictionary of SAELens, of :func:`save_saelens` or of Gemma Scope.

    :func:`load_dictionary` reads other formats too, and returns the metadata as well.

    Dictionaries of :func:`save_saelens` are restored as they were, but for
    :func:`toyfeat.dictionaries.batch_topk` and :func:`toyfeat.dictionaries.matryoshka`,
    which are :func:`toyfeat.dictionaries.jump_relu` now.

    Args:
      path: the folder with ``cfg.json``, ``sae_weights.safetensors`` and, where there
        are tensors that SAELens does not know, ``toyfeat.safetensors``; or one of Gemma
        Scope with ``params.npz``, a :func:`toyfeat.dictionaries.jump_relu`.
      architectures: records of your own architectures, beside those of the library.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if the architecture or a setting is not known here or of another
        type, the format is older than 6, tensors are missing, of other shapes or not
        finite, or ``toyfeat.safetensors`` does not belong to the weights.
      ImportError: without safetensors.

    Example:
      >>> import jax, tempfile
      >>> from toyfeat.dictionary import standard
      >>> sae = standard(4, 16)
      >>> params = sae.init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_saelens(folder, sae, params)
      ...     again, same = load_saelens(folder)
      >>> again.config == sae.config, bool((same["W_dec"] == params["W_dec"]).all())
      (True, True)
    """
    if not (Path(path) / _CONFIG).exists() and (Path(path) / gemma_scope.FILE).exists():
        return gemma_scope.load_params(Path(path) / gemma_scope.FILE, _LOAD)
    folder = files.open_folder(_LOAD, path, _CONFIG, "sae_weights.safetensors")
    settings = _current(folder.settings, folder.source)
    folder = folder._replace(settings=settings)
    metadata = _metadata(settings, folder.source)
    tensors = tensors_of(folder.weights, _LOAD)
    # Versions before 6 stored a factor of 1.
    factor = tensors.get("scaling_factor")
    if factor is not None and np.all(np.asarray(factor) == 1):
        tensors = {k: x for k, x in tensors.items() if k != "scaling_factor"}
    # A linear path beside the codes is stored as torch has it.
    if "W_skip" in tensors:
        tensors = {**tensors, "W_skip": np.asarray(tensors["W_skip"]).T}
    # What SAELens reads, then what only this library knows.
    known = ARCHITECTURES | {each.name: each for each in architectures}
    config = _config(folder.settings, known, folder.source)
    config, tensors = extra_tensors.join_extra(
        folder.source, config, tensors, metadata, known
    )
    architecture = known[config.architecture]
    return files.dictionary_of(architecture, config, tensors, _LOAD, folder.weights)


def saelens_metadata(path: str | Path) -> dict[str, Any]:
    """Read what was saved with a dictionary beside its tensors and settings.

    Args:
      path: the folder, as of :func:`load_saelens`.

    Returns:
      The ``metadata`` of :func:`save_saelens`, or of SAELens, with the version, the
      training's architecture and its details; may be given to :func:`save_saelens`.

    Raises:
      FileNotFoundError: if there is no ``cfg.json``.
      ValueError: if it is broken, or its format is older than 6.
    """
    source = Path(path) / _CONFIG
    return _metadata(_current(read_json(source, "saelens_metadata"), source), source)


def _current(settings: dict[str, Any], source: Path) -> dict[str, Any]:
    """Translate settings of versions before 6."""
    return upgrade(settings, source) if is_legacy(settings) else settings


def _metadata(settings: dict[str, Any], source: Path) -> dict[str, Any]:
    """Look up the metadata, after checking the version of the format."""
    metadata = field(settings, "metadata", dict, source, _LOAD, default=None) or {}
    text = field(metadata, "sae_lens_version", str, source, _LOAD, default="0")
    number = re.match(r"\d{1,4}(?=\.|$)", text)
    if number is None or int(number[0]) < _OLDEST:
        raise ValueError(
            f"{_LOAD}: {source} must have the format of SAELens {_OLDEST} or newer, it "
            f"says {text[:_SHOWN]}; load it with SAELens and save it again"
        )
    return metadata


def _check_metadata(value: Any, place: str) -> None:
    """Refuse what JSON does not have, with its place in the metadata.

    Raises:
      TypeError: for a value that JSON does not have.
      ValueError: for a number that is not finite.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"save_saelens: keys of {place} must be strings, got {key!r}; "
                    "convert it with str"
                )
            _check_metadata(entry, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            _check_metadata(entry, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"save_saelens: {place} must be finite, as JSON has no {value}; leave it "
            "out, or give it as a string"
        )
    elif not isinstance(value, str | int | float | None):
        raise TypeError(
            f"save_saelens: {place} must be a JSON value, got a "
            f"{type(value).__name__}: {reprlib.repr(value)}; convert it, as with list, "
            "float or str"
        )


def _config(
    settings: dict[str, Any], known: dict[str, Architecture], source: Path
) -> Config:
    """Make a configuration from SAELens' settings."""
    # Settings that would change what is computed must be off.
    check_keys(settings, _KNOWN, source, _LOAD, ignore_off=True)
    for key in ("dtype", "device"):  # which change nothing here
        field(settings, key, str, source, _LOAD, default=None)
    full = field(settings, "architecture", str, source, _LOAD)
    name = re.sub(r"_?(skip_)?transcoder$", "", full) or "standard"
    for key in ("normalize_activations", "reshape_activations"):
        if settings.get(key, "none") not in ("none", None):
            raise ValueError(
                f"{_LOAD}: {key} = {reprlib.repr(settings[key])} is not known here; "
                f"fold it into the weights with SAELens first; it is in {source}"
            )
    # Only architectures that are saved as themselves are names in SAELens' files.
    readable = {
        each.name: each
        for each in known.values()
        if each.saved_as is not None and each.saved_as.architecture == each.name
    }
    transcoders = [each.name for each in readable.values() if each.transcodes]
    architecture, is_transcoder = readable.get(name), "transcoder" in full
    if architecture is None or (is_transcoder and not architecture.transcodes):
        raise ValueError(
            f"{_LOAD}: {source}: architecture {reprlib.repr(full)} is not known "
            f"here; known are {', '.join(readable)}, and transcoders of "
            f"{', '.join(transcoders)}; pass records of your own, architectures=(...,)"
        )
    # What is left out has SAELens' defaults, which differ for transcoders.
    values = {"apply_b_dec_to_input": not is_transcoder, **settings}
    if is_transcoder:
        field(settings, "d_out", int, source, _LOAD)  # is required
    names = ("d_in", "d_sae", "d_out", "k", *_SWITCHES)
    fields = {key: files.config_field(values, key, source, _LOAD) for key in names}
    fields["d_out"] = fields["d_out"] if is_transcoder else None
    return Config(architecture=name, **fields, **architecture.defaults)


def _saved_as(architecture: Architecture, config: Config) -> SavedAs:
    """Look up how an architecture is saved.

    Raises:
      ValueError: if SAELens has no such architecture.
    """
    saved_as = architecture.saved_as
    if saved_as is None:
        raise ValueError(
            f"save_saelens: SAELens has no {architecture.name} architecture; write the "
            "parameters, or the basis they are from, with toyfeat.save_tree, or set "
            "saved_as if the architecture is your own"
        )
    if config.d_out is not None and not saved_as.transcoder:
        raise ValueError(
            f"save_saelens: SAELens has no {saved_as.architecture}_transcoder"
        )
    return saved_as


def _contiguous(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def _settings(
    architecture: Architecture,
    saved_as: SavedAs,
    config: Config,
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """Settings as SAELens names them."""
    # Settings that SAELens has for some architectures only.
    name, optional = saved_as.architecture, {}
    if ARCHITECTURES.get(name, architecture).selects == "example":
        rescale = config.rescale_acts_by_decoder_norm
        optional = {"k": config.k, "rescale_acts_by_decoder_norm": rescale}
    if config.d_out is not None:
        name = "transcoder" if name == "standard" else f"{name}_transcoder"
        optional["d_out"] = config.d_out
    return {
        "architecture": name,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **optional,
        "metadata": {**metadata, "sae_lens_version": _VERSION},
    }
