"""Dictionaries on a mesh: which of its axes split what, and work on the shards.

Only the choice of codes is written shard by shard (:mod:`.selection`).  All else is
elementwise or a matrix product, which XLA splits by itself: a decode is a local product
and one sum of ``[N, D]`` over the axis of the latents.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from toyfeat.meshes import is_explicit


class Split(NamedTuple):
    """Axes of a mesh that a dictionary is split over.

    Attributes:
      mesh: of devices.
      data: axis that examples are split over, or ``None``.
      latents: axis that latents are split over, or ``None``.
    """

    mesh: Mesh | AbstractMesh
    data: str | None
    latents: str | None


def split_axes(split: Split, num: int) -> tuple[str | None, str | None]:
    """Axes of ``[num, M]``; examples that do not divide are on every device."""
    divides = split.data is not None and num % split.mesh.shape[split.data] == 0
    return (split.data if divides else None), split.latents


def sharding(split: Split, *axes: str | None) -> NamedSharding:
    """Sharding of an array, given the axis of the mesh for each of its axes."""
    return NamedSharding(split.mesh, PartitionSpec(*axes))


def tensor_sharding(split: Split, axis: int | None) -> NamedSharding:
    """Sharding of a tensor that has one entry per latent along ``axis``."""
    return sharding(split, *(() if axis is None else [None] * axis + [split.latents]))


def over_shards(
    split: Split, fn: Callable[..., Any], in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    """Run ``fn`` on the shards of its arguments.

    Args:
      split: the mesh.
      fn: function of shards; it may use the collectives of :mod:`jax.lax`.
      in_axes: for each argument the names of the axes that split it.
      out_axes: likewise for the result.

    Returns:
      Function of the arrays.
    """
    context = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        fn,
        mesh=split.mesh if context.empty else None,
        in_specs=tuple(PartitionSpec(*axes) for axes in in_axes),
        out_specs=PartitionSpec(*out_axes),
        check_vma=False,  # loops start from what no axis splits
    )


def lay_out(array: Any, sharding: NamedSharding) -> Any:
    """Lay an array out, in a trace or outside of one.

    Under ``vmap`` the sharding is that of each member.
    """
    # A context has the types of the axes, which run_automatic changes.
    context = jax.sharding.get_abstract_mesh()
    mesh = sharding.mesh if context.empty else context
    where = sharding if context.empty else sharding.spec
    if is_explicit(mesh):
        return jax.sharding.reshard(array, where)
    return jax.lax.with_sharding_constraint(array, where)


def run_automatic(
    split: Split, fn: Callable[..., Any], shardings: Any, *args: Any
) -> Any:
    """Call ``fn(*args)`` so that XLA decides how products are split.

    On a mesh with explicit axes every product would have to name the sharding of its
    result; in here axes are automatic, and results are laid out at the end.

    Args:
      split: the mesh.
      fn: function of pytrees of arrays.
      shardings: of its results, a prefix of their tree.
      args: its arguments.

    Returns:
      Results of ``fn``.
    """
    context = jax.sharding.get_abstract_mesh()
    if not is_explicit(split.mesh if context.empty else context):
        return fn(*args)
    automatic = jax.sharding.auto_axes(
        fn, axes=split.mesh.axis_names, out_sharding=shardings
    )
    return automatic(*args)
