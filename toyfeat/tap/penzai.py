"""Probed models from penzai layers."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.tap.extras import import_extra
from toyfeat.tap.marks import mark, run_marked
from toyfeat.tap.probes import infer_batch_size
from toyfeat.types import Acts, Inputs, Outputs, Params, Probe, Probed


def from_penzai(
    model: Any, axes: Sequence[str], *, order: Sequence[str] = (), **side_inputs: Any
) -> tuple[Probed, Params]:
    """Make a probed model of a penzai layer, as it is.

    Every call of a layer in it is a site, named after its path: ``"sublayers/0"``,
    ``"shared#1"`` for a second call; the outputs are ``"__call__"``.  Checkpointed
    layers work as they are; what runs in a ``LayerStack`` are the sites
    ``"stacked_sublayers/up@2"``, one per layer.

    Named axes have no order, those of a site have one: first the axes of the inputs
    that the value has, then those of ``order``, then the others by name.  Values
    without the axis of the batch are no sites.

    Args:
      model: a ``pz.nn.Layer``, in the mode it is to be analysed in.
      axes: names of the axes of the inputs in their order, that of the batch first:
        ``("batch", "seq")`` for tokens.
      order: names of other axes in their order, that of the features last:
        ``("query_heads", "projection")``.
      **side_inputs: keyword arguments of the call, shared by all examples.

    Returns:
      ``probed(params, inputs, probes) -> (outputs, acts)`` and the ``params`` it
      takes: the values of the variables of the model and of the side inputs, as
      ``pz.unbind_variables(model, freeze=True)`` returns them.  ``inputs`` and
      ``outputs`` are arrays without names; new values of state variables are dropped.

    Raises:
      ImportError: without the ``penzai`` extra.
      TypeError: if ``model`` is no layer, or ``axes`` are no names.
      ValueError: when called, if ``params`` have another structure, inputs another
        number of axes, if a probe names a site that does not exist, or if a function
        is given for one layer of a stack.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from penzai.models.simple_mlp import MLP
      >>> model = MLP.from_config(jax.random.key(0), [2, 4, 1])
      >>> probed, params = from_penzai(model, ("batch", "features"))
      >>> outputs, acts = probed(params, jnp.ones((3, 2)), {})
      >>> [site for site in acts if site.count("/") == 1], acts["sublayers/0"].shape
      (['sublayers/0', 'sublayers/1', 'sublayers/2'], (3, 4))
    """
    pz = import_extra("from_penzai", "penzai").pz
    if not isinstance(model, pz.nn.Layer):
        raise TypeError(
            f"from_penzai: wanted a pz.nn.Layer, got {type(model).__name__}; for a "
            "function use from_function"
        )
    for name, given in (("axes", axes), ("order", order)):
        if isinstance(given, str) or not all(isinstance(axis, str) for axis in given):
            raise TypeError(
                f"from_penzai: {name} must be names, of axes that of the batch first, "
                f'got {given!r}; give a tuple, such as ("batch", "seq")'
            )
    if not axes or len({*axes, *order}) < len(axes) + len(order):
        raise ValueError(
            "from_penzai: axes must name that of the batch at least, and each name "
            f"once in axes and order, got {tuple(axes)} and {tuple(order)}"
        )
    (unbound, side), params = pz.unbind_variables((model, side_inputs), freeze=True)
    structure = jax.tree.structure(params)
    marked = _marked(pz, unbound, (), (*axes, *order))

    def unwrap(value: Any) -> Any:
        names = _sort_axes(value, (*axes, *order))
        return value.unwrap(*names) if pz.nx.is_namedarray(value) else value

    def call(params: Params, inputs: Inputs) -> Outputs:
        named = jax.tree.map(lambda x: pz.nx.wrap(x, *axes), inputs)
        outputs, _ = marked.stateless_call(params, named, **side)
        return jax.tree.map(unwrap, outputs, is_leaf=pz.nx.is_namedarray)

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        _check(params, structure, inputs, axes)
        options = {"batch": infer_batch_size(inputs), "batched": True}
        inputs = jax.tree.map(jnp.asarray, inputs)
        return run_marked("from_penzai", call, params, inputs, probes, **options)

    return probed, params


def _check(params: Params, structure: Any, inputs: Inputs, axes: Sequence[str]) -> None:
    """Refuse what are no values of the variables, or other inputs than arrays."""
    if jax.tree.structure(params) != structure:
        raise ValueError(
            "from_penzai: params must be the values of the model's variables, as "
            f"from_penzai returns them, got {type(params).__name__}; give the second "
            "part of pz.unbind_variables(model, freeze=True)"
        )
    for leaf in jax.tree.leaves(inputs, is_leaf=lambda x: hasattr(x, "named_shape")):
        names = dict(getattr(leaf, "named_shape", {}))
        if names or jnp.ndim(leaf) != len(axes):
            found = f"axes {names}" if names else f"the shape {jnp.shape(leaf)}"
            raise ValueError(
                f"from_penzai: inputs must be arrays without names whose axes are "
                f"{tuple(axes)}, got {found}; give x.unwrap(*axes), or the axes that "
                "the inputs have"
            )


def _marked(pz: Any, layer: Any, path: tuple[Any, ...], axes: tuple[str, ...]) -> Any:
    """Wrap a layer, and all layers in it, so that they mark their values."""

    def is_child(node: Any) -> bool:
        return node is not layer and isinstance(node, pz.nn.Layer)

    def wrap(inner: tuple[Any, ...], node: Any) -> Any:
        return _marked(pz, node, (*path, *inner), axes) if is_child(node) else node

    inside = jax.tree_util.tree_map_with_path(wrap, layer, is_leaf=is_child)
    keys = (jax.tree_util.keystr((key,), simple=True).lstrip(".") for key in path)
    return _marking_class(pz)(inside, "/".join(keys) or "__call__", axes)


@functools.cache
def _marking_class(pz: Any) -> Any:
    """Make the class of layers that mark the value of the layer in them."""

    @pz.pytree_dataclass
    class Marking(pz.nn.Layer):
        layer: Any
        site: str = dataclasses.field(metadata={"pytree_node": False})
        axes: tuple[str, ...] = dataclasses.field(metadata={"pytree_node": False})

        def __call__(self, argument: Any, /, **side_inputs: Any) -> Any:
            value = self.layer(argument, **side_inputs)
            sort = functools.partial(_sort_axes, axes=self.axes)

            def unwrap(node: Any) -> Any:
                # Only values of the whole batch are marked, as plain arrays.
                return node.unwrap(*sort(node)) if self.axes[0] in sort(node) else None

            def wrap(node: Any, array: Any) -> Any:
                return node if array is None else pz.nx.wrap(array, *sort(node))

            is_named = pz.nx.is_namedarray
            plain = jax.tree.map(unwrap, value, is_leaf=is_named)
            return jax.tree.map(wrap, value, mark(self.site, plain), is_leaf=is_named)

    return Marking


def _sort_axes(value: Any, axes: Sequence[str]) -> tuple[str, ...]:
    """Sort the axes of a named array: known ones in their order, then by name."""
    if getattr(value, "positional_shape", ()):  # one example of a map of the model's
        return ()
    place = {axis: number for number, axis in enumerate(axes)}
    names = getattr(value, "named_shape", {})
    return tuple(
        sorted(names, key=lambda axis: (place.get(axis, len(axes)), str(axis)))
    )
