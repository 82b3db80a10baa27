"""Chunks of a batch: which models may be run in them, and the map over them."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from toyfeat.meshes import cut_rows, row_parts
from toyfeat.tap.probes import RANDOM
from toyfeat.types import Array, Inputs, Params, Probed, Taps

# Primitives that draw from a key, or make keys of it, in a shape of their own.
_DRAWS = ("random_bits", "random_split")


def check_chunks(
    probed: Probed, params: Params, inputs: Inputs, size: int, batch_size: int
) -> None:
    """Raise if the result would depend on which inputs run together.

    Numbers that are drawn for a whole batch from one key would be the same in every
    chunk.  Keys of one input each, given with the inputs, are fine.

    Args:
      probed: the model; an adapter may know the names of such layers.
      params: its parameters.
      inputs: pytree with leading axis ``size``.
      size: ``B``.
      batch_size: inputs of a chunk, fewer than ``size``.
    """
    train_mode = getattr(probed, "train_mode", None)
    names = [] if train_mode is None else list(train_mode(params, inputs))
    # A draw that has another shape in a chunk is one for all inputs of it.
    draws = _drawn_shapes(probed, params, inputs, batch_size)
    if not draws or draws == _drawn_shapes(probed, params, inputs, size):
        names = [name for name in names if not name.endswith(RANDOM)]
    elif not names:
        names = [f"it {RANDOM} for a whole batch, as dropout does"]
    if names:
        raise ValueError(
            f"tap: batch_size={batch_size} must not change the result for {size} "
            f"inputs, got a model in train mode: {'; '.join(names)}; switch that off "
            "(deterministic=True, train=False, model.eval()), give every input a key "
            "of its own, or leave batch_size out"
        )


def _drawn_shapes(
    probed: Probed, params: Params, inputs: Inputs, size: int
) -> list[tuple[int, ...]]:
    """List the shapes that a model draws from one key, for ``size`` inputs."""

    def resize(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)

    # A trace without device work.
    traced = jax.make_jaxpr(lambda p, x: probed(p, x, {}))(
        params, jax.tree.map(resize, inputs)
    )
    return [
        tuple(equation.params["shape"])
        for equation in _equations(traced.jaxpr)
        if equation.primitive.name in _DRAWS
    ]


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Iterate over the equations of a program, those of inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(list(equation.params.values())):
            inner = leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf
            if isinstance(inner, Jaxpr):
                yield from _equations(inner)


def map_chunks(
    taps_of: Callable[[Any], dict[str, Taps]], tree: Any, size: int, batch_size: int
) -> dict[str, Taps]:
    """Map over chunks of the batch; the padding of the last one is cut off.

    On a mesh every chunk has inputs of every device.
    """
    parts = next((n for x in jax.tree.leaves(tree) if (n := row_parts(size, x)) > 1), 1)
    if batch_size % parts:
        parts = 1
    # The last input of a part is repeated until its chunks are full.
    length, width = size // parts, batch_size // parts
    chunks = -(-length // width)
    index = jnp.minimum(jnp.arange(chunks * width), length - 1)

    def split(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        cut = leaf[None] if parts == 1 else cut_rows(leaf, parts)
        padded = cut if length == chunks * width else cut[:, index]
        # [parts, chunks * width, ...] to [chunks, parts * width, ...]
        by_chunk = padded.reshape((parts, chunks, width, *leaf.shape[1:])).swapaxes(
            0, 1
        )
        return by_chunk.reshape((chunks, batch_size, *leaf.shape[1:]))

    def join(leaf: Array) -> Array:  # [chunks, batch_size * positions, ...]
        by_part = leaf.reshape((chunks, parts, -1, *leaf.shape[2:])).swapaxes(0, 1)
        flat = by_part.reshape((parts, -1, *leaf.shape[2:]))
        flat = flat[:, : length * leaf.shape[1] // batch_size]
        return flat.reshape((-1, *leaf.shape[2:]))

    return jax.tree.map(join, jax.lax.map(taps_of, jax.tree.map(split, tree)))
