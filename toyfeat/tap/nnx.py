"""Probed models from unmodified flax nnx modules."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from toyfeat.tap.functions import trace_state
from toyfeat.tap.nnx_recording import (
    ACTS,
    CAPTURES,
    RUN,
    Deltas,
    Recording,
    Run,
    new_run,
    pack_deltas,
    prepare,
    read_slots,
)
from toyfeat.tap.probes import (
    check_new_site,
    explain_inputs,
    infer_batch_size,
    split_inputs,
    warn_batch_statistics,
)
from toyfeat.tap.slots import check_probes, sort_slots
from toyfeat.types import Acts, Inputs, Outputs, Params, Probe, Probed


class _Model(NamedTuple):
    """A module and how it is called, the arguments of :func:`from_nnx`."""

    graph: Any
    method: str | Callable[..., Any]
    unbound: Callable[..., Any]
    options: dict[str, Any]


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
    order: dict[str, int] = {}

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        batch = infer_batch_size(inputs)
        # Array probes are variables, so the shapes of their sites are needed first.
        run = new_run(probes, order)
        if probes:
            recorded, skipped = _record_shapes(called, params, inputs, new_run({}))
            deltas = _make_deltas(recorded, batch, probes)
            outputs, recorded = _call(called, params, inputs, run, deltas, skipped)
        else:
            outputs, recorded, _ = _record(called, params, inputs, run)
        warn_batch_statistics("from_nnx", run.notes)
        return outputs, _collect_acts(recorded, batch, run)

    def train_mode(params: Params, inputs: Inputs) -> tuple[str, ...]:
        """Name what makes the result of an example depend on the others."""
        run = new_run({}, fresh=True)
        _record_shapes(called, params, inputs, run)
        return tuple(f"{name} {note}" for name, note in run.notes.items())

    probed.__dict__["train_mode"] = train_mode
    return probed, jax.tree.map(lambda leaf: leaf, state)


def _make_deltas(
    recorded: Recording, batch: int, probes: Mapping[str, Probe]
) -> Deltas:
    """Make variables of the array probes, for a recording of shapes."""
    slots = [(path, slot) for path, slot, _ in read_slots(recorded, batch)]
    check_probes([slot for _, slot in slots], probes, "from_nnx")
    return pack_deltas(slots, probes)


def _collect_acts(recorded: Recording, batch: int, run: Run) -> Acts:
    """Split recorded values into the activations of sites."""
    acts: Acts = {}
    slots = [(slot, value) for _, slot, value in read_slots(recorded, batch)]
    sites = [slot.site for slot, _ in slots]
    for slot, value in sort_slots(slots, sites, run.order):
        for site, act in slot.split_acts(value).items():
            check_new_site(site, acts, "from_nnx")
            acts[site] = act
    return acts


def _record_shapes(
    model: _Model, params: Params, inputs: Inputs, run: Run
) -> tuple[Recording, frozenset[str]]:
    """Record the shapes of all values, and the modules without; run nothing."""
    skipped: frozenset[str] = frozenset()

    def record() -> Recording:
        nonlocal skipped
        inside = run._replace(trace=trace_state())
        _, recorded, skipped = _record(model, params, inputs, inside)
        return recorded

    return jax.eval_shape(record), skipped


def _record(
    model: _Model, params: Params, inputs: Inputs, run: Run
) -> tuple[Outputs, Recording, frozenset[str]]:
    """Run the model and record the values of as many modules as it allows.

    The recording is part of the model's state, which grows while it runs.  Loops and
    conditions want a state that keeps its structure, and fail.

    Returns:
      The outputs, the recording, and the paths of the modules without one.
    """
    try:
        return *_call(model, params, inputs, run, {}, frozenset()), frozenset()
    except Exception:
        # Without a recording: either the model itself fails, and its error is the
        # one to see, or its calls show which modules run inside a transformation.
        run.notes.clear()
        run.nested.clear()
        plain = run._replace(fresh=True)
        _call(model, params, inputs, plain, {}, None)
        skipped = frozenset(run.nested)
        return *_call(model, params, inputs, run, {}, skipped), skipped


def _call(
    model: _Model,
    params: Params,
    inputs: Inputs,
    run: Run,
    deltas: Deltas,
    skipped: frozenset[str] | None,
) -> tuple[Outputs, Recording]:
    """Call a clone of the module: its outputs and the recording.

    Modules at the paths ``skipped`` are not recorded, none is if that is ``None``.
    """
    args, kwargs = split_inputs("from_nnx", model.unbound, inputs, model.options)
    clone = _clone(model, params)
    prepare(clone, run.fresh, deltas, skipped)

    # Runs inside nnx.capture, which has given every module an attribute for captures.
    def apply(clone: nnx.Module) -> Outputs:
        for _, module in nnx.iter_modules(clone):
            if isinstance(module, (nnx.List, nnx.Dict)):
                vars(module).pop(CAPTURES, None)  # would be one of its elements
        if isinstance(model.method, str):
            method = getattr(clone, model.method)
        else:
            method = functools.partial(model.method, clone)
        return method(*args, **model.options, **kwargs)

    token = RUN.set(run)
    try:
        # A capture of nothing switches off what the model sows itself.
        outputs = nnx.capture(apply)(clone)
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        explanation = explain_inputs("from_nnx", model.unbound, inputs)
        if not args or explanation is None or deltas or run.functions:
            raise
        raise TypeError(explanation) from error
    finally:
        RUN.reset(token)
    recorded = {
        path: vars(module)[ACTS].get_value()
        for path, module in nnx.iter_modules(clone)
        if ACTS in vars(module)
    }
    return outputs, recorded


def _clone(model: _Model, params: Params) -> Any:
    """Make a module of the graph and a copy of its variables.

    A fresh copy belongs to the trace in progress, so that nnx transforms inside the
    model may update it.
    """
    try:
        return nnx.merge(model.graph, jax.tree.map(lambda leaf: leaf, params))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "from_nnx: params must be the whole state of the module, as from_nnx and "
            f"nnx.state(model) return it, got {type(params).__name__} of another "
            "structure; give what from_nnx returned (probed, params = "
            "from_nnx(model)), partial states merged with nnx.merge_state"
        ) from error
