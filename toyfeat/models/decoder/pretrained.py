"""Decoders with the weights of released language models."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.models.decoder import gguf, huggingface
from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.tokens import check_tokenizer, load_tokenizer
from toyfeat.types import Params


class Pretrained(NamedTuple):
    """A released language model.

    Attributes:
      name: of the folder or file it came from.
      config: for :class:`Decoder`.
      params: its variables.
      tokenizer: of the ``tokenizers`` library, or ``None`` if there was none.
    """

    name: str
    config: DecoderConfig
    params: Params
    tokenizer: Any


def load_decoder(
    path: str | Path, *, dtype: Any = jnp.float32, tokenizer: bool = True
) -> Pretrained:
    """Read a language model from a folder of ``transformers`` or a GGUF file.

    A folder holds ``config.json``, ``model.safetensors`` (or its shards with an index)
    and ``tokenizer.json``, of a GPT-2, GPT-NeoX (Pythia) or Llama model; a GGUF file
    is one of the Llama architecture, whose quantized tensors are unpacked.

    Args:
      path: folder or ``.gguf`` file.
      dtype: of the parameters.
      tokenizer: whether to read the tokenizer too.

    Returns:
      :class:`Pretrained`; ``Decoder(config)`` runs it.

    Raises:
      FileNotFoundError: if the folder, or a file that it needs, does not exist.
      ValueError: for an architecture that is not covered, tensors that are missing,
        left over, of another shape or beyond ``dtype``, a damaged file, a tokenizer
        with more tokens than the model, or a ``dtype`` that is no floating-point type.
      TypeError: for a path of another type.
      ImportError: without the ``lm`` extra.

    Example:
      >>> model = load_decoder("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
      >>> tokens = model.tokenizer.encode("The capital of France is").ids
      ... # doctest: +SKIP
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"load_decoder: path must be a str or a Path, got {path!r}; give the "
            "folder or the file of a model"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"load_decoder: dtype must be a floating-point type, got {dtype!r}; give "
            "jnp.float32 or jnp.bfloat16"
        )
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"load_decoder: there is no {path}; give a folder with config.json and "
            "model.safetensors, or a .gguf file (of the hub: toyfeat fetch "
            "hub:OWNER/NAME says where it is)"
        )
    # A folder of transformers, or a file of llama.cpp.
    is_folder = path.is_dir()
    if not is_folder and path.suffix != ".gguf":
        raise ValueError(
            f"load_decoder: wanted a folder or a .gguf file, got the file {path.name}; "
            "save its weights as safetensors first"
        )
    load = huggingface.load_folder if is_folder else gguf.load_gguf
    config, params = load(path, dtype)
    # The tokenizer may be missing, but it may not name tokens that the model lacks.
    loaded = load_tokenizer(path) if tokenizer else None
    if loaded is not None:
        check_tokenizer("load_decoder", loaded, config.vocab, path)
    return Pretrained(name=path.name, config=config, params=params, tokenizer=loaded)
