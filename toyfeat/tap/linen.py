"""Probed models from unmodified flax linen modules.

The recording.  Every method call stores variables in the collection
``toyfeat_acts``, at the path of its module.  For a model whose layer ``mlp`` is called
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

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from toyfeat.tap.probes import (
    apply_probe,
    call_name,
    check_new_site,
    infer_batch_size,
    visit,
)
from toyfeat.tap.slots import Slot, check_probes, infer_slot
from toyfeat.types import Acts, Array, Inputs, Outputs, Params, Probe, Probed

ACTS = "toyfeat_acts"
PROBES = "toyfeat_probes"

_CALL = "#"  # between the method and the number of its call
_VALUE = ":"  # between the call and the path of a leaf in what it returned
_APPLIED = "!"  # behind the name of a value to which a probe was applied
_Place = tuple[str, ...]  # path of a variable in its collection


def from_linen(
    module: nn.Module,
    *,
    method: str | Callable[..., Any] | None = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Probed:
    """Make a probed model of a flax linen module, as it is.

    Every method call of every submodule is a site, named after the module's
    path: ``"blocks_1/mlp"`` for ``__call__``, ``"embed.attend"`` for any other
    method, ``"shared#1"`` for the second call of a shared module,
    ``"gru[0]"`` for the first part of a tuple.  The module itself is the site
    ``"__call__"`` (or the name of ``method``).  Values travel in the private
    collections ``toyfeat_acts`` and ``toyfeat_probes``, so ``nn.remat`` works
    as it is.  Layers inside ``nn.scan`` are sites ``"layers/mlp@2"`` if the
    scan carries both collections (``variable_axes={..., "toyfeat_acts": 0,
    "toyfeat_probes": 0}``); otherwise they are not sites, and asking for one
    raises.

    Args:
      module: an unbound module.
      method: the method to call instead of ``__call__``.
      rngs: passed to ``module.apply``, for dropout and the like.
      **apply_kwargs: keyword arguments of the call (``train=False``), or of
        ``apply`` (``mutable=...``; what the call updates is dropped).

    Returns:
      ``probed(variables, inputs, probes) -> (outputs, acts)`` where
      ``variables`` is what ``module.init`` returned.  ``inputs`` that are a
      tuple are passed as positional arguments.

    Raises:
      ValueError: when called, if a probe names a site that does not exist, or
        if a function is given for a layer inside ``nn.scan`` or to a model with
        ``nn.jit`` inside.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
      >>> x = jnp.ones((3, 2))
      >>> variables = model.init(jax.random.key(0), x)
      >>> outputs, acts = from_linen(model)(variables, x, {})
      >>> sorted(acts)
      ['__call__', 'layers_0', 'layers_2']
    """
    user_mutable = apply_kwargs.pop("mutable", False)

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        args = inputs if type(inputs) is tuple else (inputs,)
        variables = unfreeze(params) if isinstance(params, FrozenDict) else params
        batch = infer_batch_size(inputs)

        def run(recorder: _Recorder, deltas: Mapping[str, Any]) -> Any:
            with nn.intercept_methods(recorder.intercept):
                return module.apply(
                    {**variables, PROBES: deltas} if deltas else variables,
                    *args,
                    method=method,
                    rngs=rngs,
                    mutable=_add_acts(user_mutable),
                    **apply_kwargs,
                )

        # Array probes are variables, so the shapes of their sites are needed first.
        deltas: dict[str, Any] = {}
        if probes:
            recorded = jax.eval_shape(lambda: run(_Recorder({}), {})[1].get(ACTS, {}))
            slots = dict(_read_slots(recorded, batch))
            check_probes(slots.values(), probes, "from_linen")
            deltas = _pack_deltas(slots, probes)
        # Run the model and split what was recorded into sites.
        recorder = _Recorder(probes)
        outputs, updates = run(recorder, deltas)
        recorded = updates.get(ACTS, {})
        acts: Acts = {}
        for place, slot in _read_slots(recorded, batch):
            recorder.check_visited(slot)
            _check_applied(recorded, place, slot, probes)
            for site, act in slot.split_acts(_lookup(recorded, place)).items():
                check_new_site(site, acts, "from_linen")
                acts[site] = act
        return outputs, acts

    return probed


class _Recorder:
    """A method interceptor that applies probes and records the values of sites.

    The number of a call and the mark of a probe are variables like the values,
    because a body may be traced several times (scan, remat) or not at all (the
    cached trace of a jit), so that Python variables would miscount.
    """

    def __init__(self, probes: Mapping[str, Probe]):
        self.functions = {site: p for site, p in probes.items() if callable(p)}
        self.visited: set[str] = set()

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Call a method; record its value if it is a site that can be recorded."""
        value = next_fun(*args, **kwargs)
        module, method = context.module, context.method_name
        if not _is_site(type(module), method):
            return value
        if not module.is_mutable_collection(ACTS):
            return value  # inside a scan that does not carry the collection
        # Number the call by the markers that the module has already.
        scope = module.scope
        call = 0
        while scope.has_variable(ACTS, _marker(method, call)):
            call += 1
        marker = _marker(method, call)
        scope.put_variable(ACTS, marker, jnp.zeros(()))
        name = _site_name(tuple(scope.path), method, call)

        # Probe every array of the value, then store it.
        def record_leaf(site: str, act: Array) -> Array:
            leaf = f"{marker}{_VALUE}{site.removeprefix(name)}"
            self.visited.add(site)
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


