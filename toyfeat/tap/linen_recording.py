"""Recordings of flax linen modules: the values of sites as variables.

Every method call stores variables in the collection ``toyfeat_acts``, at the path of
its module.  For a model whose layer ``mlp`` is called
twice (the second call with a probe) and whose layer ``pair`` returns a tuple, on
inputs ``[2, 3]``, the collection is::

    {"mlp": {"__call__#0": [],               # the marker of call 0
             "__call__#0:": [2, 3],          # its value, the site "mlp"
             "__call__#1": [],
             "__call__#1:": [2, 3],          # the site "mlp#1"
             "__call__#1:!": []},            # a probe was applied there
     "pair": {"__call__#0": [],
              "__call__#0:[0]": [2, 4],      # the site "pair[0]"
              "__call__#0:[1]": [2, 3]},     # the site "pair[1]"
     "__call__#0": [],
     "__call__#0:": [2, 4]}                  # the model's output, "__call__"

So a name is ``method#call``, for a value followed by ``:`` and the path inside the
value, and ``!`` marks a probe that reached the layer.  Markers are scalars: a scan
stacks them with the values, and their shape then tells the layers
(:func:`toyfeat.tap.slots.infer_slot`).  Array probes travel the other way, in the
collection ``toyfeat_probes`` under the names of the values.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import DenyList, lift, tracers, unfreeze
from flax.core.scope import in_filter, subtract_filters
from flax.traverse_util import flatten_dict, unflatten_dict

from toyfeat.tap.probes import (
    BATCH,
    RANDOM,
    apply_probe,
    call_name,
    call_option,
    visit,
)
from toyfeat.tap.slots import Slot, infer_slot
from toyfeat.types import Array, Probe

ACTS = "toyfeat_acts"
PROBES = "toyfeat_probes"

_CALL = "#"  # between the method and the number of its call
_VALUE = ":"  # between the call and the path of a leaf in what it returned
_APPLIED = "!"  # behind the name of a value to which a probe was applied
_STAMP = "?"  # before the number of a module under nn.jit
_OWNER = "/"  # between a module in the scope of another and its method
_BRANCHES = ("cond(", "switch(")  # scopes of branches, as flax names them
_Place = tuple[str, ...]  # path of a variable in its collection

# True while a probed model runs, whose stacks of layers carry the collections.
RECORDING: ContextVar[bool] = ContextVar("toyfeat_recording", default=False)
_trace_numbers = itertools.count()


def carry_collections() -> None:
    """Let the layer stacks of a probed model carry its recording and its probes.

    A stack (``nn.scan``, ``nn.vmap``) passes its layers the collections that its
    ``variable_axes`` names, and these are fixed where the stack is made, in the code
    of the model.  Both transforms split them by one private function of flax, which
    is replaced by one that adds the two collections, on axis 0, while a probed model
    runs.  A loop without variables of its own per step, as over time, is left alone.
    """
    split_axes = getattr(lift, "_split_in_out_axes", None)
    if split_axes is None or hasattr(split_axes, "__wrapped__"):
        return

    @functools.wraps(split_axes)
    def split(axes: Mapping[Any, Any]) -> Any:
        if RECORDING.get() and axes:
            names = (ACTS, PROBES)
            new = [n for n in names if not any(in_filter(key, n) for key in axes)]
            axes = {**axes, **dict.fromkeys(new, 0)}
        return split_axes(axes)

    lift._split_in_out_axes = split


class Recorder:
    """A method interceptor that applies probes and records the values of sites.

    The number of a call and the mark of a probe are variables like the values,
    because a body may be traced several times (scan, remat) or not at all (the
    cached trace of a jit), so that Python variables would miscount.

    Attributes:
      probes: array and function probes, by site.
      functions: the function probes among them.
      fresh: whether the body of an ``nn.jit`` must be traced anew.
      visited: sites whose method ran in Python, not from a cached trace, by order.
      notes: what layers in train mode do, by their names.
      in_branches: whether a value was recorded in a branch of ``nn.cond``.
      skip_branches: whether to record none there.
    """

    def __init__(self, probes: Mapping[str, Probe], *, fresh: bool = False):
        self.probes = probes
        self.functions = {site: p for site, p in probes.items() if callable(p)}
        self.fresh = fresh or bool(self.functions)
        self.visited: dict[str, int] = {}
        self.notes: dict[str, str] = {}
        self.in_branches = self.skip_branches = False

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Call a method; record its value if it is a site that can be recorded."""
        module, method = context.module, context.method_name
        if not _is_site(type(module), method):
            return next_fun(*args, **kwargs)
        keys = _count_keys(module)
        value = next_fun(*args, **kwargs)
        # Note what ties the result of one example to the batch it is run in.
        site = _site_name(_module_path(module), method, 0)
        if _count_keys(module) != keys:
            self.notes[_describe(site, module)] = RANDOM
        option = "use_running_average"
        if call_option(option, module, context.orig_method, args, kwargs) is False:
            self.notes[_describe(site, module)] = BATCH
        if not module.is_mutable_collection(ACTS) or not _in_own_trace(module):
            return value  # inside a loop that does not carry the collection
        # All branches of a condition must record the same: if they do not, none may.
        if any(name.startswith(_BRANCHES) for name in module.scope.debug_path):
            self.in_branches = True
            if self.skip_branches:
                return value
        return self._record(module, method, value)

    def _record(self, module: nn.Module, method: str, value: Any) -> Any:
        """Probe and store every array of a value; return the probed value."""
        scope = module.scope
        if scope is None:
            return value
        # Number the call by the markers that the scope has already.
        path = _module_path(module)
        owner = _relative_owner(path, tuple(scope.path)) + method
        call = 0
        while scope.has_variable(ACTS, _marker(owner, call)):
            call += 1
        marker = _marker(owner, call)
        scope.put_variable(ACTS, marker, jnp.zeros(()))
        name = _site_name(path, method, call)

        # Arrays come as variables, so that a scan hands each layer its own; functions
        # cannot, and are the same for all layers.
        def record_leaf(site: str, act: Array) -> Array:
            leaf = f"{marker}{_VALUE}{site.removeprefix(name)}"
            self.visited.setdefault(site, len(self.visited))
            function = self.functions.get(site)
            probe = scope.get_variable(PROBES, leaf, function)
            if probe is not None:
                scope.put_variable(ACTS, f"{leaf}{_APPLIED}", jnp.zeros(()))
            act = apply_probe(site, act, probe)
            scope.put_variable(ACTS, leaf, act)
            return act

        return visit(name, value, record_leaf)

    def check_visited(self, slot: Slot) -> None:
        """Raise if function probes were given and the site ran from a cached trace."""
        if self.functions and slot.site not in self.visited:
            raise ValueError(
                f"from_linen: {slot.site!r} ran from the cached trace of an nn.jit, "
                "which holds the functions it was made with; add arrays as probes, or "
                "take nn.jit out of the model"
            )


