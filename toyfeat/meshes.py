"""Meshes of devices: arrays that lie on them, and work whose products XLA splits.

On a mesh with automatic axes any program runs as it stands.  On one with explicit axes
(``AxisType.Explicit``, the default of :func:`jax.make_mesh`) every product that sums
over a split axis, and every gather from one, would have to name the sharding of its
result, those of a user's model too.  :func:`run_automatic` runs such a program with
automatic axes, and lays its results out where they belong.  Users put
``with jax.set_mesh(mesh):`` around everything, as JAX wants it for explicit axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Shardings = Callable[[AbstractMesh], Any]
"""Makes the shardings of a function's results, a prefix of their tree, for a mesh."""


def run_automatic(fn: Callable[..., Any], shardings: Shardings, *args: Any) -> Any:
    """Call ``fn(*args)`` so that XLA decides how products are split.

    Nothing but the call is done where no argument lies on a mesh with explicit axes.

    Args:
      fn: function of pytrees; what it closes over must not lie on such a mesh.
      shardings: of its results: :func:`everywhere`, :func:`by_rows` or a function.
      args: its arguments.

    Returns:
      Results of ``fn``.

    Raises:
      ValueError: if the arguments lie on different devices, or on explicit axes of a
        mesh that is not the one of the context.
    """
    check_devices("toyfeat", args)
    mesh = explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    _check_context(mesh, args)
    automatic = jax.sharding.auto_axes(
        fn, axes=mesh.axis_names, out_sharding=shardings(mesh)
    )
    return automatic(*args)


def _check_context(mesh: AbstractMesh, args: Any) -> None:
    """Raise where arrays with explicit axes are used without their mesh."""
    is_trace = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
    if not is_trace and jax.sharding.get_abstract_mesh().empty:
        raise ValueError(
            f"toyfeat: arrays on explicit axes {mesh.axis_names} of a mesh must be "
            "used in its context, got none; put `with jax.set_mesh(mesh):` around all "
            "of it, or make the mesh with AxisType.Auto"
        )


def check_devices(who: str, tree: Any) -> None:
    """Raise unless all arrays of a tree can be used in one program.

    Those that lie on no device in particular, as most that are made do, can.

    Args:
      who: the function, for messages.
      tree: of arrays, traced ones or others.

    Raises:
      ValueError: if two of them were put on different devices.
    """
    first: Any = None
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
            continue
        if not leaf.committed:
            continue
        first = leaf if first is None else first
        if leaf.sharding.device_set != first.sharding.device_set:
            raise ValueError(
                f"{who}: all arrays must lie on the same devices, got "
                f"{_describe(first)} and {_describe(leaf)}; put all of them on one "
                "mesh, parameters on every device of it "
                "(toyfeat.meshes.place(params, mesh, PartitionSpec()))"
            )


def _describe(leaf: Array) -> str:
    """Say where an array lies."""
    ids = sorted(device.id for device in leaf.sharding.device_set)
    where = f"device {ids[0]}" if len(ids) == 1 else f"{len(ids)} devices, {ids!s:.40}"
    return f"{leaf.dtype}{list(leaf.shape)} on {where}"


def place(tree: Any, mesh: Mesh | AbstractMesh, specs: Any) -> Any:
    """Put arrays on the devices of a mesh; all layouts are checked before any moves.

    Args:
      tree: arrays; in several processes the same whole values in each.
      mesh: of devices, of all processes if there are several.
      specs: which axes of the mesh split which axes of an array: a
        :class:`jax.sharding.PartitionSpec` for all of them, or a tree of these whose
        structure is a prefix of the arrays'.

    Returns:
      The tree.

    Raises:
      TypeError: if the mesh or a layout is none.
      ValueError: if the structures do not fit, a layout names an axis that the mesh
        does not have, or too many of them, or devices do not divide an axis; names
        the array.

    Example:
      >>> import numpy as np
      >>> from jax.sharding import AbstractMesh, PartitionSpec
      >>> place({"w": np.ones((15, 4))}, AbstractMesh((8,), ("data",)),
      ...       PartitionSpec("data"))
      Traceback (most recent call last):
      ValueError: place: the 8 devices of the axis 'data' must divide axis 0 of ['w'], \
got 15; make it 16, or split another axis
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"place: mesh must be a jax.sharding.Mesh, got {mesh!r:.80}; jax.make_mesh "
            "makes one"
        )
    try:
        every = jax.tree.broadcast(specs, tree, is_leaf=_is_spec)
    except ValueError:
        raise ValueError(
            "place: specs must be one PartitionSpec, or a tree of them as that of the "
            f"arrays, got {specs!s:.200}; name every entry"
        ) from None
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    layouts = jax.tree.leaves(every, is_leaf=_is_spec)
    for (path, leaf), spec in zip(leaves, layouts, strict=True):
        _check_layout(jax.tree_util.keystr(path) or "the array", leaf, mesh, spec)
    if isinstance(mesh, AbstractMesh):
        raise TypeError(
            "place: mesh must have devices to put arrays on, got an AbstractMesh; "
            "jax.make_mesh makes one"
        )
    placed = [
        _copy(leaf, NamedSharding(mesh, spec))
        for (_, leaf), spec in zip(leaves, layouts, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _check_layout(name: str, leaf: Any, mesh: Any, spec: Any) -> None:
    """Raise unless an array can be laid out on a mesh like that."""
    if not _is_spec(spec):
        raise TypeError(
            f"place: the layout of {name} must be a PartitionSpec, got {spec!r:.80}; "
            "PartitionSpec() puts it on every device"
        )
    shape = np.shape(leaf)
    if len(spec) > len(shape):
        raise ValueError(
            f"place: the layout of {name} must have at most its {len(shape)} axes, got "
            f"{spec}; leave out the last ones"
        )
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        names = entry if isinstance(entry, tuple) else (entry,)
        names = tuple(x for x in names if isinstance(x, str))
        if unknown := [x for x in names if x not in mesh.axis_names]:
            raise ValueError(
                f"place: {name} must be split over axes of the mesh, "
                f"{mesh.axis_names}, got {unknown[0]!r}; name one of these"
            )
        parts = int(np.prod([mesh.shape[x] for x in names]))
        if size % parts:
            which = f"axis {names[0]!r}" if len(names) == 1 else f"axes {names}"
            raise ValueError(
                f"place: the {parts} devices of the {which} must divide axis {axis} of "
                f"{name}, got {size}; make it {-(-size // parts) * parts}, or split "
                "another axis"
            )


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Mesh with explicit axes that arrays of a tree lie on, traced ones too."""
    for leaf in jax.tree.leaves(tree):
        mesh = _mesh_of(leaf)
        if mesh is not None and is_explicit(mesh):
            return mesh
    return None


