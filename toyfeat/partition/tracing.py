"""Run a model with some of its weights factored, by the equations of its program.

A model is traced to the equations of JAX, and these are executed one by one.  Weights
that are decomposed travel as :class:`Factored`; where an input meets one of them, a
function is asked for the output.  The model itself is any pure function of parameters
and inputs, so nothing of it has to be rewritten.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core

from toyfeat.partition.factors import (
    Factored,
    Untraceable,
    Use,
    cast,
    multiply_constant,
    reshape,
    transpose,
    use_convolution,
    use_dot,
    use_gather,
)
from toyfeat.types import Array, Inputs, Outputs, Params

Model = Callable[[Params, Inputs], Outputs]

_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""Primitives that only call a program, and where they keep it."""


class _Value(NamedTuple):
    """A value of the program, and whether it depends on the inputs."""

    value: Any
    varies: bool


class _Run(NamedTuple):
    """State of an execution: how often each weight was used, and who is asked."""

    answer: Callable[[Use], Array]
    counts: dict[str, int]


def run_factored(
    model: Model,
    params: Params,
    inputs: Inputs,
    weights: Mapping[int, Factored],
    answer: Callable[[Use], Array],
) -> Outputs:
    """Run a model whose weights are factored.

    Args:
      model: pure function.
      params: of the target.
      inputs: of the model.
      weights: number of a leaf in ``params`` to the factored weight in its place.
      answer: called at every use, returns the output in the form of ``use.output``.

    Returns:
      Outputs of the model.

    Raises:
      Untraceable: if a weight is used in another way than as a matrix.
    """
    traced, shape = jax.make_jaxpr(model, return_shape=True)(params, inputs)
    values = [
        _Value(weights.get(number, leaf), False)
        for number, leaf in enumerate(jax.tree.leaves(params))
    ]
    values += [_Value(leaf, True) for leaf in jax.tree.leaves(inputs)]
    run = _Run(answer, {})
    outputs = _execute(run, traced.jaxpr, traced.consts, values)
    plain = [_plain(output) for output in outputs]
    return jax.tree.unflatten(jax.tree.structure(shape), plain)


def _plain(held: _Value) -> Array:
    """Return an ordinary value.

    Raises:
      Untraceable: for a weight.
    """
    if isinstance(held.value, Factored):
        raise Untraceable("the weight itself is an output")
    return held.value


def _execute(
    run: _Run, jaxpr: Any, consts: Any, arguments: list[_Value]
) -> list[_Value]:
    """Execute the equations of a program."""
    values: dict[Any, _Value] = {}
    values |= zip(jaxpr.constvars, [_Value(c, False) for c in consts], strict=True)
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(variable: Any) -> _Value:
        if isinstance(variable, jax_core.Literal):
            return _Value(variable.val, False)
        return values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        outputs = _step(run, equation, inputs)
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(variable) for variable in jaxpr.outvars]


def _step(run: _Run, equation: Any, inputs: list[_Value]) -> list[_Value]:
    """Execute one equation."""
    varies = any(held.varies for held in inputs)
    if not any(isinstance(held.value, Factored) for held in inputs):
        # No weight takes part: the primitive does what it always does.
        bound = equation.primitive.get_bind_params(equation.params)
        # Versions of JAX before 0.10 return functions apart from the parameters.
        subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
        values = [held.value for held in inputs]
        outputs = equation.primitive.bind(*subfuns, *values, **params)
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        return [_Value(output, varies) for output in outputs]
    name = equation.primitive.name
    if name in _INLINED:
        inner = equation.params[_INLINED[name]]
        consts = getattr(inner, "consts", ())
        return _execute(run, getattr(inner, "jaxpr", inner), consts, inputs)
    if name in _OPERATIONS:
        return [_OPERATIONS[name](run, equation.params, inputs)]
    raise Untraceable(f"the operation {name!r}")


def _site_name(run: _Run, weight: str) -> str:
    """Name a use: the weight's name, with ``#1`` for the second use, and so on."""
    count = run.counts.get(weight, 0)
    run.counts[weight] = count + 1
    return f"{weight}#{count}" if count else weight


def _answer(run: _Run, use: Use) -> _Value:
    """Compute the value of a use, in the shape that the model has it in."""
    return _Value(use.restore(run.answer(use)), True)


def _product(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    first = isinstance(inputs[0].value, Factored)
    weight, other = inputs if first else inputs[::-1]
    if isinstance(other.value, Factored):
        raise Untraceable("a product of two of the weights")
    if not other.varies:
        product = multiply_constant(weight.value, other.value, params, first)
        return _Value(product, False)
    name = _site_name(run, weight.value.name)
    return _answer(run, use_dot(weight.value, other.value, params, first, name))


def _convolution(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    x, weight = inputs
    if not (isinstance(weight.value, Factored) and x.varies):
        raise Untraceable("a convolution of the weight")
    name = _site_name(run, weight.value.name)
    return _answer(run, use_convolution(weight.value, x.value, params, name))


def _rows(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    weight, index = inputs
    if not (isinstance(weight.value, Factored) and index.varies):
        raise Untraceable("a gather of constant rows")
    name = _site_name(run, weight.value.name)
    return _answer(run, use_gather(weight.value, index.value, params, name))


def _reshape(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    del run
    return _Value(reshape(inputs[0].value, params["new_sizes"]), False)


def _transpose(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    del run
    return _Value(transpose(inputs[0].value, params["permutation"]), False)


def _cast(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    del run
    return _Value(cast(inputs[0].value, params["new_dtype"]), False)


def _broadcast(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    # Axes of length 1 are a reshape; repeated weights are something else.
    shape = params["shape"]
    if math.prod(shape) != inputs[0].value.value.size:
        raise Untraceable("a weight that is repeated")
    return _reshape(run, {"new_sizes": shape}, inputs)


def _squeeze(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    shape = inputs[0].value.value.shape
    sizes = [n for axis, n in enumerate(shape) if axis not in params["dimensions"]]
    return _reshape(run, {"new_sizes": sizes}, inputs)


def _same(run: _Run, params: dict[str, Any], inputs: list[_Value]) -> _Value:
    del run, params
    return inputs[0]


_OPERATIONS: dict[str, Callable[[_Run, dict[str, Any], list[_Value]], _Value]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _rows,
    "reshape": _reshape,
    "transpose": _transpose,
    "convert_element_type": _cast,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
}
"""Operations that a weight may take part in."""
