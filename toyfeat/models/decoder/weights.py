"""Assembly of a module's parameters from the tensors of released weights."""

import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from toyfeat.types import Params


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
    pieces = list(pieces)
    _check_tensors(who, pieces, source, ignored)
    # Read every tensor once; the pieces of a tensor follow each other.
    flat: dict[tuple[str, ...], jax.Array] = {}
    last: dict[str, np.ndarray] = {}
    for piece in pieces:
        if piece.tensor not in last:
            last = {piece.tensor: source.read(piece.tensor)}
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


def _check_tensors(who: str, pieces: list[Piece], source: Source, ignored: str) -> None:
    """Raise for tensors that are missing, left over or of another shape."""
    stored, wanted = source.shapes, {piece.tensor: piece.shape for piece in pieces}
    missing = sorted(wanted.keys() - stored.keys())
    unused = [n for n in stored if n not in wanted and not re.search(ignored, n)]
    wrong = sorted(
        f"{name} is {stored[name]}, wanted {shape}"
        for name, shape in wanted.items()
        if name in stored and tuple(stored[name]) != shape
    )
    for fault, names in (
        ("misses the tensors", missing),
        ("has tensors of other shapes:", wrong),
        ("has tensors that this kind of model does not have:", unused),
    ):
        if names:
            raise ValueError(
                f"{who}: {source.name} {fault} {_shorten(names)}; do its configuration "
                "and its weights belong together?"
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
    try:
        library = importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            f'{who}: safetensors is not installed: pip install "toyfeat[lm]"'
        ) from error
    # The file and the shape of every tensor.
    files: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{who}: {folder} lacks the shard {name}")
        try:
            file = library.safe_open(path, framework="numpy")
        except Exception as error:  # SafetensorError is an Exception and nothing more
            raise ValueError(
                f"{who}: {path} is not a whole safetensors file ({error}); fetch it "
                "again"
            ) from error
        for tensor in file.keys():  # noqa: SIM118 (it is no dict)
            files[tensor] = file
            shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
    return Source(str(folder), shapes, lambda tensor: files[tensor].get_tensor(tensor))


def _read_index(who: str, index: Path) -> list[str]:
    """Read the names of the shards from an index."""
    content = read_json(who, index)
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(shards, Mapping) or not shards:
        raise ValueError(f"{who}: {index} has no weight_map, which lists the shards")
    return sorted(set(map(str, shards.values())))


def read_json(who: str, path: Path) -> Any:
    """Read a JSON file of a model's folder.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{who}: {path.parent} has no {path.name}; is it the folder of a model?"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{who}: {path} is no whole JSON file ({error})") from None


def _shorten(names: list[str]) -> str:
    """Join the first names of a list, and count the others."""
    text = ", ".join(names[:4])
    return text if len(names) <= 4 else f"{text} and {len(names) - 4} more"
