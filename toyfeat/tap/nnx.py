"""Probed models from unmodified flax nnx modules."""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from toyfeat.tap.probes import batch_size_of, indexed, probed_value, visit
from toyfeat.tap.slots import Slot, check_probes, slot_of
from toyfeat.types import Acts, Array, Inputs, Outputs, Params, Probe, Probed

# The functions among the probes of the call in progress.
_FUNCTIONS: ContextVar[Mapping[str, Probe]] = ContextVar("toyfeat_functions")


# Types of our own, so that what a model sows and perturbs itself stays apart.
class _Recorded(nnx.Intermediate):
    """The values of one method, call by call: (marker, {site: act}), ..."""


class _Delta(nnx.Perturbation):
    """What is added at a site."""


def from_nnx(model: nnx.Module) -> tuple[Probed, Params]:
    """Make a probed model of a flax nnx module, as it is.

    The module is cloned for every call; the object that was given is never
    changed, and what a call changes in the clone (batch statistics, random
    counters) is dropped.  Every call of a public method of a submodule is a
    site, named after its path: ``"blocks/1/mlp"`` for ``__call__``,
    ``"embed.attend"`` for any other method, ``"shared#1"`` for a second call.
    ``nnx.remat`` works as it is; layers of an ``nnx.scan`` are the sites
    ``"layers/mlp@2"``.  The outputs of an ``nnx.RNN`` are a site, what happens
    in its cell is not.

    Args:
      model: the module, in the mode it is to be analysed in (``model.eval()``
        switches off dropout and batch statistics).

    Returns:
      ``probed(params, inputs, probes) -> (outputs, acts)`` and the ``params``
      it takes, a copy of the module's state.  ``inputs`` that are a tuple are
      passed as positional arguments.

    Raises:
      TypeError: if ``model`` is not an nnx module.
      ValueError: when called, if a probe names a site that does not exist, or
        if a function is given for one layer of an ``nnx.scan``.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> probed, params = from_nnx(model)
      >>> outputs, acts = probed(params, jnp.ones((3, 2)), {})
      >>> sorted(acts)
      ['__call__', 'layers/0']
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"from_nnx: wanted an nnx.Module, got {type(model).__name__}; for a linen "
            "module use from_linen, for a function from_function"
        )
    graph, state = nnx.split(model)

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        args = inputs if type(inputs) is tuple else (inputs,)
        batch = batch_size_of(inputs)
        functions = {site: p for site, p in probes.items() if callable(p)}

        def run(functions: Mapping[str, Probe], deltas: Any) -> Any:
            # A fresh copy of the variables belongs to the trace we are in, which
            # is what lets nnx transforms inside the model update them.
            clone = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, params))
            _prepare(clone, fresh=bool(functions))
            token = _FUNCTIONS.set(functions)
            try:
                return nnx.capture(clone, _Recorded, init=deltas)(*args)
            finally:
                _FUNCTIONS.reset(token)

        deltas = None
        if probes:
            recorded = jax.eval_shape(lambda: run({}, None)[1])
            slots = [(path, slot) for path, slot, _ in _slots(recorded, batch)]
            check_probes([slot for _, slot in slots], probes, "from_nnx")
            deltas = _packed(slots, probes)
        outputs, recorded = run(functions, deltas)
        acts: Acts = {}
        for _, slot, value in _slots(recorded, batch):
            acts |= slot.acts(value)
        return outputs, acts

    return probed, jax.tree.map(lambda leaf: leaf, state)


def _prepare(clone: nnx.Module, *, fresh: bool) -> None:
    """Make the methods of a clone record, and tell each module its path.

    nnx.remat reuses a trace where the static parts of a module are equal, and a
    trace holds the functions it was made with: ``fresh`` makes them unequal.
    """
    stamp = object() if fresh else None
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(clone))
    # The state of a cell is the carry of a scan, which must keep its structure.
    carried = [
        (*path, "cell") for path, module in modules if isinstance(module, nnx.RNN)
    ]
    for path, module in modules:
        if any(path[: len(cell)] == cell for cell in carried):
            continue
        recording = _recording(type(module))
        if recording is not type(module):
            module.__class__ = recording
            module._toyfeat = ("/".join(map(str, path)), stamp)


@functools.cache
def _recording(cls: type) -> type:
    """Return a subclass whose public methods record what they return."""
    methods = {
        name: _recording_method(getattr(cls, name), name)
        for name in dir(cls)
        if _is_site(cls, name)
    }
    # A subclass is a pytree by default, also of a module that is none.
    kind = {"pytree": getattr(cls, "_pytree__is_pytree", True)}
    return types.new_class(cls.__name__, (cls,), kind, lambda ns: ns.update(methods))


def _is_site(cls: type, name: str) -> bool:
    if name == "__call__":
        return True
    own = not hasattr(nnx.Module, name) and not name.startswith("_")
    return own and inspect.isfunction(inspect.getattr_static(cls, name))


def _recording_method(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = method(self, *args, **kwargs)
        path, functions = self._toyfeat[0], _FUNCTIONS.get({})
        base = path if name == "__call__" and path else f"{path}.{name}".lstrip(".")
        returned = []

        # The call is counted in the recording itself, not in Python: nnx.remat
        # traces a body twice, and each time starts from the same recording.
        def append(calls: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
            acts: Acts = {}

            def at_leaf(site: str, act: Array) -> Array:
                act = self.perturb(site, act, _Delta)
                acts[site] = probed_value(site, act, functions.get(site))
                return acts[site]

            returned.append(visit(indexed(base, len(calls)), value, at_leaf))
            return (*calls, (jnp.zeros(()), acts))  # with the marker of slot_of

        sown = self.sow(_Recorded, name, value, init_fn=tuple, reduce_fn=append)
        return returned[0] if sown else value

    return recording


def _slots(recorded: Any, batch: int) -> Iterator[tuple[tuple[Any, ...], Slot, Any]]:
    """Path of the module, slot and value of everything that was recorded."""
    for path, variable in nnx.to_flat_state(recorded):
        calls = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        for marker, acts in calls:
            for site, value in acts.items():
                yield path[:-1], slot_of(site, marker, value, batch), value


def _packed(slots: list[tuple[tuple[Any, ...], Slot]], probes: Any) -> nnx.State | None:
    deltas = [((*path, slot.site), slot.delta(probes)) for path, slot in slots]
    given = {place: _Delta(delta) for place, delta in deltas if delta is not None}
    return nnx.from_flat_state(given) if given else None
