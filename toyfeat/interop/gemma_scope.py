"""Dictionaries from the files of Gemma Scope: one ``params.npz`` in a folder."""

from pathlib import Path

from toyfeat.dictionary.jump_relu import JUMP_RELU
from toyfeat.dictionary.types import Config, Dictionary
from toyfeat.files.archives import array_from_npy, open_archive
from toyfeat.interop import files
from toyfeat.types import Params

FILE = "params.npz"
"""Name of the file."""

_NAMES = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


def load_params(path: Path, who: str) -> tuple[Dictionary, Params]:
    """Read a JumpReLU dictionary of Gemma Scope.

    Codes are ``pre`` where ``pre = acts @ W_enc + b_enc > threshold``, so ``b_dec`` is
    not subtracted from the input.

    Args:
      path: of the file.
      who: the function, for messages.

    Returns:
      :class:`Dictionary` and its parameters, float32.

    Raises:
      ValueError: if the file is damaged, or tensors are missing, too many, of other
        shapes or not finite.

    References:
      Lieberum et al. (2024), "Gemma Scope", section 2.
    """
    try:
        with path.open("rb") as file, open_archive(file) as archive:
            tensors = {
                name.removesuffix(".npy"): array_from_npy(archive.read(name))
                for name in archive.namelist()
            }
    except OSError:
        raise
    except Exception as error:  # a damaged archive fails in a dozen ways
        raise ValueError(
            f"{who}: {path} is not a whole archive of arrays ({error}); fetch it again"
        ) from error
    if set(tensors) != _NAMES or tensors["W_enc"].ndim != 2:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        raise ValueError(
            f"{who}: {path} must have the tensors {sorted(_NAMES)} of a JumpReLU "
            f"dictionary, got {shapes}; others cannot be read"
        )
    dim, latents = tensors["W_enc"].shape
    config = Config(
        architecture=JUMP_RELU.name,
        d_in=dim,
        d_sae=latents,
        apply_b_dec_to_input=False,
        **JUMP_RELU.defaults,
    )
    return files.dictionary_of(JUMP_RELU, config, tensors, who, path)