def is_explicit(mesh: Any) -> bool:
    """Tell whether a mesh has an axis whose splits are part of the types of arrays."""
    return AxisType.Explicit in mesh.axis_types


def everywhere(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Put results on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(tree: Any) -> Shardings:
    """Split the first axis of results as that of the arrays of a tree is split."""

    def shardings(mesh: AbstractMesh) -> NamedSharding:
        specs = [_spec_of(leaf) for leaf in jax.tree.leaves(tree)]
        first = next((spec[0] for spec in specs if len(spec) and spec[0]), None)
        return NamedSharding(mesh, PartitionSpec(first))

    return shardings


def like(tree: Any) -> Shardings:
    """Lay results out as the arrays of a tree of the same structure lie."""

    def shardings(mesh: AbstractMesh) -> Any:
        return jax.tree.map(lambda x: NamedSharding(mesh, _spec_of(x)), tree)

    return shardings


def lies_on_mesh(array: Any) -> bool:
    """Tell whether an array lies on a mesh of several devices, in a trace too."""
    mesh = _mesh_of(array)
    return mesh is not None and not mesh.empty and mesh.size > 1


def row_parts(num: int, array: Any) -> int:
    """In how many parts rows are cut so that each part lies on one device.

    A loop over rows that lie on several devices would gather them.  A loop within each
    part, under ``vmap``, leaves them where they are.

    Args:
      num: of rows.
      array: on a mesh or not; in a trace its type says on which.

    Returns:
      Number of devices of the axis that rows are split over, ``"data"`` or else the
      first; 1 without a mesh, or if it does not divide the rows.
    """
    where = _row_sharding(array)
    parts = 1 if where is None else where.mesh.shape[where.spec[0]]
    return parts if num % parts == 0 else 1


def cut_rows(array: Array, parts: int) -> Array:
    """Cut ``[n, ...]`` to ``[parts, n / parts, ...]``, a part for each device."""
    cut = array.reshape(parts, -1, *array.shape[1:])
    where = _row_sharding(array)
    return cut if where is None else jax.lax.with_sharding_constraint(cut, where)


def split_like(array: Array, tree: Any) -> Array:
    """Split the rows of an array as those of a tree, in a trace on a mesh.

    Gradients of what lies nowhere in particular, such as zeros, lie nowhere either.
    """
    for leaf in jax.tree.leaves(tree):
        where = _row_sharding(leaf) if isinstance(leaf, Tracer) else None
        if where is not None and row_parts(len(array), leaf) > 1:
            return jax.lax.with_sharding_constraint(array, where)
    return array


def _row_sharding(array: Any) -> NamedSharding | None:
    """Sharding of the first axis of an array on a mesh with automatic axes."""
    mesh = _mesh_of(array)
    if mesh is None or mesh.empty:
        return None
    axis = "data" if "data" in mesh.axis_names else mesh.axis_names[0]
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return NamedSharding(mesh, PartitionSpec(axis))


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes of arrays, without where they lie, to trace a model for."""

    def shape(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf

    return jax.tree.map(shape, tree)


def is_known(array: Any) -> bool:
    """Tell whether the values of an array can be read in this process."""
    if isinstance(array, Tracer):
        return False
    return getattr(array, "is_fully_addressable", True)


def device_mesh(tree: Any) -> Mesh | AbstractMesh | None:
    """Mesh of several devices that arrays of a tree lie on, outside of a trace."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            where = leaf.sharding
            if isinstance(where, NamedSharding) and where.mesh.size > 1:
                return where.mesh
    return None


def copy_everywhere(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Copy arrays to every device of a mesh, also of other processes.

    Those that are spread over several processes stay where they are; all others must
    have the same values in every process.
    """
    return jax.tree.map(lambda leaf: _copy(leaf, everywhere(mesh)), tree)


def _copy(leaf: Any, where: NamedSharding) -> Any:
    """Copy an array of this process to devices that other processes may have."""
    if not getattr(leaf, "is_fully_addressable", True):
        return leaf
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        data = _copy(jax.random.key_data(leaf), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, where, lambda at: value[at])


def _mesh_of(leaf: Any) -> AbstractMesh | None:
    """Mesh in the type of an array, which only an array of JAX has."""
    return jax.typeof(leaf).sharding.mesh if isinstance(leaf, jax.Array) else None


def _spec_of(leaf: Any) -> PartitionSpec:
    """Split axes in the type of an array."""
    if not isinstance(leaf, jax.Array):
        return PartitionSpec()
    return jax.typeof(leaf).sharding.spec
