"""Site names and the application of probes, shared by every adapter."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.meshes import shapes_of
from toyfeat.types import Array, Inputs, Params, Probe, Probed


def call_name(name: str, call: int) -> str:
    """Name the site of a repeated call: ``name``, ``name#1``, ``name#2``, ..."""
    return name if call == 0 else f"{name}#{call}"


def _leaf_name(name: str, path: tuple[Any, ...]) -> str:
    """Name the site of a leaf of a pytree, such as ``name[0][key]``."""
    return name + "".join(f"[{jax.tree_util.keystr((k,), simple=True)}]" for k in path)


def is_float_array(value: Any) -> bool:
    """Return whether a value is an array that can carry a gradient."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)


def visit(name: str, value: Any, visit_leaf: Callable[[str, Array], Array], /) -> Any:
    """Map ``visit_leaf(site, leaf)`` over the float arrays of a value.

    A plain array keeps the name; the leaves of a tuple or a dict become the
    sites ``name[0]``, ``name[key]``, ...  Everything else is returned untouched.
    """

    def visit_path(path: tuple[Any, ...], leaf: Any) -> Any:
        return (
            visit_leaf(_leaf_name(name, path), leaf) if is_float_array(leaf) else leaf
        )

    return jax.tree_util.tree_map_with_path(visit_path, value)


def check_new_site(site: str, acts: Mapping[str, Any], who: str) -> None:
    """Raise if a second value would get the name of a site, and so its probe."""
    if site not in acts:
        return
    fix = {
        "from_function": "give one of them another name",
    }.get(
        who,
        "make the model a submodule `model` of a small module of your own, so that its "
        "modules become 'model/...' and its methods 'model....'",
    )
    raise ValueError(
        f"{who}: every value needs a site name of its own, got two values named "
        f"{site!r} (a method or a repeated call, and a module of that name); {fix}"
    )


def apply_probe(site: str, act: Array, probe: Probe | None) -> Array:
    """Apply one probe to one activation, keeping its shape and dtype.

    Args:
      site: the name, for error messages.
      act: any shape.
      probe: ``None``, an array that broadcasts to ``act``, or a function.

    Raises:
      ValueError: if the result would not have the shape of ``act``.
    """
    if probe is None:
        return act
    # A function replaces the activation.
    if callable(probe):
        out = probe(act)
        if jnp.shape(out) != act.shape:
            raise ValueError(
                f"probe at site {site!r}: the function must keep the shape "
                f"{act.shape}, it returned {jnp.shape(out)}"
            )
        return jnp.asarray(out).astype(act.dtype)
    # An array is added to it.
    probe = jnp.asarray(probe)
    try:
        delta = jnp.broadcast_to(probe, act.shape)
    except ValueError:
        raise ValueError(
            f"probe at site {site!r}: an array is added to an activation of shape "
            f"{act.shape}, got shape {probe.shape}; give that shape or one that "
            "broadcasts to it, such as the width alone"
        ) from None
    return act + delta.astype(act.dtype)


def split_inputs(
    who: str, method: Callable[..., Any], inputs: Inputs, options: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into positional and keyword arguments of a model's method.

    Args:
      who: the adapter, for error messages.
      method: the unbound method; its first parameter is the module.
      inputs: a tuple of positional arguments, a dict of keyword arguments, or the one
        positional argument.  A dict none of whose keys is a parameter of the method
        is the one argument too.
      options: further keyword arguments of the call.

    Raises:
      TypeError: if the inputs are a list, or a dict with some wrong keys.
    """
    if type(inputs) is list:
        raise TypeError(
            f"{who}: inputs must be an array, a tuple of positional arguments or a "
            f"dict of keyword arguments, got a list of {len(inputs)}; give "
            "tuple(inputs), or (inputs,) to a model whose one argument is a list"
        )
    # Exact types: a named tuple is one structured argument.
    if type(inputs) is tuple:
        return inputs, {}
    if not isinstance(inputs, Mapping):
        return (inputs,), {}
    # A dict is keyword arguments if the method can be called with its keys; one that
    # shares no key with the parameters is an argument itself.
    signature = inspect.signature(method)
    known = {k: v for k, v in options.items() if k in signature.parameters}
    try:
        signature.bind(None, **inputs, **known)
    except TypeError:
        if any(key in signature.parameters for key in inputs):
            raise TypeError(explain_inputs(who, method, inputs)) from None
        return (inputs,), {}
    return (), dict(inputs)


def explain_inputs(who: str, method: Callable[..., Any], inputs: Inputs) -> str | None:
    """Explain a failed call whose inputs are a dict; ``None`` for other inputs."""
    if not isinstance(inputs, Mapping):
        return None
    return (
        f"{who}: inputs that are a dict must have the names of the model's parameters "
        f"{list(inspect.signature(method).parameters)[1:]}, got the keys "
        f"{list(inputs)}; rename the keys, or give a tuple of positional arguments"
    )


