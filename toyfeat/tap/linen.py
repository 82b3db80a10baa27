"""Probed models from unmodified flax linen modules."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from toyfeat.tap.probes import batch_size_of, indexed, probed_value, visit
from toyfeat.tap.slots import Slot, check_probes, slot_of
from toyfeat.types import Acts, Array, Inputs, Outputs, Params, Probe, Probed

ACTS = "toyfeat_acts"
PROBES = "toyfeat_probes"

_APPLIED = "!"
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
      method: what to call instead of ``__call__``.
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
        batch = batch_size_of(inputs)

        def run(recorder: _Recorder, deltas: Mapping[str, Any]) -> Any:
            with nn.intercept_methods(recorder.intercept):
                return module.apply(
                    {**variables, PROBES: deltas} if deltas else variables,
                    *args,
                    method=method,
                    rngs=rngs,
                    mutable=_with_acts(user_mutable),
                    **apply_kwargs,
                )

        deltas: dict[str, Any] = {}
        if probes:
            recorded = jax.eval_shape(lambda: run(_Recorder({}), {})[1].get(ACTS, {}))
            slots = dict(_slots(recorded, batch))
            check_probes(slots.values(), probes, "from_linen")
            deltas = _packed(slots, probes)
        recorder = _Recorder(probes)
        outputs, updates = run(recorder, deltas)
        recorded = updates.get(ACTS, {})
        acts: Acts = {}
        for place, slot in _slots(recorded, batch):
            recorder.check_visited(slot)
            _check_applied(recorded, place, slot, probes)
            acts |= slot.acts(_lookup(recorded, place))
        return outputs, acts

    return probed


class _Recorder:
    """A method interceptor that applies probes and stores what it sees.

    Everything is stored in variables, also which call a value belongs to and
    whether a probe was applied, because a body may be traced several times (scan,
    remat) or not at all (the cached trace of a jit).
    """

    def __init__(self, probes: Mapping[str, Probe]):
        self.functions = {site: p for site, p in probes.items() if callable(p)}
        self.visited: set[str] = set()

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        value = next_fun(*args, **kwargs)
        module, method = context.module, context.method_name
        if method == "setup" or not (method == "__call__" or method[0].isalpha()):
            return value  # private methods and the lambdas of lifted transforms
        if not module.is_mutable_collection(ACTS):
            return value  # inside a scan that does not carry the collection
        scope = module.scope
        count = itertools.count()
        call = next(i for i in count if not scope.has_variable(ACTS, f"{method}#{i}"))
        variable = f"{method}#{call}"
        scope.put_variable(ACTS, variable, jnp.zeros(()))  # the marker of slot_of
        name = _site_name(tuple(scope.path), method, call)

        def at_leaf(site: str, act: Array) -> Array:
            leaf = f"{variable}:{site.removeprefix(name)}"
            self.visited.add(site)
            given = self.functions.get(site)
            probe = scope.get_variable(PROBES, leaf, given)
            if probe is not None:
                scope.put_variable(ACTS, f"{leaf}{_APPLIED}", jnp.zeros(()))
            act = probed_value(site, act, probe)
            scope.put_variable(ACTS, leaf, act)
            return act

        return visit(name, value, at_leaf)

    def check_visited(self, slot: Slot) -> None:
        if self.functions and slot.site not in self.visited:
            raise ValueError(
                f"from_linen: {slot.site!r} ran from the cached trace of an nn.jit, "
                "which holds the functions it was made with; add arrays as probes, or "
                "take nn.jit out of the model"
            )


def _slots(recorded: Any, batch: int) -> Iterator[tuple[_Place, Slot]]:
    """Where every site is stored, and its shape."""
    for place, value in flatten_dict(unfreeze(recorded)).items():
        *path, leaf = place
        variable, colon, suffix = leaf.partition(":")
        if not colon or leaf.endswith(_APPLIED):
            continue
        method, _, call = variable.partition("#")
        site = _site_name(tuple(path), method, int(call)) + suffix
        marker = _lookup(recorded, (*path, variable))
        yield place, slot_of(site, marker, value, batch)


def _check_applied(
    recorded: Any, place: _Place, slot: Slot, probes: Mapping[str, Probe]
) -> None:
    asked = [name for name in slot.names() if name in probes]
    if asked and _lookup(recorded, (*place[:-1], place[-1] + _APPLIED)) is None:
        raise ValueError(
            f"from_linen: the probe at {asked[0]!r} did not reach the layer, because "
            f"its scan carries {ACTS!r} but not {PROBES!r}; add both to variable_axes"
        )


def _site_name(path: tuple[str, ...], method: str, call: int) -> str:
    base = "/".join(path)
    if method != "__call__" or not base:
        base = f"{base}.{method}".lstrip(".")
    return indexed(base, call)


def _with_acts(mutable: Any) -> Any:
    if mutable is True:
        return True
    kept = [mutable] if isinstance(mutable, str) else list(mutable or ())
    return [ACTS, *kept]


def _lookup(tree: Any, place: _Place) -> Any:
    for part in place:
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def _packed(slots: Mapping[_Place, Slot], probes: Mapping[str, Probe]) -> Any:
    """Array probes as a variable collection, stacked over layers."""
    deltas = {place: slot.delta(probes) for place, slot in slots.items()}
    return unflatten_dict({k: v for k, v in deltas.items() if v is not None})