def _is_site(cls: type, method: str) -> bool:
    """Return whether a call is one of a public method of the module's class.

    The functions that a lifted transform runs (``nn.remat(function)(self, x)``, the
    branches of ``nn.cond``) are calls on the module too, under their own names.
    """
    if method == "__call__":
        return True
    public = method != "setup" and method[0].isalpha()
    return public and inspect.isfunction(inspect.getattr_static(cls, method, None))


def _in_own_trace(module: nn.Module) -> bool:
    """Return whether the scopes of a module belong to the trace in progress.

    They do not in a plain ``jax.vmap``, ``jax.checkpoint``, ... of the model,
    from which a value could not get out.
    """
    scope, trace = module.scope, tracers.current_trace()
    while scope is not None and scope.trace_level == trace:
        scope = scope.parent
    return scope is None


def _count_keys(module: nn.Module) -> dict[str, int]:
    """Count the random keys that a module has drawn, by name."""
    counters = {} if module.scope is None else module.scope.rng_counters
    return {name: n for name, n in counters.items() if isinstance(n, int)}


def _describe(site: str, module: nn.Module) -> str:
    """Name a layer in a message: its site and its class."""
    return f"{site!r} ({type(module).__name__})"


def _module_path(module: nn.Module) -> tuple[str, ...]:
    """Return the path of a module, also of one in a scope that it shares.

    With ``nn.share_scope`` a module has the variables, and so the path, of another.
    Its own name then tells them apart.
    """
    path = tuple(module.scope.path) if module.scope is not None else ()
    name, parent = module.name, module.parent
    if name is None or path[-1:] == (name,) or not isinstance(parent, nn.Module):
        return path
    inside = parent.scope is not None and tuple(parent.scope.path) == path
    return (*path, name) if inside else (*path[:-1], name)