def _marker(method: str, call: int) -> str:
    """Name the marker of a call, such as ``__call__#0``."""
    return f"{method}{_CALL}{call}"


def _read_slots(recorded: Any, batch: int) -> Iterator[tuple[_Place, Slot]]:
    """Parse the recording: the place of every value and its slot."""
    for place, value in flatten_dict(unfreeze(recorded)).items():
        *path, leaf = place
        variable, separator, suffix = leaf.partition(_VALUE)
        if not separator or leaf.endswith(_APPLIED):
            continue  # a marker
        method, _, call = variable.partition(_CALL)
        site = _site_name(tuple(path), method, int(call)) + suffix
        marker = _lookup(recorded, (*path, variable))
        yield place, infer_slot(site, marker, value, batch)


def _check_applied(
    recorded: Any, place: _Place, slot: Slot, probes: Mapping[str, Probe]
) -> None:
    """Raise if a scan did not pass the array probes on to its layers."""
    probed = [name for name in slot.site_names() if name in probes]
    if probed and _lookup(recorded, (*place[:-1], place[-1] + _APPLIED)) is None:
        raise ValueError(
            f"from_linen: the probe at {probed[0]!r} did not reach the layer, because "
            f"its scan carries {ACTS!r} but not {PROBES!r}; add both to variable_axes"
        )


def _site_name(path: tuple[str, ...], method: str, call: int) -> str:
    """Name a site: ``blocks_1/mlp``, ``embed.attend``, ``shared#1``."""
    base = "/".join(path)
    if method != "__call__" or not base:
        base = f"{base}.{method}".lstrip(".")
    return call_name(base, call)


def _add_acts(mutable: Any) -> Any:
    """Add the collection of the recording to the mutable collections."""
    if mutable is True:
        return True
    collections = [mutable] if isinstance(mutable, str) else list(mutable or ())
    return [ACTS, *collections]


def _lookup(tree: Any, place: _Place) -> Any:
    """Return the variable at a place, or ``None``."""
    for part in place:
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def _pack_deltas(slots: Mapping[_Place, Slot], probes: Mapping[str, Probe]) -> Any:
    """Build the collection of array probes, stacked over layers."""
    deltas = {place: slot.stack_deltas(probes) for place, slot in slots.items()}
    return unflatten_dict({k: v for k, v in deltas.items() if v is not None})
