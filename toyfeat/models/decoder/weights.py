"""Assembly of a module's parameters from the tensors of released weights."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from toyfeat.files.json import read_json
from toyfeat.files.paths import inside
from toyfeat.files.safetensors import TensorFile, open_tensors
from toyfeat.types import Params

_SHOWN = 4  # names in a message


class Piece(NamedTuple):
    """A parameter as a part of a tensor in a file.

    Attributes:
      param: path of the parameter, ``"blocks_0/attn/query/kernel"``.
      tensor: name in the file.
      shape: of the tensor.
      extract: function of the tensor that returns the parameter.
    """

    param: str
    tensor: str
    shape: tuple[int, ...]
    extract: Callable[[np.ndarray], np.ndarray]


class Source(NamedTuple):
    """Tensors of files, read one at a time.

    Attributes:
      name: of the file or folder, for messages.
      shapes: shape of each tensor by name.
      read: function of a name that returns the array.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def assemble_params(
    who: str,
    expected: Params,
    pieces: Iterable[Piece],
    source: Source,
    *,
    dtype: Any,
    ignored: str,
) -> Params:
    """Assemble the parameters of a flax module and account for every tensor.

    Args:
      who: function to name in errors.
      expected: variables of the module, as its ``init`` returns them, or their shapes.
      pieces: of all its parameters.
      source: of the tensors.
      dtype: of the parameters.
      ignored: pattern of the names of tensors that are not parameters.

    Returns:
      ``{"params": ...}``.

    Raises:
      ValueError: naming the tensors that are missing, left over or of another shape.
    """
    pieces = list_pieces(who, pieces, source, ignored=ignored)
    # Read every tensor once; the pieces of a tensor follow each other.
    flat: dict[tuple[str, ...], jax.Array] = {}
    last: dict[str, np.ndarray] = {}
    for piece in pieces:
        if piece.tensor not in last:
            last = {piece.tensor: source.read(piece.tensor)}
            _check_values(who, source, piece.tensor, last[piece.tensor], dtype)
        param = piece.extract(last[piece.tensor])
        flat[tuple(piece.param.split("/"))] = jnp.asarray(param).astype(dtype)
    # The table of pieces must be that of the module.
    expected_shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(expected["params"])
    }
    shapes = {"/".join(path): x.shape for path, x in flat.items()}
    if shapes != expected_shapes:
        wrong = sorted(map(str, set(shapes.items()) ^ set(expected_shapes.items())))
        raise ValueError(f"{who}: parameters do not fit the module: {_shorten(wrong)}")
    return {"params": unflatten_dict(flat)}


def list_pieces(
    who: str, pieces: Iterable[Piece], source: Source, *, ignored: str
) -> list[Piece]:
    """List pieces and check that they and the tensors belong to each other.

    The list ends where more tensors are missing than there are, so that a number of
    layers need not be true.

    Raises:
      ValueError: naming the tensors that are missing, left over or of another shape.
    """
    # Stop early where a configuration claims far more tensors than there are.
    stored, listed, missing = source.shapes, [], set()
    for piece in pieces:
        listed.append(piece)
        if piece.tensor not in stored:
            missing.add(piece.tensor)
        if len(missing) > max(len(stored), _SHOWN):
            break
    # Both sides must agree: nothing missing, nothing left over, no other shape.
    wanted = {piece.tensor: piece.shape for piece in listed}
    unused = [n for n in stored if n not in wanted and not re.search(ignored, n)]
    wrong = sorted(
        f"{name} is {stored[name]}, wanted {shape}"
        for name, shape in wanted.items()
        if name in stored and tuple(stored[name]) != shape
    )
    for fault, names in (
        ("misses the tensors", sorted(missing)),
        ("has tensors of other shapes:", wrong),
        ("has tensors that this kind of model does not have:", unused),
    ):
        if names:
            raise ValueError(
                f"{who}: {source.name} {fault} {_shorten(names)}; do its configuration "
                "and its weights belong together?"
            )
    return listed


