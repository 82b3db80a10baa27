"""Probed models from unmodified flax nnx modules.

The recording.  In a clone of the model every module gets a variable that holds the
values of its public methods, call by call, and one that holds the array probes that are
added to them.  The transforms of nnx carry both like the model's own state.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from toyfeat.tap.functions import trace_state
from toyfeat.tap.probes import (
    BATCH,
    RANDOM,
    apply_probe,
    call_name,
    call_option,
    check_new_site,
    explain_inputs,
    infer_batch_size,
    split_inputs,
    visit,
    warn_batch_statistics,
)
from toyfeat.tap.slots import Slot, check_probes, infer_slot
from toyfeat.types import Acts, Array, Inputs, Outputs, Params, Probe, Probed

_Path = tuple[Any, ...]  # path of a module in the model
_Recording = dict[_Path, dict[str, Any]]  # of a module: method to its calls
_Deltas = Mapping[_Path, dict[str, Array]]  # of a module: site to its array probe

# Attributes of the modules of a clone: path and stamp, values, array probes.
_NAME, _ACTS, _DELTAS = "_toyfeat", "_toyfeat_acts", "_toyfeat_deltas"
_CAPTURES = "__captures__"  # attribute of the modules inside nnx.capture


# Private variable types, which keep the recording apart from what a model sows and
# perturbs itself.
class _Recorded(nnx.Intermediate):
    """The values of a module: method to (marker, {site: act}), call by call."""


class _Delta(nnx.Perturbation):
    """The array probes of a module's sites, which are added to their values."""


class _Model(NamedTuple):
    """A module and how it is called, the arguments of :func:`from_nnx`."""

    graph: Any
    method: str | Callable[..., Any]
    unbound: Callable[..., Any]
    options: dict[str, Any]


class _Run(NamedTuple):
    """What the methods of a clone look up while they run.

    Attributes:
      functions: function probes, by site.
      fresh: whether nnx transforms must trace anew.
      trace: the JAX trace that the model was called in.
      notes: what layers in train mode do, by their names; filled by the run.
      nested: paths of the modules that were called in another trace; filled as well.
    """

    functions: Mapping[str, Probe]
    fresh: bool
    trace: Any
    notes: dict[str, str]
    nested: set[str]


_RUN: ContextVar[_Run] = ContextVar("toyfeat_run")


def _new_run(probes: Mapping[str, Probe], *, fresh: bool = False) -> _Run:
    """Start a run with the functions among the probes."""
    functions = {site: p for site, p in probes.items() if callable(p)}
    return _Run(functions, fresh or bool(functions), trace_state(), {}, set())


