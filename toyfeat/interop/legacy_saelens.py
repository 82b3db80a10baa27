"""Settings of SAELens before 6, in the words of SAELens 6."""

import re
from pathlib import Path
from typing import Any

_WHO = "load_saelens"
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# Settings that say where a dictionary belongs; all others are of its training.
_METADATA = (
    *("model_name", "hook_name", "hook_layer", "hook_head_index", "hook_point_layer"),
    *("prepend_bos", "dataset_path", "context_size", "neuronpedia_id", "seqpos_slice"),
    *("sae_lens_training_version", "model_from_pretrained_kwargs"),
)
# A file of a version before 6 has one of them, which 6 keeps among the metadata or not.
_OLD_KEYS = ("activation_fn", "activation_fn_str", "hook_point", "hook_name")
_KEPT = ("d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input")


def is_legacy(settings: dict[str, Any]) -> bool:
    """Say whether settings are those of a version before 6.

    Files of 6 have their version among the metadata, older ones beside all else, or
    none at all.
    """
    metadata = settings.get("metadata")
    if isinstance(metadata, dict) and "sae_lens_version" in metadata:
        return False
    version = str(settings.get("sae_lens_version", "0"))
    number = re.match(r"\d{1,4}", version)
    is_old = number is None or int(number[0]) < 6
    return is_old and any(key in settings for key in _OLD_KEYS)


def upgrade(settings: dict[str, Any], source: Path) -> dict[str, Any]:
    """Translate settings of a version before 6.

    Args:
      settings: content of ``cfg.json``.
      source: its path, for messages.

    Returns:
      Settings as SAELens 6 writes them, with the metadata.

    Raises:
      ValueError: for an activation function or a scaling that changes what is computed.

    References:
      SAELens 6, ``handle_pre_6_0_config``, for the defaults of what is left out.
    """
    values = {_RENAMED.get(name, name): value for name, value in settings.items()}
    name = values.get("architecture", "standard")
    activation = values.get("activation_fn") or "relu"
    options = values.get("activation_fn_kwargs") or {}
    new: dict[str, Any] = {"apply_b_dec_to_input": True}
    new |= {key: values[key] for key in _KEPT if key in values}
    # The activation function is an architecture now.
    if activation == "topk" and isinstance(options, dict) and "k" in options:
        name, new["k"] = "topk", options["k"]
    elif activation != "relu":
        raise ValueError(
            f"{_WHO}: activation_fn must be relu, or topk with k in "
            f"activation_fn_kwargs, got {activation!r} with {options!r}; it is in "
            f"{source}, load it with SAELens and save it again"
        )
    # Runtime scalings would be needed with every input.
    names = ("normalize_activations", "finetuning_scaling_factor")
    scalings = {name: values.get(name) for name in names}
    if any(scaling not in (None, False, "none") for scaling in scalings.values()):
        raise ValueError(
            f"{_WHO}: wanted weights that take activations as they are, got "
            f"{scalings}; fold them into the weights with SAELens first; they are in "
            f"{source}"
        )
    metadata = {key: values[key] for key in _METADATA if key in values}
    metadata["sae_lens_version"] = "6.0.0"  # of these settings, not of the training
    return {**new, "architecture": name, "metadata": metadata}