def _check_values(
    who: str, source: Source, name: str, tensor: np.ndarray, dtype: Any
) -> None:
    """Raise for values that are not finite or beyond a dtype, and for integers.

    Integers are weights only together with scales, which are elsewhere.
    """
    # Types, then values, then the range of the dtype that they will have.
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(
            f"{who}: {source.name} must store {name} in floating point, got "
            f"{tensor.dtype}; take the weights before they were quantized"
        )
    if not np.isfinite(tensor).all():
        raise ValueError(
            f"{who}: {source.name} must store finite numbers in {name}, got nan or "
            "inf; fetch it again"
        )
    bound = float(jnp.finfo(dtype).max)
    can_exceed = float(jnp.finfo(tensor.dtype).max) > bound
    if can_exceed and float(np.abs(tensor).max(initial=0)) > bound:
        raise ValueError(
            f"{who}: {source.name} has larger numbers in {name} than the {bound:.5g} "
            f"of {jnp.dtype(dtype)}; give another dtype"
        )


def plain_piece(param: str, tensor: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """Yield a parameter that is stored as it is used."""
    yield Piece(param, tensor, shape, np.asarray)


def transposed_piece(
    param: str, tensor: str, shape: tuple[int, ...]
) -> Iterator[Piece]:
    """Yield a matrix that is stored as ``[out, in]``."""
    yield Piece(param, tensor, shape, np.transpose)


def linear_pieces(
    param: str, tensor: str, shape: tuple[int, ...], bias: bool
) -> Iterator[Piece]:
    """Yield matrix and bias of a layer, the matrix stored as ``[out, in]``."""
    yield from transposed_piece(f"{param}/kernel", f"{tensor}.weight", shape)
    if bias:
        yield from plain_piece(f"{param}/bias", f"{tensor}.bias", shape[:1])


def open_safetensors(who: str, folder: Path) -> Source:
    """Open the safetensors files of a folder.

    Raises:
      FileNotFoundError: if there are none, or a shard is missing.
      ValueError: if a file is damaged.
      ImportError: without safetensors.
    """
    # One file, or shards that an index lists.
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        names = _read_index(who, index)
    else:
        raise FileNotFoundError(
            f"{who}: {folder} has no {single.name} and no {index.name}; weights in "
            "other formats have to be saved as safetensors first"
        )
    # The file and the shape of every tensor.
    files: dict[str, TensorFile] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{who}: {folder} lacks the shard {name}; fetch it again"
            )
        file = open_tensors(path, who, extra="lm")
        duplicates = sorted(shapes.keys() & file.shapes.keys())
        if duplicates:
            raise ValueError(
                f"{who}: {folder} has the tensor {duplicates[0]} in {name} and in "
                "another shard; fetch it again"
            )
        files |= dict.fromkeys(file.shapes, file)
        shapes |= file.shapes
    return Source(str(folder), shapes, lambda tensor: files[tensor].read(tensor))


def _read_index(who: str, index: Path) -> list[str]:
    """Read the names of the shards from an index."""
    shards = read_entries(index, who).get("weight_map")
    if not isinstance(shards, Mapping) or not shards:
        raise ValueError(
            f"{who}: {index} has no weight_map, which lists the shards; fetch it again"
        )
    names = sorted(set(map(str, shards.values())))
    for name in names:  # the cache of Hugging Face is made of links
        inside(index.parent, name, who, links=True)
    return names


def read_entries(path: Path, who: str) -> dict[str, Any]:
    """Read the JSON object in a file of a model's folder.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{who}: {path.parent} has no {path.name}; is it the folder of a model?"
        )
    return read_json(path, who)


@contextmanager
def naming_file(who: str, path: Path) -> Iterator[None]:
    """Name the function and the file in the errors of what is parsed inside."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix(f"{who}: ")
        raise ValueError(f"{who}: {path}: {text}") from None


def _shorten(names: list[str]) -> str:
    """Join the first names of a list, and count the others."""
    text = ", ".join(names[:_SHOWN])
    return text if len(names) <= _SHOWN else f"{text} and {len(names) - _SHOWN} more"