def from_nnx(
    model: nnx.Module,
    *,
    method: str | Callable[..., Any] | None = None,
    **call_kwargs: Any,
) -> tuple[Probed, Params]:
    """Make a probed model of a flax nnx module, as it is.

    The module is cloned for every call; the object that was given is never
    changed, and what a call changes in the clone (batch statistics, random
    counters) is dropped.  Every call of a public method of a submodule is a
    site, named after its path: ``"blocks/1/mlp"`` for ``__call__``,
    ``"embed.attend"`` for any other method, ``"shared#1"`` for a second call.
    ``nnx.remat`` works as it is; layers of an ``nnx.scan`` are the sites
    ``"layers/mlp@2"``.  The outputs of an ``nnx.RNN`` are a site, what happens
    in its cell is not.  No sites either are modules that run in a plain JAX
    transformation of the model's own; and if the model has loops, or conditions
    whose branches call different modules, what runs inside any transformation.

    Args:
      model: the module, in the mode it is to be analysed in (``model.eval()``
        switches off dropout and batch statistics).
      method: the method to call instead of ``__call__``.
      **call_kwargs: keyword arguments of the call.

    Returns:
      ``probed(params, inputs, probes) -> (outputs, acts)`` and the ``params``
      it takes, a copy of the module's state.  ``inputs`` that are a tuple are
      passed as positional arguments, a dict as keyword arguments if the method
      has parameters of these names.  ``probed.train_mode(params, inputs)`` names
      the layers in train mode, whose result for one example depends on the others
      or on random numbers.

    Raises:
      TypeError: if ``model`` is not an nnx module.
      ValueError: when called, if ``params`` are not the state of the module, if a
        probe names a site that does not exist, if a function is given for one
        layer of an ``nnx.scan``, or if two values have one site name.

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
    method = "__call__" if method is None else method
    unbound = method if callable(method) else getattr(type(model), method)
    called = _Model(graph, method, unbound, call_kwargs)

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        batch = infer_batch_size(inputs)
        # Array probes are variables, so the shapes of their sites are needed first.
        deltas: _Deltas = {}
        if probes:
            recorded = _record_shapes(called, params, inputs, _new_run({}))
            slots = [(path, slot) for path, slot, _ in _read_slots(recorded, batch)]
            check_probes([slot for _, slot in slots], probes, "from_nnx")
            deltas = _pack_deltas(slots, probes)
        # Run the model and split what was recorded into sites.
        run = _new_run(probes)
        outputs, recorded = _record(called, params, inputs, run, deltas)
        warn_batch_statistics("from_nnx", run.notes)
        acts: Acts = {}
        for _, slot, value in _read_slots(recorded, batch):
            for site, act in slot.split_acts(value).items():
                check_new_site(site, acts, "from_nnx")
                acts[site] = act
        return outputs, acts

    def train_mode(params: Params, inputs: Inputs) -> tuple[str, ...]:
        """Name what makes the result of an example depend on the others."""
        run = _new_run({}, fresh=True)
        _record_shapes(called, params, inputs, run)
        return tuple(f"{name} {note}" for name, note in run.notes.items())

    probed.__dict__["train_mode"] = train_mode
    return probed, jax.tree.map(lambda leaf: leaf, state)


def _record_shapes(model: _Model, params: Params, inputs: Inputs, run: _Run) -> Any:
    """Record the shapes of all values, without running the model."""

    def record(params: Params, inputs: Inputs) -> _Recording:
        inside = run._replace(trace=trace_state())
        return _record(model, params, inputs, inside, {})[1]

    return jax.eval_shape(lambda: record(params, inputs))


def _record(
    model: _Model, params: Params, inputs: Inputs, run: _Run, deltas: _Deltas
) -> tuple[Outputs, _Recording]:
    """Run the model and record the values of as many modules as it allows.

    The recording is part of the model's state, which grows while it runs.  Loops and
    conditions want a state that keeps its structure, and fail.
    """
    try:
        return _call(model, params, inputs, run, deltas, lambda path: True)
    except Exception:
        # Without a recording: either the model itself fails, and its error is the
        # one to see, or its calls show which modules run inside a transformation.
        plain = run._replace(functions={}, fresh=True)
        plain.notes.clear()
        plain.nested.clear()
        _call(model, params, inputs, plain, {}, lambda path: False)
        nested = frozenset(plain.nested)
        return _call(model, params, inputs, run, deltas, lambda p: p not in nested)


def _call(
    model: _Model,
    params: Params,
    inputs: Inputs,
    run: _Run,
    deltas: _Deltas,
    is_recorded: Callable[[str], bool],
) -> tuple[Outputs, _Recording]:
    """Call a clone of the module: its outputs and the recording."""
    args, kwargs = split_inputs("from_nnx", model.unbound, inputs, model.options)
    # A fresh copy of the variables belongs to the trace we are in, so that nnx
    # transforms inside the model may update them.
    try:
        clone = nnx.merge(model.graph, jax.tree.map(lambda leaf: leaf, params))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "from_nnx: params must be the whole state of the module, as from_nnx and "
            f"nnx.state(model) return it, got {type(params).__name__} of another "
            "structure; merge partial states with nnx.merge_state"
        ) from error
    _prepare(clone, run.fresh, deltas, is_recorded)

    def apply(clone: nnx.Module) -> Outputs:
        for _, module in nnx.iter_modules(clone):
            if isinstance(module, (nnx.List, nnx.Dict)):
                vars(module).pop(_CAPTURES, None)  # would be one of its elements
        bound = isinstance(model.method, str)
        method = getattr(clone, model.method) if bound else model.unbound
        return method(*(() if bound else (clone,)), *args, **model.options, **kwargs)

    token = _RUN.set(run)
    try:
        # A capture of nothing switches off what the model sows itself.
        outputs = nnx.capture(apply)(clone)
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        explanation = explain_inputs("from_nnx", model.unbound, inputs if args else ())
        if explanation is None:
            raise
        raise TypeError(explanation) from error
    finally:
        _RUN.reset(token)
    recorded = {
        path: vars(module)[_ACTS].get_value()
        for path, module in nnx.iter_modules(clone)
        if _ACTS in vars(module)
    }
    return outputs, recorded


def _prepare(
    clone: nnx.Module,
    fresh: bool,
    deltas: _Deltas,
    is_recorded: Callable[[str], bool],
) -> None:
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
        # Containers have no methods of the model, and their attributes are their
        # elements.
        recording_class = _recording_class(type(module))
        if isinstance(module, (nnx.List, nnx.Dict)) or recording_class is type(module):
            continue
        name = "/".join(map(str, path))
        module.__class__ = recording_class
        setattr(module, _NAME, (name, stamp))
        in_cell = any(path[: len(cell)] == cell for cell in carried_cells)
        if in_cell or not is_recorded(name):
            continue
        setattr(module, _ACTS, _Recorded({}))
        if path in deltas:
            setattr(module, _DELTAS, _Delta(deltas[path]))


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
        path, _ = getattr(self, _NAME)
        site = path if name == "__call__" and path else f"{path}.{name}".lstrip(".")
        with _hidden_recording(self):
            counts = _count_keys(self)
            value = method(self, *args, **kwargs)
        run = _RUN.get(None)
        if run is None:
            return value
        # Note what ties the result of one example to the batch it is run in.
        layer = f"{site!r} ({type(self).__name__})"
        if call_option("use_running_average", self, method, (self, *args), kwargs) is (
            False
        ):
            run.notes[layer] = BATCH
        if _draws_keys(self, method, (self, *args), kwargs, counts):
            run.notes[layer] = RANDOM
        if trace_state() != run.trace:
            run.nested.add(path)
        variable = vars(self).get(_ACTS)
        return value if variable is None else _store(self, name, site, value, run)

    return recording


def _store(module: Any, method: str, base: str, value: Any, run: _Run) -> Any:
    """Probe and store every array of a value; return the probed value."""
    variable = vars(module)[_ACTS]
    deltas = vars(module)[_DELTAS].get_value() if _DELTAS in vars(module) else {}
    # The call is counted in the recording itself, not in Python: nnx.remat traces a
    # body twice, and each time starts from the same recording.
    recorded = dict(variable.get_value())
    calls = recorded.get(method, ())
    acts: Acts = {}

    def record_leaf(site: str, act: Array) -> Array:
        act = act + deltas[site] if site in deltas else act
        acts[site] = apply_probe(site, act, run.functions.get(site))
        return acts[site]

    probed_value = visit(call_name(base, len(calls)), value, record_leaf)
    recorded[method] = (*calls, (jnp.zeros(()), acts))  # with the marker of infer_slot
    # A variable of an outer trace, as in a plain jax.vmap of the model's own, cannot
    # hold a value of the trace in progress.
    try:
        variable.set_value(recorded)
    except TraceContextError:
        return value
    return probed_value


@contextlib.contextmanager
def _hidden_recording(module: Any) -> Iterator[None]:
    """Hide the recording from a bridged linen module, which reads all attributes."""
    if not isinstance(module, nnx.bridge.ToNNX):
        yield
        return
    names = {_NAME, _ACTS, _DELTAS, _CAPTURES} & set(vars(module))
    hidden = {name: vars(module).pop(name) for name in names}
    try:
        yield
    finally:
        vars(module).update(hidden)


def _count_keys(module: Any) -> list[Any]:
    """Return the counters of the random streams that a module holds itself."""
    streams: list[Any] = []
    for value in vars(module).values():
        streams += vars(value).values() if isinstance(value, nnx.Rngs) else [value]
    return [s.count.get_value() for s in streams if isinstance(s, nnx.RngStream)]


def _draws_keys(
    module: Any, method: Any, args: Any, kwargs: Any, counts: list[Any]
) -> bool:
    """Return whether a call of a layer drew random numbers, given its old counts."""
    if hasattr(module, "deterministic"):
        rate = getattr(module, "rate", getattr(module, "dropout_rate", 0.0))
        train = call_option("deterministic", module, method, args, kwargs) is False
        return train and rate != 0.0
    pairs = zip(counts, _count_keys(module), strict=False)
    return any(new is not old for old, new in pairs)


def _read_slots(recorded: _Recording, batch: int) -> Iterator[tuple[_Path, Slot, Any]]:
    """Read the recording: path of the module, slot and value of every site."""
    for path, methods in recorded.items():
        for calls in methods.values():
            for marker, acts in calls:
                for site, value in acts.items():
                    yield path, infer_slot(site, marker, value, batch), value


def _pack_deltas(
    slots: list[tuple[_Path, Slot]], probes: Mapping[str, Probe]
) -> _Deltas:
    """Build the array probes of every module, stacked over layers."""
    deltas: dict[_Path, dict[str, Array]] = {}
    for path, slot in slots:
        delta = slot.stack_deltas(probes)
        if delta is not None:
            deltas.setdefault(path, {})[slot.site] = delta
    return deltas
