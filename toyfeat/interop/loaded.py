"""Dictionaries of other libraries, with what their files say about them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toyfeat.dictionary.jump_relu import JUMP_RELU
from toyfeat.dictionary.standard import STANDARD
from toyfeat.dictionary.topk import TOPK
from toyfeat.dictionary.types import Config, Dictionary
from toyfeat.interop import files
from toyfeat.types import Params

WHO = "load_dictionary"
"""The function that reads them, for messages."""


class Loaded(NamedTuple):
    """A dictionary of another library.

    Attributes:
      dictionary: its functions.
      params: its tensors, float32.
      metadata: what its files say about it: ``format``, and as far as known
        ``model_name`` and ``hook_name`` (:func:`toyfeat.interop.site_name`).
    """

    dictionary: Dictionary
    params: Params
    metadata: dict[str, Any]


def make_loaded(
    source: Path,
    tensors: dict[str, Any],
    about: dict[str, Any],
    *,
    transcodes: bool,
    apply_b_dec_to_input: bool = False,
    k: int | None = None,
    rescale: bool = False,
) -> Loaded:
    """Make a dictionary of tensors.

    Codes are the ``k`` largest if there is a ``k``, JumpReLU if there are thresholds,
    and ReLU otherwise.

    Args:
      source: the file of the tensors, for messages.
      tensors: ``W_enc [D_in, M]``, ``W_dec [M, D]`` and so on.
      about: the metadata.
      transcodes: whether it writes another activation than it reads.
      apply_b_dec_to_input: whether ``b_dec`` is subtracted from the input.
      k: codes that are kept.
      rescale: whether the ``k`` are the largest in units in which rows of ``W_dec``
        have length 1, which codes are in then.

    Raises:
      ValueError: if tensors are missing, too many, of other shapes or not finite.
    """
    shapes = {name: np.shape(x) for name, x in tensors.items()}
    needed = [shapes.get(name, ()) for name in ("W_enc", "W_dec")]
    if [len(shape) for shape in needed] != [2, 2]:
        raise ValueError(
            f"{WHO}: {source} must have an encoder and a decoder as matrices, got "
            f"{shapes}; others cannot be read"
        )
    (dim, latents), (_, out) = needed
    architecture = JUMP_RELU if "threshold" in tensors else STANDARD
    options: dict[str, Any] = dict(architecture.defaults)
    if k is not None:
        architecture, options = TOPK, {"k": k, "rescale_acts_by_decoder_norm": rescale}
    config = Config(
        architecture=architecture.name,
        d_in=dim,
        d_sae=latents,
        d_out=out if transcodes or out != dim else None,
        apply_b_dec_to_input=apply_b_dec_to_input,
        **options,
    )
    made = files.dictionary_of(architecture, config, tensors, WHO, source)
    return Loaded(*made, about)
