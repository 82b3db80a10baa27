"""Recordings of flax nnx modules: the values of sites as part of the state.

In a clone of the model every module gets a variable that holds the values of its
public methods, call by call, and one that holds the array probes that are added to
them.  The transforms of nnx carry both like the model's own state.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

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
    visit,
)
from toyfeat.tap.slots import Slot, infer_slot
from toyfeat.types import Acts, Array, Probe

Path = tuple[Any, ...]  # path of a module in the model
Recording = dict[Path, dict[str, Any]]  # of a module: method to its calls
Deltas = Mapping[Path, dict[str, Array]]  # of a module: site to its array probe

# Attributes of the modules of a clone: path and stamp, values, array probes.
_NAME, ACTS, _DELTAS = "_toyfeat", "_toyfeat_acts", "_toyfeat_deltas"
CAPTURES = "__captures__"  # attribute of the modules inside nnx.capture


# Private variable types, which keep the recording apart from what a model sows and
# perturbs itself.
class _Recorded(nnx.Intermediate):
    """The values of a module: method to (marker, {site: act}), call by call."""


class _Delta(nnx.Perturbation):
    """The array probes of a module's sites, which are added to their values."""


class Run(NamedTuple):
    """State of a run, which the methods of a clone look up.

    Attributes:
      functions: function probes, by site.
      fresh: whether nnx transforms must trace anew.
      trace: the JAX trace that the model was called in.
      notes: what layers in train mode do, by their names; filled by the run.
      nested: paths of the modules that were called in another trace; filled as well.
      order: ordinals of the sites, as they were computed; filled as well.
    """

    functions: Mapping[str, Probe]
    fresh: bool
    trace: Any
    notes: dict[str, str]
    nested: set[str]
    order: dict[str, int]


RUN: ContextVar[Run] = ContextVar("toyfeat_run")


def new_run(
    probes: Mapping[str, Probe],
    order: dict[str, int] | None = None,
    *,
    fresh: bool = False,
) -> Run:
    """Start a run with the functions among the probes.

    The order of sites is kept from run to run: a cached trace does not show it.
    """
    functions = {site: p for site, p in probes.items() if callable(p)}
    order = {} if order is None else order
    return Run(functions, fresh or bool(functions), trace_state(), {}, set(), order)


def prepare(
    clone: nnx.Module,
    fresh: bool,
    deltas: Deltas,
    skipped: frozenset[str] | None,
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
        if in_cell or skipped is None or name in skipped:
            continue
        setattr(module, ACTS, _Recorded({}))
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
        run = RUN.get(None)
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
        variable = vars(self).get(ACTS)
        return value if variable is None else _store(self, name, site, value, run)

    return recording


def _store(module: Any, method: str, base: str, value: Any, run: Run) -> Any:
    """Probe and store every array of a value; return the probed value."""
    variable = vars(module)[ACTS]
    deltas = vars(module)[_DELTAS].get_value() if _DELTAS in vars(module) else {}
    # The call is counted in the recording itself, not in Python: nnx.remat traces a
    # body twice, and each time starts from the same recording.
    recorded = dict(variable.get_value())
    calls = recorded.get(method, ())
    acts: Acts = {}

    def record_leaf(site: str, act: Array) -> Array:
        act = act + deltas[site] if site in deltas else act
        acts[site] = apply_probe(site, act, run.functions.get(site))
        run.order.setdefault(site, len(run.order))
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
    names = {_NAME, ACTS, _DELTAS, CAPTURES} & set(vars(module))
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


def read_slots(recorded: Recording, batch: int) -> Iterator[tuple[Path, Slot, Any]]:
    """Read the recording: path of the module, slot and value of every site."""
    for path, methods in recorded.items():
        for calls in methods.values():
            for marker, acts in calls:
                for site, value in acts.items():
                    yield path, infer_slot(site, marker, value, batch), value


def pack_deltas(slots: list[tuple[Path, Slot]], probes: Mapping[str, Probe]) -> Deltas:
    """Build the array probes of every module, stacked over layers."""
    deltas: dict[Path, dict[str, Array]] = {}
    for path, slot in slots:
        delta = slot.stack_deltas(probes)
        if delta is not None:
            deltas.setdefault(path, {})[slot.site] = delta
    return deltas
