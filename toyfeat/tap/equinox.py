"""Probed models from unmodified equinox modules."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_key
from toyfeat.tap.extras import import_extra
from toyfeat.tap.marks import mark, run_marked
from toyfeat.tap.probes import BATCH, RANDOM, infer_batch_size, split_inputs
from toyfeat.types import Acts, Inputs, Outputs, Params, Probe, Probed

_PATH = "_toyfeat_path"  # field of a module that marks its values


def from_equinox(
    model: Any,
    *,
    method: str = "__call__",
    batched: bool = False,
    state: Any = None,
    key: Any = None,
    **call_kwargs: Any,
) -> tuple[Probed, Params]:
    """Make a probed model of an equinox module, as it is.

    Every call of a public method of a module in it is a site, named after its path:
    ``"layers/0"`` for ``__call__``, ``"embed.attend"`` for another method,
    ``"shared#1"`` for a second call.  An axis over which the model maps a module itself
    (``jax.vmap(self.mlp)(x)``) is an axis of positions.  ``filter_jit``,
    ``filter_checkpoint`` and ``filter_vmap`` work as they are; what runs in a
    ``jax.lax.scan`` are the sites ``"mlp@2"``, one per layer or time step.  No sites
    are what runs in a condition, a ``while`` loop or a custom derivative.

    Args:
      model: the module, in the mode it is to be analysed in
        (``eqx.nn.inference_mode(model)`` switches off dropout and batch statistics).
      method: the method to call.
      batched: whether the model takes a batch; by default it takes one example, as
        equinox's layers do, and is mapped over the batch.
      state: an ``eqx.nn.State`` that is passed as the last positional argument.  The
        model returns its outputs and a new state, which is dropped.
      key: passed as ``key=``, split into one for each example.
      **call_kwargs: keyword arguments of the call, shared by all examples.

    Returns:
      ``probed(params, inputs, probes) -> (outputs, acts)`` and the ``params`` it
      takes: the arrays of the module, ``eqx.filter(model, eqx.is_array)``, with a
      ``state`` the pair of both.  ``inputs`` that are a tuple are passed as positional
      arguments, a dict as keyword arguments if the method has parameters of these
      names.  ``probed.train_mode(params, inputs)`` names the layers in train mode,
      whose result depends on random numbers or on the other examples.

    Raises:
      ImportError: without the ``equinox`` extra.
      TypeError: if ``model`` is no equinox module.
      ValueError: when called, if ``params`` have another structure, if a probe names a
        site that does not exist, if a function is given for one layer of a scan, if
        two values have one site name, or if a layer in train mode lacks what it needs.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp
      >>> model = eqx.nn.MLP(2, 1, 4, depth=1, key=jax.random.key(0))
      >>> probed, params = from_equinox(model)
      >>> outputs, acts = probed(params, jnp.ones((3, 2)), {})
      >>> list(acts), acts["layers/0"].shape
      (['layers/0', 'layers/1', '__call__'], (3, 4))
    """
    eqx = import_extra("from_equinox", "equinox")
    if not isinstance(model, eqx.Module):
        raise TypeError(
            f"from_equinox: wanted an equinox module, got {type(model).__name__}; for "
            "flax use from_linen or from_nnx, for a function from_function"
        )
    if key is not None:
        check_key("from_equinox", key)
    arrays, static = eqx.partition(model, eqx.is_array)
    params = arrays if state is None else (arrays, state)
    call = _marking_call(
        eqx,
        static,
        method=method,
        unbound=getattr(type(model), method),
        has_state=state is not None,
        call_kwargs=call_kwargs,
    )
    probed = _probed_model(call, jax.tree.structure(params), batched=batched, key=key)

    def train_mode(params: Params, inputs: Inputs) -> tuple[str, ...]:
        """Name what makes the result of an example depend on others or on chance."""
        return tuple(_train_notes(eqx, model, ()))

    probed.__dict__["train_mode"] = train_mode
    return probed, params


def _marking_call(
    eqx: Any,
    static: Any,
    *,
    method: str,
    unbound: Any,
    has_state: bool,
    call_kwargs: dict[str, Any],
) -> Callable[[Params, Any], Outputs]:
    """Make ``(params, (inputs, key)) -> outputs`` of a module that marks its values.

    Args:
      eqx: equinox.
      static: the module without its arrays, which ``params`` are.
      method: the method to call.
      unbound: the same of the class, for its signature.
      has_state: whether ``params`` are the arrays and a state.
      call_kwargs: of every call.
    """

    def call(params: Params, example: Any) -> Outputs:
        inputs, key = example
        arrays, state = params if has_state else (params, None)
        marked = _marked(eqx, eqx.combine(arrays, static), ())
        args, kwargs = split_inputs("from_equinox", unbound, inputs, call_kwargs)
        args = args if state is None else (*args, state)
        kwargs = kwargs if key is None else {**kwargs, "key": key}
        outputs = getattr(marked, method)(*args, **call_kwargs, **kwargs)
        return outputs[0] if has_state else outputs

    return call


def _probed_model(
    call: Callable[[Params, Any], Outputs], structure: Any, *, batched: bool, key: Any
) -> Any:
    """Make a probed model of a call of a module that marks its values."""

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        _check_structure(params, structure)
        batch = infer_batch_size(inputs)
        inputs = jax.tree.map(jnp.asarray, inputs)
        # Every example has a key of its own, a batch has one.
        keys = key
        if key is not None and not batched:
            keys = jax.random.split(key, batch)
        with _explained_errors(inputs, batched):
            return run_marked(
                "from_equinox",
                call,
                params,
                (inputs, keys),
                probes,
                batch=batch,
                batched=batched,
            )

    return probed


def _check_structure(params: Params, structure: Any) -> None:
    """Raise unless these are the arrays of the module."""
    got = jax.tree.structure(params)
    if got != structure:
        raise ValueError(
            "from_equinox: params must be the arrays of the module, as from_equinox "
            f"returns them, got {type(params).__name__} with {got.num_leaves} leaves "
            f"instead of {structure.num_leaves} or of another structure; give "
            "eqx.filter(model, eqx.is_array), with a state the pair of both"
        )


@contextlib.contextmanager
def _explained_errors(inputs: Inputs, batched: bool) -> Iterator[None]:
    """Explain the errors of a model in train mode, and of inputs without a batch."""
    try:
        yield
    except (TypeError, ValueError) as error:
        shapes = [jnp.shape(x)[1:] for x in jax.tree.leaves(inputs)]
        if not batched and () in shapes:
            error.add_note(
                f"from_equinox: the model was called with one example, of shapes "
                f"{shapes}; inputs have a batch axis in front (x[None] for one "
                "example), and a model of whole batches wants batched=True"
            )
        raise
    except (RuntimeError, NameError) as error:
        lacks_key = "key" in str(error) and isinstance(error, RuntimeError)
        lacks_axis = "axis name" in str(error)
        if not (lacks_key or lacks_axis):
            raise
        raise ValueError(
            "from_equinox: a layer in train mode wants a random key or the name of the "
            f"batch axis, got none: {error}; give the model in evaluation mode, "
            "eqx.nn.inference_mode(model), or key="
        ) from error


def _submodules(eqx: Any, node: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Iterate over the outermost modules in a module, with their paths."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda n: n is not node and isinstance(n, eqx.Module)
    )
    yield from ((path, n) for path, n in nodes if isinstance(n, eqx.Module))


def _train_notes(eqx: Any, module: Any, path: tuple[Any, ...]) -> Iterator[str]:
    """List the layers in train mode, and what they do."""
    kind = type(module).__name__
    if getattr(module, "inference", True) is False:
        draws = isinstance(module, eqx.nn.Dropout) and module.p != 0
        note = RANDOM if draws else BATCH if hasattr(module, "axis_name") else None
        if note is not None:
            yield f"{_path_name(path)!r} ({kind}) {note}"
    for inner, child in _submodules(eqx, module):
        yield from _train_notes(eqx, child, (*path, *inner))


def _path_name(path: tuple[Any, ...]) -> str:
    """Name a module by its path, ``"layers/0"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _marked(eqx: Any, module: Any, path: tuple[Any, ...]) -> Any:
    """Copy a module whose methods, and those of all modules in it, mark their values.

    The copy is of a subclass with one more static field, the path.  It goes through
    every transformation of the model like the module itself.
    """
    children = {
        inner: _marked(eqx, child, (*path, *inner))
        for inner, child in _submodules(eqx, module)
    }
    # The module with its children replaced: another object of its class.
    copy = jax.tree_util.tree_map_with_path(
        lambda inner, node: children.get(inner, node),
        module,
        is_leaf=lambda n: n is not module and isinstance(n, eqx.Module),
    )
    marking_class = _marking_class(type(module))
    if marking_class is not None:
        object.__setattr__(copy, "__class__", marking_class)
        object.__setattr__(copy, _PATH, _path_name(path))
    return copy


