"""Parts of batches: each process reads the rows of its devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from toyfeat.checks import check_type
from toyfeat.types import Taps


class Part(NamedTuple):
    """Rows of a batch that this process reads.

    Attributes:
      rows: ``[n]`` int, ascending.
      assemble: makes global arrays of the rows of all processes, each of which gives
        arrays ``[n, ...]`` of the host.
    """

    rows: np.ndarray
    assemble: Callable[[Taps], Taps]


def batch_part(who: str, batch: int, mesh: Mesh, axis: str) -> Part:
    """Split a batch over an axis of a mesh.

    Args:
      who: the function, for messages.
      batch: rows of all processes.
      mesh: of devices.
      axis: that rows are split over.

    Returns:
      :class:`Part` of this process.

    Raises:
      TypeError: if the mesh is none.
      ValueError: if it does not have the axis, or that does not divide the batch.
    """
    check_type(who, "mesh", mesh, Mesh, hint="jax.make_mesh makes one")
    if axis not in mesh.axis_names:
        raise ValueError(
            f"{who}: axis must be one of {mesh.axis_names} of the mesh, got {axis!r}; "
            "give one of them"
        )
    devices = mesh.shape[axis]
    if batch % devices:
        raise ValueError(
            f"{who}: the {devices} devices of the axis {axis!r} must divide the batch, "
            f"got {batch} rows; make it {-(-batch // devices) * devices}"
        )
    split = NamedSharding(mesh, PartitionSpec(axis))
    slices = split.addressable_devices_indices_map((batch,)).values()
    rows = [np.arange(batch)[part] for part in slices if part is not None]

    def assemble(x: Any) -> jax.Array:
        shape = (batch, *x.shape[1:])
        return jax.make_array_from_process_local_data(split, x, shape)

    return Part(np.unique(np.concatenate(rows)), partial(jax.tree.map, assemble))
