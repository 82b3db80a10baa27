"""Probed models from unmodified flax linen modules."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.core import FrozenDict, unfreeze

from toyfeat.tap.linen_recording import (
    ACTS,
    PROBES,
    RECORDING,
    Recorder,
    carry_collections,
    check_applied,
    lookup,
    mutable_collections,
    pack_deltas,
    read_slots,
)
from toyfeat.tap.probes import (
    BATCH,
    check_new_site,
    explain_inputs,
    infer_batch_size,
    split_inputs,
    warn_batch_statistics,
)
from toyfeat.tap.slots import Slot, check_probes, sort_slots
from toyfeat.types import Acts, Inputs, Outputs, Params, Probe, Probed


class _Model(NamedTuple):
    """A module and how it is applied, the arguments of :func:`from_linen`."""

    module: nn.Module
    method: str | Callable[..., Any] | None
    rngs: Any
    mutable: Any
    options: dict[str, Any]


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
    ``"__call__"`` (or the name of ``method``).  Layers of a stack (``nn.scan`` or
    ``nn.vmap`` with ``variable_axes``) are the sites ``"layers/mlp@2"``.  No sites
    are what runs in a loop over time, in branches of ``nn.cond`` that call
    different modules, and in a plain JAX transformation of the model's own;
    asking for one raises.

    Args:
      module: an unbound module.
      method: the method to call instead of ``__call__``.
      rngs: passed to ``module.apply``, for dropout and the like.
      **apply_kwargs: keyword arguments of the call (``train=False``), or of
        ``apply`` (``mutable=...``; what the call updates is dropped).

    Returns:
      ``probed(variables, inputs, probes) -> (outputs, acts)`` where
      ``variables`` is what ``module.init`` returned.  ``inputs`` that are a
      tuple are passed as positional arguments, a dict as keyword arguments if the
      method has parameters of these names.  ``probed.train_mode(variables,
      inputs)`` names the layers in train mode, whose result for one example
      depends on the others or on random numbers.

    Raises:
      TypeError: if ``module`` is no linen module; when called, if ``variables`` or
        ``inputs`` do not have the form that the model takes.
      ValueError: if ``module`` is bound; when called, if a probe names a site that
        does not exist, if a function is given for one layer of a stack, or if two
        values have one site name.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
      >>> x = jnp.ones((3, 2))
      >>> variables = model.init(jax.random.key(0), x)
      >>> outputs, acts = from_linen(model)(variables, x, {})
      >>> sorted(acts)
      ['__call__', 'layers_0', 'layers_2']
    """
    _check_module(module)
    carry_collections()
    mutable = apply_kwargs.pop("mutable", False)
    model = _Model(module, method, rngs, mutable, apply_kwargs)

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        recorder = Recorder(probes)
        read = _slot_reader(model, params, inputs)
        # Array probes are variables of the model, shaped like the values they meet.
        deltas: dict[str, Any] = {}
        if probes:
            deltas = _make_deltas(model, params, inputs, recorder, read)
        # Run the model and split what was recorded into sites.
        outputs, updates = _run(model, params, inputs, recorder, deltas)
        warn_batch_statistics("from_linen", recorder.notes)
        acts = _collect_acts(updates.get(ACTS, {}), recorder, read)
        return outputs, acts

    def train_mode(params: Params, inputs: Inputs) -> tuple[str, ...]:
        """Name what makes the result of an example depend on the others."""
        recorder = Recorder({}, fresh=True)

        def record() -> Any:
            updates = _run(model, params, inputs, recorder, {})[1]
            _note_updates(recorder, _check_variables(params), updates)
            return updates.get(ACTS, {})

        jax.eval_shape(record)
        return tuple(f"{name} {note}" for name, note in recorder.notes.items())

    probed.__dict__["train_mode"] = train_mode
    return probed