@functools.cache
def _marking_class(cls: type) -> type | None:
    """Make a subclass whose public methods mark their values; ``None`` without any."""
    eqx = import_extra("from_equinox", "equinox")
    known = {
        name: value
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
    }
    methods = {
        name: _marking_method(eqx, attribute, name)
        for name, attribute in known.items()
        if _is_site(eqx, name, attribute)
    }
    if not methods:  # a container, or the index of a state, which must keep its class
        return None
    field = eqx.field(static=True, default="")
    namespace = {**methods, _PATH: field, "__annotations__": {_PATH: str}}
    return types.new_class(
        cls.__name__, (cls,), {}, lambda space: space.update(namespace)
    )


def _is_site(eqx: Any, name: str, attribute: Any) -> bool:
    """Return whether this is ``__call__`` or a public method of the model's own.

    A method may be wrapped, as by ``eqx.filter_jit``: then it is a module that binds.
    """
    if name == "__call__":
        return True
    public = not name.startswith("_") and not hasattr(eqx.Module, name)
    binds = isinstance(attribute, eqx.Module) and hasattr(type(attribute), "__get__")
    return public and (inspect.isfunction(attribute) or binds)


def _marking_method(eqx: Any, attribute: Any, name: str) -> Callable[..., Any]:
    """Wrap a method so that its value is marked."""

    def is_opaque(node: Any) -> bool:
        return isinstance(node, (eqx.Module, eqx.nn.State))

    def marking(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = getattr(self, _PATH)
        site = path if name == "__call__" and path else f"{path}.{name}".lstrip(".")
        value = attribute.__get__(self, type(self))(*args, **kwargs)
        return mark(site, value, is_opaque)

    # The signature, which the model may look at, is that of the method.
    return functools.update_wrapper(
        marking, getattr(attribute, "__wrapped__", attribute)
    )