def check_params(params: Params, who: str) -> None:
    """Raise if a leaf of the parameters is nothing that JAX can trace."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (
            hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))
        ):
            raise TypeError(
                f"{who}: params must be a pytree of arrays, got a "
                f"{type(leaf).__name__} at {jax.tree_util.keystr(path) or 'the top'}; "
                "keep it out of params; from_equinox, from_nnx and from_penzai return "
                "them (of equinox they are eqx.filter(model, eqx.is_array))"
            )


# What a layer in train mode does, in messages.
RANDOM = "draws random numbers"
BATCH = "computes statistics over the batch"


def call_option(
    name: str, module: Any, method: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Return an option of a layer: an argument of the call, or else its attribute."""
    if not hasattr(module, name):
        return None
    value = inspect.signature(method).bind_partial(*args, **kwargs).arguments.get(name)
    return getattr(module, name) if value is None else value


def warn_batch_statistics(who: str, notes: Mapping[str, str]) -> None:
    """Warn if layers normalise over the batch, which mixes the examples."""
    layers = [name for name, note in notes.items() if note == BATCH]
    if layers:
        warnings.warn(
            f"{who}: every example must be run on its own, got layers in train mode "
            f"that compute statistics over the batch: {', '.join(layers)}; run the "
            "model in evaluation mode (train=False, model.eval(), "
            "use_running_average=True)",
            stacklevel=3,
        )


def infer_batch_size(inputs: Inputs) -> int:
    """Return the leading axis ``B`` that all leaves of the inputs share.

    Raises:
      TypeError: if a leaf is text.
      ValueError: if there is no leaf, a leaf without axes, or leaves that differ.
    """
    for leaf in jax.tree.leaves(inputs):
        if isinstance(leaf, str):
            raise TypeError(
                f"inputs: wanted arrays, got the text {leaf!r:.40}; give numbers of "
                "tokens [B, T], as the tokenizer of the model makes them"
            )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    sizes = {shape[0] for shape in shapes if shape}
    if len(sizes) != 1 or () in shapes:
        raise ValueError(
            "inputs: every leaf needs the same leading batch axis, got the shapes "
            f"{shapes}; give arrays with that axis in front (tokens [B, T], no list "
            "of numbers), and put constants into params"
        )
    return sizes.pop()


def check_sites(sites: Iterable[str], known: Iterable[str], *, who: str) -> None:
    """Raise if the model does not have one of the requested sites."""
    known = list(known)
    missing = [site for site in sites if site not in known]
    if missing:
        raise ValueError(unknown_sites_message(missing, known, who=who))


def unknown_sites_message(missing: list[str], known: list[str], *, who: str) -> str:
    """Format an error: the missing sites, the known ones, the usual reason."""
    near = [m for name in missing for m in difflib.get_close_matches(name, known, 1)]
    trees = [m for m in missing if any(k.startswith(m + "[") for k in known)]
    if trees:
        reason = f"{trees[0]!r} is a tuple or dict: ask for one of its parts"
    elif near:
        reason = f"the path is misspelt, {near[0]!r} was meant"
    else:
        reason = (
            "the path is misspelt, the module was not called for these inputs, or it "
            "runs where no value gets out (a plain jax.vmap, jax.checkpoint or "
            "jax.lax.scan of the model's, a branch of a condition, a loop); take the "
            "site of the module around it"
        )
    return (
        f"{who}: no site {', '.join(map(repr, missing))}; the sites are "
        f"{', '.join(map(repr, known)) or '(none)'}. Likely: {reason}. "
        "Only floating-point values are sites"
    )


def site_shapes(
    probed: Probed, params: Params, inputs: Inputs
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every site of a model, without running it.

    Args:
      probed: the model.
      params: its parameters.
      inputs: a pytree whose leaves have leading axis ``B``.

    Returns:
      Site name to ``ShapeDtypeStruct``, in order of computation.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> probed = ft.from_split(lambda w, x: x @ w, lambda w, a: a.sum(-1))
      >>> ft.site_shapes(probed, jnp.ones((2, 3)), jnp.ones((5, 2)))["acts"].shape
      (5, 3)
    """
    check_params(params, "site_shapes")
    order: list[str] = []  # which a dict that leaves a trace does not keep

    def record(params: Params, inputs: Inputs) -> Any:
        acts = probed(params, inputs, {})[1]
        order[:] = acts
        return acts

    shapes = jax.eval_shape(record, *shapes_of((params, inputs)))
    return {site: shapes[site] for site in order}