def _check_module(module: Any) -> None:
    """Raise unless this is an unbound linen module."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            "from_linen: module must be a flax linen module, got "
            f"{type(module).__name__}; use from_nnx for an nnx module and "
            "from_function for a function"
        )
    if module.scope is not None:
        raise ValueError(
            f"from_linen: module must be unbound, got a bound {type(module).__name__}; "
            "give what module.unbind() returns, the module and its variables"
        )


def _slot_reader(
    model: _Model, params: Params, inputs: Inputs
) -> Callable[[Any], Iterator[tuple[Any, Slot]]]:
    """Make the function that reads places and slots off a recording."""
    batch = infer_batch_size(inputs)
    # One more example shows which axis of a value counts examples.
    record_wider = functools.partial(_record_wider, model, params, inputs)
    return lambda recorded: read_slots(recorded, batch, record_wider)


def _make_deltas(
    model: _Model,
    params: Params,
    inputs: Inputs,
    recorder: Recorder,
    read: Callable[[Any], Iterator[tuple[Any, Slot]]],
) -> dict[str, Any]:
    """Make variables of the array probes, after a run that records shapes only."""
    plain = Recorder({})
    recorded = _record_shapes(model, params, inputs, plain)
    # The branches that cannot be recorded are known before the model runs.
    recorder.skip_branches = plain.skip_branches
    slots = dict(read(recorded))
    check_probes(slots.values(), recorder.probes, "from_linen")
    return pack_deltas(recorded, slots, recorder.probes)


def _collect_acts(
    recorded: Any,
    recorder: Recorder,
    read: Callable[[Any], Iterator[tuple[Any, Slot]]],
) -> Acts:
    """Split recorded values into the activations of sites."""
    acts: Acts = {}
    slots = list(read(recorded))
    for place, slot in sort_slots(slots, [s.site for _, s in slots], recorder.visited):
        recorder.check_visited(slot)
        check_applied(recorded, place, slot, recorder.probes)
        for site, act in slot.split_acts(lookup(recorded, place)).items():
            check_new_site(site, acts, "from_linen")
            acts[site] = act
    return acts


def _run(
    model: _Model,
    params: Params,
    inputs: Inputs,
    recorder: Recorder,
    deltas: Mapping[str, Any],
) -> tuple[Outputs, Mapping[str, Any]]:
    """Apply the module under a recorder: the outputs and the updated collections."""
    variables = _check_variables(params)
    method = _unbound_method(model)
    args, kwargs = split_inputs("from_linen", method, inputs, model.options)

    def apply() -> tuple[Outputs, Mapping[str, Any]]:
        token = RECORDING.set(True)
        try:
            with nn.intercept_methods(recorder.intercept):
                return model.module.apply(
                    {**variables, PROBES: deltas} if deltas else variables,
                    *args,
                    method=model.method,
                    rngs=model.rngs,
                    mutable=mutable_collections(model.mutable, recorder.fresh),
                    **{**model.options, **kwargs},
                )
        finally:
            RECORDING.reset(token)

    if recorder.functions or deltas:
        return apply()  # which worked without them
    with _explained_errors(variables, inputs if args else (), method):
        try:
            return apply()
        except TypeError:
            # The branches of a condition must record the same, so that one with
            # modules of its own is run without a recording.
            if not recorder.in_branches:
                raise
            recorder.skip_branches = True
            return apply()


def _record_shapes(
    model: _Model, params: Params, inputs: Inputs, recorder: Recorder
) -> Any:
    """Record the shapes of all values, without running the model."""
    return jax.eval_shape(
        lambda: _run(model, params, inputs, recorder, {})[1].get(ACTS, {})
    )


def _note_updates(
    recorder: Recorder, variables: Mapping[str, Any], updates: Mapping[str, Any]
) -> None:
    """Note the collections, such as a cache, whose variables a call has replaced."""
    if BATCH in recorder.notes.values():
        return  # the statistics of a layer that is named already
    for name in variables.keys() & updates.keys():
        old, new = jax.tree.leaves(variables[name]), jax.tree.leaves(updates[name])
        if any(a is not b for a, b in zip(old, new, strict=False)):
            recorder.notes[f"the collection {name!r}"] = "is updated by a call"


def _record_wider(model: _Model, params: Params, inputs: Inputs) -> Any:
    """Record shapes with one more example; nothing if the model cannot take it."""

    def record(inputs: Inputs) -> Any:
        arrays = jax.tree.map(jnp.asarray, inputs)
        wider = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), arrays)
        return _run(model, params, wider, Recorder({}), {})[1].get(ACTS, {})

    try:
        return jax.eval_shape(record, inputs)
    except (TypeError, ValueError):
        return {}


def _unbound_method(model: _Model) -> Callable[..., Any]:
    """Return the method that runs, as a function of the module."""
    if callable(model.method):
        return model.method
    return getattr(type(model.module), model.method or "__call__")


def _check_variables(params: Params) -> Mapping[str, Any]:
    """Return the collections of the module; raise for what holds none."""
    if not isinstance(params, Mapping):
        raise TypeError(
            "from_linen: params must be the variables that module.init returned, a "
            f"dict of collections, got {type(params).__name__}; give "
            "{'params': state.params} of a train state"
        )
    return unfreeze(params) if isinstance(params, FrozenDict) else params


@contextlib.contextmanager
def _explained_errors(
    variables: Mapping[str, Any], inputs: Inputs, method: Callable[..., Any]
) -> Iterator[None]:
    """Explain the errors of a model that was given the wrong tree or keywords."""
    try:
        yield
    # Without params flax misses the first variable that a layer reads.
    except (
        errors.ApplyScopeInvalidVariablesTypeError,
        errors.ScopeParamNotFoundError,
        errors.ScopeCollectionNotFound,
    ) as error:
        if "params" in variables:
            raise
        raise ValueError(
            "from_linen: params must hold the collections that module.init returned, "
            f"got {sorted(map(str, variables))} without 'params'; give "
            "{'params': ...} with them"
        ) from error
    # Dropout and batch statistics ask for what evaluation does not need.
    except (errors.ModifyScopeVariableError, errors.InvalidRngError) as error:
        raise ValueError(
            "from_linen: a model in train mode needs random keys and mutable "
            f"collections, got none of them: {str(error).partition(' (http')[0]}; run "
            "it in evaluation mode (from_linen(module, train=False), or what its "
            "option is called), or give rngs and mutable"
        ) from error
    # A dict of inputs that was passed as one argument fails wherever it is read.
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        explanation = explain_inputs("from_linen", method, inputs)
        if explanation is None:
            raise
        raise TypeError(explanation) from error