def _relative_owner(path: tuple[str, ...], scope_path: tuple[str, ...]) -> str:
    """Name a module in a scope that is not at its own path: ``child/``, ``../it/``."""
    if path == scope_path:
        return ""
    up = "" if len(path) > len(scope_path) else f"..{_OWNER}"
    return f"{up}{path[-1]}{_OWNER}"


def _marker(method: str, call: int) -> str:
    """Name the marker of a call, such as ``__call__#0``."""
    return f"{method}{_CALL}{call}"


def read_slots(
    recorded: Any, batch: int, record_wider: Callable[[], Any]
) -> Iterator[tuple[_Place, Slot]]:
    """Parse the recording: the place of every value and its slot.

    Args:
      recorded: the collection of the recording.
      batch: the number of examples.
      record_wider: records shapes with another number of examples, which tells an
        axis of the batch from one of as many layers; called only if one may be.
    """
    wider = None
    for place, value in flatten_dict(unfreeze(recorded)).items():
        *path, leaf = place
        variable, separator, suffix = leaf.partition(_VALUE)
        if not separator or leaf.endswith(_APPLIED):
            continue  # a marker
        # The site: path of the module (of its owner, in a shared scope), method, call.
        method, _, call = variable.rpartition(_CALL)
        *owner, method = method.split(_OWNER)
        base = path[:-1] if owner[:1] == [".."] else path
        base = (*base, *(part for part in owner if part != ".."))
        site = _site_name(base, method, int(call)) + suffix
        # An axis of the marker as long as the batch is the batch or that many layers.
        marker = lookup(recorded, (*path, variable))
        if batch in marker.shape:
            wider = record_wider() if wider is None else wider
            other = lookup(wider, (*path, variable))
            yield place, infer_slot(site, marker, value, batch, other)
        else:
            yield place, infer_slot(site, marker, value, batch)


def check_applied(
    recorded: Any, place: _Place, slot: Slot, probes: Mapping[str, Probe]
) -> None:
    """Raise if a scan did not pass the array probes on to its layers."""
    probed = [name for name in slot.site_names() if name in probes]
    if probed and lookup(recorded, (*place[:-1], place[-1] + _APPLIED)) is None:
        raise ValueError(
            f"from_linen: the probe at {probed[0]!r} did not reach the layer, because "
            f"its scan carries {ACTS!r} but not {PROBES!r}; take both out of its "
            "variable_axes, where they are added when they are needed"
        )


def _site_name(path: tuple[str, ...], method: str, call: int) -> str:
    """Name a site: ``blocks_1/mlp``, ``embed.attend``, ``shared#1``."""
    base = "/".join(path)
    if method != "__call__" or not base:
        base = f"{base}.{method}".lstrip(".")
    return call_name(base, call)


def mutable_collections(mutable: Any, fresh: bool) -> Any:
    """Add the collection of the recording to the mutable collections.

    ``nn.jit`` reuses a trace for equal mutable collections, and a trace holds the
    functions it was made with: ``fresh`` makes them unequal.
    """
    number = [f"{ACTS}_{next(_trace_numbers)}"] if fresh else []
    if mutable is True:
        return DenyList(number) if fresh else True
    if isinstance(mutable, DenyList):
        return subtract_filters(mutable, number)
    collections = [mutable] if isinstance(mutable, str) else list(mutable or ())
    return [ACTS, *collections, *number]


def lookup(tree: Any, place: _Place) -> Any:
    """Return the variable at a place, or ``None``."""
    for part in place:
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def pack_deltas(
    recorded: Any, slots: Mapping[_Place, Slot], probes: Mapping[str, Probe]
) -> Any:
    """Build the collection of array probes, stacked over layers.

    Modules of one class that run under ``nn.jit`` share a trace if their variables
    have the same names, and a trace holds the functions it was made with.  So every
    module gets a variable with a name of its own if functions are given.
    """
    deltas = {place: slot.stack_deltas(probes) for place, slot in slots.items()}
    packed = {place: delta for place, delta in deltas.items() if delta is not None}
    if any(callable(probe) for probe in probes.values()):
        for number, (*path, leaf) in enumerate(slots):
            marker = lookup(recorded, (*path, leaf.partition(_VALUE)[0]))
            packed[(*path, f"{_STAMP}{number}")] = jnp.zeros(marker.shape)
    return unflatten_dict(packed)
