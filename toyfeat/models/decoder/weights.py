"""Weights in the files of released models, and the parameters they are here."""

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

Take = Callable[[np.ndarray], np.ndarray]


class Piece(NamedTuple):
    """A parameter as a part of a tensor in a file.

    Attributes:
      param: path of the parameter, ``"blocks_0/attn/query/kernel"``.
      tensor: name in the file.
      shape: of the tensor.
      take: the parameter out of the tensor.
    """

    param: str
    tensor: str
    shape: tuple[int, ...]
    take: Take


class Source(NamedTuple):
    """Tensors of files, read one at a time.

    Attributes:
      name: of the file or folder, for messages.
      shapes: name to shape.
      read: name to array.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def assembled(
    who: str,
    wanted: Params,
    pieces: Iterable[Piece],
    source: Source,
    *,
    dtype: Any,
    ignored: str,
) -> Params:
    """Parameters of a flax module out of files, every tensor accounted for.

    Args:
      who: the function to name in errors.
      wanted: what its ``init`` gives, shapes are enough.
      pieces: where its parameters are.
      source: the files.
      dtype: of the parameters.
      ignored: pattern of tensors that are no parameters.

    Returns:
      ``{"params": ...}``.

    Raises:
      ValueError: naming the tensors that are missing, left over or of another shape.
    """
    pieces = list(pieces)
    used = {piece.tensor for piece in pieces}
    missing = sorted(used - source.shapes.keys())
    left = [n for n in source.shapes if n not in used and not re.search(ignored, n)]
    wrong = sorted(
        f"{p.tensor} is {source.shapes[p.tensor]}, wanted {p.shape}"
        for p in {p.tensor: p for p in pieces}.values()
        if p.tensor in source.shapes and tuple(source.shapes[p.tensor]) != p.shape
    )
    for trouble, names in (
        ("misses the tensors", missing),
        ("has tensors of other shapes:", wrong),
        ("has tensors that this kind of model does not have:", left),
    ):
        if names:
            raise ValueError(
                f"{who}: {source.name} {trouble} {_some(names)}; do its configuration "
                "and its weights belong together?"
            )
    flat: dict[tuple[str, ...], jax.Array] = {}
    tensors: dict[str, np.ndarray] = {}  # the last one, which pieces share
    for piece in pieces:
        if piece.tensor not in tensors:
            tensors = {piece.tensor: source.read(piece.tensor)}
        taken = piece.take(tensors[piece.tensor])
        flat[tuple(piece.param.split("/"))] = jnp.asarray(taken).astype(dtype)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(wanted["params"])
    }
    found = {"/".join(path): x.shape for path, x in flat.items()}
    if shapes != found:  # the table of pieces is not the module's
        wrong = sorted(map(str, set(shapes.items()) ^ set(found.items())))
        raise ValueError(f"{who}: parameters do not fit the module: {_some(wrong)}")
    return {"params": unflatten_dict(flat)}


def plain(param: str, tensor: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """A tensor that is stored as it is used."""
    yield Piece(param, tensor, shape, np.asarray)


def dense(param: str, tensor: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """A matrix that is stored as ``[out, in]``."""
    yield Piece(param, tensor, shape, np.transpose)


def linear(
    param: str, tensor: str, shape: tuple[int, ...], bias: bool
) -> Iterator[Piece]:
    """Matrix and bias of a layer, the matrix stored as ``[out, in]``."""
    yield from dense(f"{param}/kernel", f"{tensor}.weight", shape)
    if bias:
        yield from plain(f"{param}/bias", f"{tensor}.bias", shape[:1])


def folder_source(who: str, folder: Path) -> Source:
    """All tensors of the safetensors files of a folder.

    Raises:
      FileNotFoundError: if there are none, or a shard is missing.
      ValueError: if a file is not whole.
      ImportError: without safetensors.
    """
    whole, index = (
        folder / "model.safetensors",
        folder / "model.safetensors.index.json",
    )
    if whole.is_file():
        names = [whole.name]
    elif index.is_file():
        names = _shards(who, index)
    else:
        raise FileNotFoundError(
            f"{who}: {folder} has no {whole.name} and no {index.name}; weights in "
            "other formats have to be saved as safetensors first"
        )
    try:
        library = importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            f'{who}: safetensors is not installed: pip install "toyfeat[lm]"'
        ) from error
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


def _shards(who: str, index: Path) -> list[str]:
    """Names of the files that an index lists."""
    found = json_of(who, index)
    where = found.get("weight_map") if isinstance(found, Mapping) else None
    if not isinstance(where, Mapping) or not where:
        raise ValueError(f"{who}: {index} has no weight_map, which lists the shards")
    return sorted(set(map(str, where.values())))


def json_of(who: str, path: Path) -> Any:
    """The content of a JSON file of a model's folder.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not whole.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{who}: {path.parent} has no {path.name}; is it the folder of a model?"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{who}: {path} is no whole JSON file ({error})") from None


def _some(names: list[str]) -> str:
    text = ", ".join(names[:4])
    return text if len(names) <= 4 else f"{text} and {len(names) - 4} more"
