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

from toyfeat.tap.probes import (
    apply_probe,
    call_name,
    check_new_site,
    infer_batch_size,
    visit,
)
from toyfeat.tap.slots import Slot, check_probes, infer_slot
from toyfeat.types import Acts, Array, Inputs, Outputs, Params, Probe, Probed

# The function probes of the call in progress, by site.
_FUNCTIONS: ContextVar[Mapping[str, Probe]] = ContextVar("toyfeat_functions")


# Private variable types, which keep the recording apart from what a model sows and
# perturbs itself.
class _Recorded(nnx.Intermediate):
    """The values of one method, call by call: (marker, {site: act}), ..."""


class _Delta(nnx.Perturbation):
    """The array probe of a site, which is added to its value."""


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
        batch = infer_batch_size(inputs)
        functions = {site: p for site, p in probes.items() if callable(p)}

        def run(functions: Mapping[str, Probe], deltas: Any) -> Any:
            # A fresh copy of the variables belongs to the trace we are in, so
            # that nnx transforms inside the model may update them.
            clone = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, params))
            _prepare(clone, fresh=bool(functions))
            token = _FUNCTIONS.set(functions)
            try:
                return nnx.capture(clone, _Recorded, init=deltas)(*args)
            finally:
                _FUNCTIONS.reset(token)

        # Array probes are variables, so the shapes of their sites are needed first.
        deltas = None
        if probes:
            recorded = jax.eval_shape(lambda: run({}, None)[1])
            slots = [(path, slot) for path, slot, _ in _read_slots(recorded, batch)]
            check_probes([slot for _, slot in slots], probes, "from_nnx")
            deltas = _pack_deltas(slots, probes)
        # Run the model and split what was recorded into sites.
        outputs, recorded = run(functions, deltas)
        acts: Acts = {}
        for _, slot, value in _read_slots(recorded, batch):
            for site, act in slot.split_acts(value).items():
                check_new_site(site, acts, "from_nnx")
                acts[site] = act
        return outputs, acts

    return probed, jax.tree.map(lambda leaf: leaf, state)


def _prepare(clone: nnx.Module, *, fresh: bool) -> None:
    """Make the methods of a clone record their values, and store module paths.

    nnx.remat reuses a trace where the static parts of a module are equal, and a
    trace holds the functions it was made with: ``fresh`` makes them unequal.
    """
    stamp = object() if fresh else None
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(clone))
    # The state of a cell is the carry of a scan, which must keep its structure.
    carried_cells = [
        (*path, "cell") for path, module in modules if isinstance(module, nnx.RNN)
    ]
    for path, module in modules:
        if any(path[: len(cell)] == cell for cell in carried_cells):
            continue
        recording_class = _recording_class(type(module))
        if recording_class is not type(module):
            module.__class__ = recording_class
            module._toyfeat = ("/".join(map(str, path)), stamp)


@functools.cache
def _recording_class(cls: type) -> type:
    """Make a subclass whose public methods record their values."""
    methods = {
        name: _recording_method(getattr(cls, name), name)
        for name in dir(cls)
        if _is_site(cls, name)
    }
    # A subclass of a module that is no pytree would become one by default.
    options = {"pytree": getattr(cls, "_pytree__is_pytree", True)}
    return types.new_class(cls.__name__, (cls,), options, lambda ns: ns.update(methods))


def _is_site(cls: type, name: str) -> bool:
    """Return whether a method is ``__call__`` or a public one of the model's own."""
    if name == "__call__":
        return True
    public = not hasattr(nnx.Module, name) and not name.startswith("_")
    return public and inspect.isfunction(inspect.getattr_static(cls, name))


def _recording_method(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a method so that its value is probed and recorded."""

    @functools.wraps(method)
    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = method(self, *args, **kwargs)
        path, functions = self._toyfeat[0], _FUNCTIONS.get({})
        base = path if name == "__call__" and path else f"{path}.{name}".lstrip(".")
        probed_values = []

        # The call is counted in the recording itself, not in Python: nnx.remat
        # traces a body twice, and each time starts from the same recording.
        def append(calls: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
            acts: Acts = {}

            def record_leaf(site: str, act: Array) -> Array:
                act = self.perturb(site, act, _Delta)
                acts[site] = apply_probe(site, act, functions.get(site))
                return acts[site]

            site = call_name(base, len(calls))
            probed_values.append(visit(site, value, record_leaf))
            return (*calls, (jnp.zeros(()), acts))  # with the marker of infer_slot

        # ``sow`` does nothing unless the model runs inside ``nnx.capture``.
        recorded = self.sow(_Recorded, name, value, init_fn=tuple, reduce_fn=append)
        return probed_values[0] if recorded else value

    return recording


def _read_slots(
    recorded: Any, batch: int
) -> Iterator[tuple[tuple[Any, ...], Slot, Any]]:
    """Read the recording: path of the module, slot and value of every site."""
    for path, variable in nnx.to_flat_state(recorded):
        calls = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        for marker, acts in calls:
            for site, value in acts.items():
                yield path[:-1], infer_slot(site, marker, value, batch), value


def _pack_deltas(
    slots: list[tuple[tuple[Any, ...], Slot]], probes: Any
) -> nnx.State | None:
    """Build the state of array probes, or ``None`` without any."""
    stacked = [((*path, slot.site), slot.stack_deltas(probes)) for path, slot in slots]
    deltas = {place: _Delta(delta) for place, delta in stacked if delta is not None}
    return nnx.from_flat_state(deltas) if deltas else None
