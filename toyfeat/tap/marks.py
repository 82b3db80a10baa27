"""Marks: values named inside any JAX program, read and changed from outside.

A *mark* is an identity that gives a value its name.  Any transformation may be around
it (``vmap``, ``jit``, ``checkpoint``, ``scan``): the program is traced first, with the
marks in it, and then evaluated again with probes at them.  Values inside a scan come
out stacked, and array probes go in the same way.

An adapter marks the values of its modules and calls :func:`run_marked`.  For a model
``layer(x)`` under ``jax.vmap`` over positions the traced program is::

    let b = mark[base="layer"] a in ...     # of one example, [T, D]

and its slot is the site ``"layer"`` of shape ``[B, T, D]``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, DebugInfo, Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from toyfeat.tap.probes import apply_probe, call_name, check_new_site, visit
from toyfeat.tap.slots import Slot, check_probes
from toyfeat.types import Acts, Array, Outputs, Probe

_MARK = Primitive("toyfeat_mark")
_MARK.def_impl(lambda value, **_: value)
_MARK.def_abstract_eval(lambda value, **_: value)
mlir.register_lowering(_MARK, lambda _, value, **__: [value])


def _batch_mark(operands: Any, axes: Any, **names: str) -> Any:
    """Mark the values of all examples at once, with their axis in front."""
    return _MARK.bind(jnp.moveaxis(operands[0], axes[0], 0), **names), 0


def _differentiate_mark(primals: Any, tangents: Any, **names: str) -> Any:
    """Mark the value; its tangent is no site of the model."""
    return _MARK.bind(*primals, **names), tangents[0]


batching.primitive_batchers[_MARK] = _batch_mark
ad.primitive_jvps[_MARK] = _differentiate_mark

# Equations whose program runs once, in their place.
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMATS = ("remat", "remat2", "checkpoint")


class _Program(NamedTuple):
    """A traced program: its equations and the values of its constants."""

    jaxpr: Any
    consts: Sequence[Any]


Deltas = Mapping[str, Array]
# Applies the probes of a slot to its value; the array is None without an array probe.
_Apply = Callable[[Slot, Array, Array | None], Array]


def mark(
    base: str, value: Any, is_opaque: Callable[[Any], bool] = lambda node: False
) -> Any:
    """Give every float array of a value a name.

    Args:
      base: name of the site; a repeated one is numbered.
      value: pytree.
      is_opaque: says which nodes of the pytree hold no activations.
    """

    def mark_leaf(site: str, leaf: Array) -> Array:
        return _MARK.bind(leaf, base=base, suffix=site[len(base) :])

    # Opaque nodes are taken out, so that the others keep their paths.
    nodes, structure = jax.tree.flatten(value, is_leaf=is_opaque)
    hidden = [None if is_opaque(node) else node for node in nodes]
    named = visit(base, structure.unflatten(hidden), mark_leaf)
    marked = jax.tree.leaves(named, is_leaf=lambda node: node is None)
    pairs = zip(nodes, marked, strict=True)
    return structure.unflatten([a if is_opaque(a) else b for a, b in pairs])


def run_marked(
    who: str,
    function: Callable[[Any, Any], Outputs],
    shared: Any,
    inputs: Any,
    probes: Mapping[str, Probe],
    *,
    batch: int,
    batched: bool,
) -> tuple[Outputs, Acts]:
    """Run a function with marks, with probes at them.

    Args:
      who: the adapter, for messages.
      function: ``(shared, inputs) -> outputs``, of all inputs or of one.
      shared: pytree that all inputs share.
      inputs: pytree with leading axis ``batch``.
      probes: array or function by site.
      batch: number of examples ``B``.
      batched: whether the function takes all inputs at once; otherwise it is mapped
        over them.

    Returns:
      The outputs and the values of the marks, by site in order of computation.
    """
    # Trace the function, of one input if it is to be mapped.
    one = inputs
    if not batched:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(shared, one)
    lead = () if batched else (batch,)
    program = _open(traced)
    slots = list(_list_slots(program, {}, (), lead))
    check_probes(slots, probes, who)
    deltas = {slot.site: slot.stack_deltas(probes) for slot in slots}
    deltas = {site: delta for site, delta in deltas.items() if delta is not None}
    structure = jax.tree.structure(shapes)
    # Evaluate the program with the probes in it.
    leaves, inner = jax.tree.flatten((shared, inputs))
    if batched:
        apply = _apply_directly(probes)
        outputs, values = _evaluate(program, leaves, slots, deltas, apply)
    else:
        outputs, values = _evaluate_mapped(
            program, inner, (shared, inputs), slots, deltas, probes
        )
    # Values of a scan are split into layers.
    acts: Acts = {}
    for slot in slots:
        for site, act in slot.split_acts(values[slot.site]).items():
            check_new_site(site, acts, who)
            acts[site] = act
    return structure.unflatten(outputs), acts


def _evaluate_mapped(
    program: _Program,
    structure: Any,
    arguments: tuple[Any, Any],
    slots: list[Slot],
    deltas: Deltas,
    probes: Mapping[str, Probe],
) -> tuple[list[Any], dict[str, Array]]:
    """Evaluate the program of one example for all of them."""
    axis = {slot.site: len(slot.layers) for slot in slots}
    batch = jax.tree.leaves(arguments[1])[0].shape[0]

    def run(shared: Any, one: Any, deltas: Deltas, index: Array) -> Any:
        leaves = structure.flatten_up_to((shared, one))
        return _evaluate(program, leaves, slots, deltas, _apply_mapped(probes, index))

    # The batch is the first axis at every example, behind those of layers in a slot.
    deltas = {site: jnp.moveaxis(d, axis[site], 0) for site, d in deltas.items()}
    run = jax.vmap(run, in_axes=(None, 0, 0, 0))
    outputs, values = run(*arguments, deltas, jnp.arange(batch))
    return outputs, {s: jnp.moveaxis(v, 0, axis[s]) for s, v in values.items()}


def _apply_directly(probes: Mapping[str, Probe]) -> _Apply:
    """Make the function that applies probes to the values of all examples."""

    def apply(slot: Slot, act: Array, delta: Array | None) -> Array:
        if delta is not None:
            return act + delta
        probe = probes.get(slot.site)
        return apply_probe(slot.site, act, probe if callable(probe) else None)

    return apply


def _apply_mapped(probes: Mapping[str, Probe], index: Array) -> _Apply:
    """Make the function that applies probes inside of the map over examples.

    A function probe takes the values of all examples, so that it is the rule of a map.
    The ``index`` of the example says to the rule that there is one.
    """
    direct = _apply_directly(probes)

    def apply(slot: Slot, act: Array, delta: Array | None) -> Array:
        if delta is not None or not callable(probes.get(slot.site)):
            return direct(slot, act, delta)

        @jax.custom_batching.custom_vmap
        def replace(act: Array, index: Array) -> Array:
            return act

        @replace.def_vmap
        def replace_all(size: int, mapped: Any, act: Array, index: Array) -> Any:
            if not mapped[0]:
                act = jnp.broadcast_to(act[None], (size, *act.shape))
            return direct(slot, act, None), True

        return replace(act, index)

    return apply


def _open(program: Any) -> _Program:
    """Separate the equations of a program from the values of its constants."""
    return _Program(getattr(program, "jaxpr", program), getattr(program, "consts", ()))


def _inner_program(equation: Any) -> _Program | None:
    """Return the program in an equation whose marks can be reached."""
    name, params = equation.primitive.name, equation.params
    if name not in (*_CALLS, *_REMATS, "scan") or params.get("length") == 0:
        return None
    return _open(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def _list_slots(
    program: _Program,
    calls: dict[tuple[str, str], int],
    layers: tuple[int, ...],
    lead: tuple[int, ...],
) -> Iterator[Slot]:
    """List the marks of a program in the order in which they are computed."""
    for equation in program.jaxpr.eqns:
        inner = _inner_program(equation)
        if equation.primitive is _MARK:
            # The name of a repeated call is numbered.
            base, suffix = equation.params["base"], equation.params["suffix"]
            call = calls.get((base, suffix), 0)
            calls[base, suffix] = call + 1
            aval = equation.outvars[0].aval
            site = call_name(base, call) + suffix
            yield Slot(site, layers, (*lead, *aval.shape), aval.dtype)
        elif inner is not None:
            length = equation.params.get("length")
            outer = layers if length is None else (*layers, length)
            yield from _list_slots(inner, calls, outer, lead)


def _evaluate(
    program: _Program,
    args: Sequence[Any],
    slots: Sequence[Slot],
    deltas: Deltas,
    apply: _Apply,
) -> tuple[list[Any], dict[str, Array]]:
    """Evaluate a program with probes at its marks.

    Args:
      program: the program.
      args: its arguments.
      slots: of its marks, in the order of :func:`_list_slots`.
      deltas: array probes by slot.
      apply: applies the probes of a slot.

    Returns:
      Outputs, and the values of the slots.
    """
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.constvars, program.consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))
    acts: dict[str, Array] = {}

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    plain: list[Any] = []  # equations without marks that wait to be run together
    for equation in (*jaxpr.eqns, None):
        inner = None if equation is None else _inner_program(equation)
        is_mark = equation is not None and equation.primitive is _MARK
        num = 1 if is_mark else 0
        if inner is not None:
            num = sum(1 for _ in _list_slots(inner, {}, (), ()))
        if equation is not None and not num:
            plain.append(equation)
            continue
        known |= _run_equations(jaxpr, plain, known)
        plain = []
        if equation is None:
            break
        # Every mark takes the next slot, an inner program the next ones.
        here, slots = slots[:num], slots[num:]
        values = [read(variable) for variable in equation.invars]
        if is_mark:
            site = here[0].site
            acts[site] = apply(here[0], values[0], deltas.get(site))
            outputs = [acts[site]]
        else:
            names = {slot.site for slot in here}
            chosen = {site: d for site, d in deltas.items() if site in names}
            outputs, new = _evaluate_inner(equation, values, here, chosen, apply)
            acts |= new
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars], acts


def _run_equations(jaxpr: Any, equations: list[Any], known: Mapping[Any, Any]) -> Any:
    """Run equations without marks; returns the values of their variables."""
    outputs = [v for equation in equations for v in equation.outvars]
    used = [v for e in equations for v in e.invars if not isinstance(v, Literal)]
    inputs = [v for v in dict.fromkeys(used) if v in known]
    info = DebugInfo("toyfeat", "marks", ("",) * len(inputs), ("",) * len(outputs))
    part = jaxpr.replace(
        constvars=[], invars=inputs, outvars=outputs, eqns=equations, debug_info=info
    )
    values = jaxpr_as_fun(ClosedJaxpr(part, ()))(*(known[v] for v in inputs))
    return dict(zip(outputs, values, strict=True))


def _evaluate_inner(
    equation: Any,
    values: list[Any],
    slots: Sequence[Slot],
    deltas: Deltas,
    apply: _Apply,
) -> tuple[list[Any], dict[str, Array]]:
    """Evaluate the program of an equation under the transformation it stands for."""
    program, params = _inner_program(equation), equation.params
    if program is None:
        raise TypeError(f"run_marked: no program in {equation.primitive}")

    def run(values: list[Any], deltas: Deltas) -> tuple[list[Any], dict[str, Array]]:
        return _evaluate(program, values, slots, deltas, apply)

    name = equation.primitive.name
    if name in _CALLS:
        return run(values, deltas)
    if name in _REMATS:
        options = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
        return jax.checkpoint(run, **options)(values, deltas)
    # A scan: constants, carry and slices; the probes are sliced with the latter.
    if "ft_in" in params:  # trees of them, in newer versions of JAX
        num_consts, num_carry = (len(part) for part in params["ft_in"].unpack()[:2])
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, rest = values[:num_consts], values[num_consts:]

    def body(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
        xs, deltas = slices
        outputs, acts = run([*consts, *carry, *xs], deltas)
        return outputs[:num_carry], (outputs[num_carry:], acts)

    slices = rest[num_carry:], deltas
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (stacked, acts) = jax.lax.scan(body, rest[:num_carry], slices, **options)
    return [*carry, *stacked], acts
