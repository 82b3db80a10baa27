"""Dictionaries from the files of dictionary_learning."""

from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.coding import BY_BATCH, BY_EXAMPLE
from toyfeat.interop import files
from toyfeat.interop.torch_files import state_dict
from toyfeat.types import Dictionary, DictionaryConfig, Params

_WHO = "load_dictionary_learning"
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

    It gives the codes and reconstructions of their ``load_dictionary``:

    ==========================  ==================================================
    ``AutoEncoder``             :func:`toyfeat.standard`; rows of ``W_dec`` are
                                scaled to length 1 and the codes with them
    ``AutoEncoderNew``          the same without ``b_dec`` on the input, not scaled
    ``AutoEncoderTopK``         :func:`toyfeat.topk`, codes as they are (its
                                ``threshold``, which they do not use unless asked,
                                is left out)
    ``BatchTopKSAE``            :func:`toyfeat.batch_topk`, codes as they are
    ``MatryoshkaBatchTopKSAE``  :func:`toyfeat.matryoshka`, codes as they are
    ``JumpReluAutoEncoder``     :func:`toyfeat.jump_relu` without ``b_dec`` on the
                                input
    ``GatedAutoEncoder``        :func:`toyfeat.gated`
    ==========================  ==================================================

    torch is not needed.  ``ae.pt`` holds a pickle, which is read without running
    anything that it asks for.

    Args:
      path: the folder of one trainer with ``ae.pt`` and ``config.json``.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if the class is not known here, ``ae.pt`` is something else than a
        state dict of plain tensors or older than torch 1.6, or tensors are missing
        or of other shapes.

    Example:
      >>> load_dictionary_learning("no/such/trainer_0")
      Traceback (most recent call last):
      FileNotFoundError: load_dictionary_learning: there is no .../config.json

    References:
      Marks, Karvonen and Mueller, dictionary_learning 0.1.0, ``load_dictionary``.
    """
    settings, weights = files.settings_and_weights(_WHO, path, "config.json", "ae.pt")
    trainer = settings.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ValueError(
            f"{_WHO}: wanted trainer.dict_class in {path}/config.json to be one of "
            f"{', '.join(_CLASSES)}, got {kind!r}"
        )
    state = state_dict(weights, _WHO)
    tensors = _renamed(kind, state)
    widths = _widths(tensors.pop("group_sizes", None))
    config = _config(kind, trainer, tensors["W_enc"], _k(trainer, state), widths)
    files.check(config, tensors, _WHO)
    if kind == "AutoEncoder":
        tensors = _of_unit_rows(tensors)
    return files.loaded(config, tensors, _WHO)


def _renamed(kind: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    architecture, names = _CLASSES[kind]
    aside = {
        name
        for name in ("k", "threshold")
        if architecture in (*BY_BATCH, *BY_EXAMPLE) and name not in names
    }
    if set(state) - aside != set(names):
        raise ValueError(
            f"{_WHO}: {kind} wants tensors {sorted(names)}, got {sorted(state)}"
        )
    turned = {name: x.T if "." in name else x for name, x in state.items()}
    return {ours: turned[theirs] for theirs, ours in names.items()}


def _config(
    kind: str, trainer: dict[str, Any], reads: np.ndarray, k: int | None, widths: Any
) -> DictionaryConfig:
    name = _CLASSES[kind][0]
    dim, latents = np.atleast_2d(reads).shape[-2:]
    if widths and widths[-1] != latents:
        raise ValueError(
            f"{_WHO}: group_sizes must sum to the {latents} latents, got {widths[-1]}"
        )
    return DictionaryConfig(
        name,
        trainer.get("activation_dim", dim),
        trainer.get("dict_size", latents),
        k=k if name in (*BY_BATCH, *BY_EXAMPLE) else None,
        apply_b_dec_to_input=kind not in _READ_AS_THEY_ARE,
        matryoshka_widths=widths,
        bandwidth=(trainer.get("bandwidth") or files.BANDWIDTH)
        if name == "jumprelu"
        else 0.0,
    )


def _k(trainer: dict[str, Any], state: dict[str, np.ndarray]) -> int | None:
    """The one number that both files give."""
    there = state["k"].ravel().tolist() if "k" in state else []
    said = [trainer["k"]] if trainer.get("k") is not None else []
    numbers = there + said
    if any(number != numbers[0] for number in numbers):
        raise ValueError(
            f"{_WHO}: k must be one number, got {said} in config.json and {there} in "
            "ae.pt"
        )
    return numbers[0] if numbers else None


def _widths(sizes: np.ndarray | None) -> tuple[int, ...]:
    if sizes is None:
        return ()
    if sizes.ndim != 1 or not len(sizes) or sizes.min() < 1:
        raise ValueError(f"{_WHO}: group_sizes must be positive, got {sizes.tolist()}")
    return tuple(int(width) for width in np.cumsum(sizes))


def _of_unit_rows(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same function of activations, with the lengths of rows in the codes."""
    length = np.linalg.norm(tensors["W_dec"], axis=1)
    length = np.where(length > 0, length, np.ones_like(length))
    return {
        "W_enc": tensors["W_enc"] * length[None, :],
        "b_enc": tensors["b_enc"] * length,
        "W_dec": tensors["W_dec"] / length[:, None],
        "b_dec": tensors["b_dec"],
    }
