"""Find the sites of a decomposition: weights by path, and where a model uses them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_int
from toyfeat.partition.decomposition import (
    Components,
    Decomposition,
    Site,
    WeightShape,
)
from toyfeat.partition.factors import Untraceable, Use
from toyfeat.partition.tracing import Model
from toyfeat.types import Array, Inputs, Outputs, Params


def decompose_weights(
    model: Any,
    params: Params,
    paths: Sequence[str] | str,
    components: int | Mapping[str, int],
    inputs: Inputs,
) -> Decomposition:
    """Split weights of any model into rank-one parts.

    A weight is named by its path in the parameters, such as
    ``"params/Dense_0/kernel"``.  Where the model uses it, there is a site: a dense or
    convolutional layer, a projection of an attention head, a lookup in an embedding.
    A weight that is used twice (tied weights) has two sites and one set of parts.

    Args:
      model: a linen module, a probed model (``from_linen``, ``from_nnx``,
        ``from_function``), or a pure ``(params, inputs) -> outputs``.
      params: its parameters; the variables of a linen module, the state of an nnx one.
      paths: of the weights, with ``/`` between the levels.
      components: parts of every weight, or path to parts.
      inputs: a few inputs of the model, to see how it uses its weights.

    Returns:
      :class:`Decomposition`.

    Raises:
      ValueError: for a path that does not exist, one array under two paths, no
        components, a weight that is used in a way that has no masked form or not at
        all, a target that is not finite or not the same at every call.
      TypeError: for a model or a number of components of another type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> x = jnp.ones((5, 3))
      >>> split = decompose_weights(mlp, params, ["in", "out"], 8, x)
      >>> parts = split.init(jax.random.key(0))
      >>> masks = {site.name: jnp.zeros((5, 8)) for site in split.sites}
      >>> split.masked(params, parts, x, masks).tolist()[0]
      [0.0, 0.0]
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    leaves, found = _find(params, paths)
    counts = _counts(paths, components)
    call = as_model(model)
    _check_target(call, params, inputs)
    weights, sites = {}, []
    # How many axes of a weight are read shows where the model uses it.
    for path in paths:
        shape = tuple(leaves[found[path]].shape)
        weights[path] = _split_axes(
            call, params, inputs, path, WeightShape(found[path], shape, 0, counts[path])
        )
    probe = Decomposition(call, weights, ())

    def record(params: Params, components: Components, inputs: Inputs) -> Outputs:
        def answer(use: Use) -> Array:
            weight = weights[use.name.split("#")[0]]
            sites.append(
                Site(
                    name=use.name,
                    weight=use.name.split("#")[0],
                    transposed=use.transposed,
                    width=weight.matrix_shape()[use.transposed],
                    components=weight.components,
                    positions=use.inner.ndim - 2,
                )
            )
            return use.output

        return probe.run(params, components, inputs, answer)

    parts = jax.eval_shape(probe.init, jax.random.key(0))
    _try(lambda: jax.eval_shape(record, params, parts, inputs), ", ".join(paths))
    return Decomposition(call, weights, tuple(sites))


def as_model(model: Any) -> Model:
    """Return ``(params, inputs) -> outputs`` of a module, a probed model, a function.

    Raises:
      TypeError: if it is none of them.
    """
    if isinstance(model, nn.Module):
        return model.apply
    if not callable(model):
        raise TypeError(
            "decompose_weights: model must be a linen module, a probed model or a "
            f"function, got {type(model).__name__}; wrap an nnx module in from_nnx"
        )
    required = [
        parameter
        for parameter in inspect.signature(model).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 3:  # a probed model, without probes
        probed: Any = model
        return lambda params, inputs: probed(params, inputs, {})[0]
    return model


def _find(params: Params, paths: list[str]) -> tuple[list[Array], dict[str, int]]:
    """Find leaves by their paths."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat]
    names = [name.removesuffix("/value") for name in names]  # variables of nnx
    leaves = [leaf for _, leaf in flat]
    wrong = [path for path in paths if path not in names]
    if wrong or not paths:
        matrices = [n for n, x in zip(names, leaves, strict=True) if np.ndim(x) >= 2]
        raise ValueError(
            f"decompose_weights: paths must be of weights of the parameters, got "
            f"{wrong or paths}; there are {', '.join(matrices)}"
        )
    found = {path: names.index(path) for path in paths}
    for path, number in found.items():
        if np.ndim(leaves[number]) < 2:
            raise ValueError(
                f"decompose_weights: a weight must have two or more axes, got {path!r} "
                f"of shape {np.shape(leaves[number])}; biases are not decomposed"
            )
        # One array under two names would be split twice.
        same = [n for n, x in zip(names, leaves, strict=True) if x is leaves[number]]
        if len(same) > 1:
            raise ValueError(
                "decompose_weights: weights must be arrays of their own, got one under "
                f"{', '.join(same)}; let the model use one of them twice, which makes "
                "two sites with the same parts"
            )
    return leaves, found


def _counts(paths: list[str], components: Any) -> dict[str, int]:
    """Return the number of parts of each weight."""
    given = (
        components
        if isinstance(components, Mapping)
        else dict.fromkeys(paths, components)
    )
    if set(given) != set(paths) or len(set(paths)) < len(paths):
        raise ValueError(
            f"decompose_weights: components must be for each path once, got "
            f"{sorted(given)} for {paths}; give one number, or one for each"
        )
    return {p: check_int("decompose_weights", "components", given[p]) for p in paths}


def _check_target(call: Model, params: Params, inputs: Inputs) -> None:
    """Check that a target is finite, and the same at every call."""
    first, second = (jax.tree.leaves(call(params, inputs)) for _ in range(2))
    if any(isinstance(x, Tracer) for x in first):
        return
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True)]
    if not all(np.all(np.isfinite(a)) for a, _ in pairs):
        raise ValueError(
            "decompose_weights: outputs of the target must be finite, got NaN or "
            "infinity; look at its parameters and inputs"
        )
    if not all(np.array_equal(a, b) for a, b in pairs):
        raise ValueError(
            "decompose_weights: the target must return the same at every call, got two "
            "outputs that differ; switch off dropout and other noise"
        )


def _split_axes(
    call: Model, params: Params, inputs: Inputs, path: str, weight: WeightShape
) -> WeightShape:
    """Find how many of the leading axes are read, by trying."""
    reasons = []
    for num_read in range(len(weight.shape) - 1, 0, -1):
        trial = weight._replace(num_read=num_read)
        alone = Decomposition(call, {path: trial}, ())
        uses: list[str] = []

        def run(params: Params, inputs: Inputs, alone: Any, uses: list[str]) -> Any:
            def answer(use: Use) -> Array:
                uses.append(use.name)
                return use.output

            return alone.run(params, alone.init(jax.random.key(0)), inputs, answer)

        try:
            jax.eval_shape(
                lambda p, x, a=alone, u=uses: run(p, x, a, u), params, inputs
            )
        except Untraceable as error:
            reasons.append(str(error))
            continue
        if uses:
            return trial
        reasons.append("the model does not use it for these inputs")
    raise ValueError(
        "decompose_weights: a weight must be that of a dense layer, a convolution or "
        f"an embedding, got {path!r}: {reasons[0]}; leave it out"
    )


def _try(run: Any, paths: str) -> None:
    """Run, and explain what cannot be followed."""
    try:
        run()
    except Untraceable as error:
        raise ValueError(
            f"decompose_weights: weights must meet the inputs one by one, got {error} "
            f"for {paths}; decompose one of them, or multiply the inputs first"
        ) from None
