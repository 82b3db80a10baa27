"""Dictionaries from the files of dictionary_learning."""

import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.table import ARCHITECTURES
from toyfeat.dictionary.types import Architecture, Config, Dictionary
from toyfeat.files.json import field
from toyfeat.files.torch_pickle import state_dict
from toyfeat.interop import files
from toyfeat.types import Params

_WHO = "load_dictionary_learning"
_MAX_SIZE = 2**31 - 1  # JAX indexes arrays by int32
_LINEAR = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "r_mag": "r_mag",
}
_GROUPED = {"threshold": "topk_threshold", "group_sizes": "group_sizes"}
_CLASSES = {  # their class: our architecture, their tensors' names: ours
    "AutoEncoder": ("standard", {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": ("standard", {**_LINEAR, "decoder.bias": "b_dec"}),
    "AutoEncoderTopK": ("topk", {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": (
        "batchtopk",
        {**_LINEAR, "b_dec": "b_dec", "threshold": "topk_threshold"},
    ),
    "MatryoshkaBatchTopKSAE": ("matryoshka_batchtopk", {**_PLAIN, **_GROUPED}),
    "JumpReluAutoEncoder": ("jumprelu", {**_PLAIN, "threshold": "threshold"}),
    "GatedAutoEncoder": ("gated", _GATED),
}
_READ_AS_THEY_ARE = ("AutoEncoderNew", "JumpReluAutoEncoder")  # without b_dec


def load_dictionary_learning(path: str | Path) -> tuple[Dictionary, Params]:
    """Read a dictionary that a trainer of dictionary_learning saved.

    The result has the codes and reconstructions of their ``load_dictionary``.
    *Plain codes* are those without ``rescale_acts_by_decoder_norm``:

    ==========================  ==================================================
    ``AutoEncoder``             ``standard``; rows of ``W_dec`` are
                                scaled to length 1 and the codes with them
    ``AutoEncoderNew``          the same without ``b_dec`` on the input, not scaled
    ``AutoEncoderTopK``         ``topk``, plain codes (its
                                ``threshold``, which is off by default, is left out)
    ``BatchTopKSAE``            ``batch_topk``, plain codes
    ``MatryoshkaBatchTopKSAE``  ``matryoshka``, plain codes
    ``JumpReluAutoEncoder``     ``jump_relu`` without ``b_dec`` on the
                                input
    ``GatedAutoEncoder``        ``gated``
    ==========================  ==================================================

    torch is not needed.  ``ae.pt`` holds a pickle, which is read without running any
    code in it.

    Args:
      path: the folder of one trainer with ``ae.pt`` and ``config.json``.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if the class is not known here, ``ae.pt`` is not a state dict of
        plain tensors or older than torch 1.6, or settings do not fit or tensors are
        missing or of other shapes.

    Example:
      >>> load_dictionary_learning("no/such/trainer_0")
      Traceback (most recent call last):
      FileNotFoundError: load_dictionary_learning: there is no ...; give a folder ...

    References:
      Marks, Karvonen and Mueller, dictionary_learning 0.1.0, ``load_dictionary``.
    """
    folder = files.open_folder(_WHO, path, "config.json", "ae.pt")
    trainer = field(folder.settings, "trainer", dict, folder.source, _WHO)
    kind = field(trainer, "dict_class", str, folder.source, _WHO)
    if kind not in _CLASSES:
        raise ValueError(
            f"{_WHO}: trainer.dict_class in {folder.source} must be one of "
            f"{', '.join(_CLASSES)}, got {reprlib.repr(kind)}; others cannot be read"
        )
    name, tensor_names = _CLASSES[kind]
    architecture = ARCHITECTURES[name]
    # Their tensors under our names, their settings as ours.
    state = state_dict(folder.weights, _WHO)
    tensors = _rename(kind, architecture, tensor_names, state, folder.weights)
    widths = _widths(tensors.pop("group_sizes", None), folder.weights)
    config = _config(kind, architecture, trainer, tensors, widths, folder.source)
    if architecture.selects != "all":
        config = config._replace(k=_k(trainer, state, folder.source))
    # Of this class dictionary_learning itself makes the rows unit when it loads one.
    result = files.dictionary_of(architecture, config, tensors, _WHO, folder.weights)
    if kind == "AutoEncoder":
        tensors = _with_unit_rows(tensors)
        return files.dictionary_of(architecture, config, tensors, _WHO, folder.weights)
    return result


def _rename(
    kind: str,
    architecture: Architecture,
    names: dict[str, str],
    state: dict[str, np.ndarray],
    weights: Path,
) -> dict[str, np.ndarray]:
    """Tensors under our names; matrices of torch's linear layers are transposed."""
    unused: set[str] = set()
    if architecture.selects != "all":  # beside what the codes are chosen by
        unused = {"k", "threshold"} - set(names)
    if set(state) - unused != set(names):
        raise ValueError(
            f"{_WHO}: {weights}: {kind} wants tensors {sorted(names)}, got "
            f"{reprlib.repr(sorted(state))}; give the folder of one trainer"
        )
    # A dot is in the names of a layer's tensors; those of the module itself have none.
    arrays = {name: x.T if "." in name else x for name, x in state.items()}
    return {ours: arrays[theirs] for theirs, ours in names.items()}


def _config(
    kind: str,
    architecture: Architecture,
    trainer: dict[str, Any],
    tensors: dict[str, np.ndarray],
    widths: tuple[int, ...],
    source: Path,
) -> Config:
    """Make a configuration; sizes that the settings do not have are the encoder's."""
    dim, latents = np.atleast_2d(tensors["W_enc"]).shape[-2:]
    if widths and widths[-1] != latents:
        raise ValueError(
            f"{_WHO}: group_sizes in {source.with_name('ae.pt')} must sum to the "
            f"{latents} latents, got {widths[-1]}; fetch or save it again"
        )
    # Settings of this architecture, and sizes, which must be those of the weights.
    own: dict[str, Any] = {
        key: field(trainer, key, float, source, _WHO, default=None, low=0) or default
        for key, default in architecture.defaults.items()
    }
    sizes = {"activation_dim": dim, "dict_size": latents}
    dim, latents = (
        field(trainer, name, int, source, _WHO, default=size, low=1, high=_MAX_SIZE)
        for name, size in sizes.items()
    )
    return Config(
        architecture=architecture.name,
        d_in=dim,
        d_sae=latents,
        apply_b_dec_to_input=kind not in _READ_AS_THEY_ARE,
        matryoshka_widths=widths,
        **own,
    )


def _k(
    trainer: dict[str, Any], state: dict[str, np.ndarray], source: Path
) -> int | None:
    """The number of codes, which may be in both files.

    Raises:
      ValueError: if they have different ones, or what is no number of codes.
    """
    # Numbers of the weights and of the settings, which must all be the same.
    weights = state["k"].ravel().tolist() if "k" in state else []
    if any(not isinstance(k, int) or isinstance(k, bool) for k in weights):
        raise ValueError(f"{_WHO}: tensor 'k' in ae.pt must be ints, got {weights}")
    setting = field(trainer, "k", int, source, _WHO, default=None, low=1)
    settings = [] if setting is None else [setting]
    numbers = weights + settings
    if any(number != numbers[0] for number in numbers):
        raise ValueError(
            f"{_WHO}: k must be one number, got {settings} in {source} and {weights} "
            "in ae.pt; fetch both files again"
        )
    return numbers[0] if numbers else None


def _widths(sizes: np.ndarray | None, weights: Path) -> tuple[int, ...]:
    if sizes is None:
        return ()
    is_list = sizes.ndim == 1 and len(sizes) and sizes.dtype.kind in "iu"
    if not is_list or sizes.min() < 1:
        raise ValueError(
            f"{_WHO}: group_sizes in {weights} must be a list of positive ints, got "
            f"{reprlib.repr(sizes.tolist())}; fetch or save it again"
        )
    return tuple(int(width) for width in np.cumsum(sizes))


def _with_unit_rows(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scale the rows of the decoder to length 1 and the codes with them."""
    length = np.linalg.norm(tensors["W_dec"], axis=1)
    length = np.where(length > 0, length, np.ones_like(length))
    return {
        "W_enc": tensors["W_enc"] * length[None, :],
        "b_enc": tensors["b_enc"] * length,
        "W_dec": tensors["W_dec"] / length[:, None],
        "b_dec": tensors["b_dec"],
    }
