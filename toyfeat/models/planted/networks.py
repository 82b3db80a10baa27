r"""Tasks whose network is trained: squares of its inputs, and its inputs themselves.

References:
  Chughtai and Bushnaq (2025), "Activation space interpretability may be doomed",
  examples 4a and 4b, for squares and circuits in superposition.
  Elhage et al. (2022), "Toy models of superposition", for :func:`superposition`.
  Bushnaq et al. (2025), APD, arXiv 2501.14926, section 3, for cross-layer functions
  and the hidden identity.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from toyfeat.models.planted.heads import check_ints, dot, rotation, unit
from toyfeat.tap import from_function
from toyfeat.types import Array, Params, Task, Truth

SITE = "neurons"
_EXAMPLES = 50_000  # behind the covariance of writers and the fit


class Spec(NamedTuple):
    """A network and its training; hashable, so that one program serves every key.

    Attributes:
      features: ``F`` inputs, each with its square as target.
      neurons: ReLUs of every layer.
      each: neurons that a feature's input enters in every layer, 0 for all.
      clipped: whether outputs pass a ReLU, which removes small interference.
      probability: of an input not to be 0.
      low: inputs are U[low, 1].
      steps: of Adam with a rate of 3e-3 that falls to 0 along a cosine.
      batch: inputs per step.
    """

    features: int
    neurons: tuple[int, ...]
    each: int = 0
    clipped: bool = False
    probability: float = 1.0
    low: float = -0.5
    steps: int = 4000
    batch: int = 512


def squares(
    key: Array, *, features: int = 1, neurons: int = 30, low: float = -0.5, **spec: Any
) -> Task:
    """Every input is squared, by all of the neurons together.

    Args:
      key: random key of the task.
      features: ``F`` inputs.
      neurons: width ``D`` of the one ReLU layer.
      low: inputs are U[low, 1], which for -1 is symmetric and easier.
      spec: more of :class:`Spec`.

    Returns:
      :class:`toyfeat.types.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    what = (
        "The square of one input" if features == 1 else f"{features} squares of inputs"
    )
    return _task(
        "squares",
        "x²" if features == 1 else "squares",
        key,
        Spec(features, (neurons,), low=low, **spec),
        f"{what} from {low:g} to 1, by {neurons} ReLUs that approximate it together.",
    )


def circuits(
    key: Array,
    *,
    features: int = 20,
    neurons: int = 60,
    each: int = 12,
    probability: float | None = None,
    **spec: Any,
) -> Task:
    """Squares of sparse inputs in superposition, a few neurons for each.

    With more features than neurons no linear read-out can tell them apart (it leaves
    ``1 - neurons / features`` of the variance at least), so from as many on the outputs
    pass a ReLU with a bias.

    Args:
      key: random key of the task.
      features: ``F``, fewer or more than the neurons.
      neurons: width ``D`` of the ReLU layer.
      each: neurons that a feature's input enters.
      probability: of an input not to be 0; one of them at a time by default.
      spec: more of :class:`Spec`.

    Returns:
      :class:`toyfeat.types.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    check_ints("circuits", features=features, neurons=neurons)
    if probability is None:
        probability = 1 / max(1, features)
    more = {"clipped": features >= neurons, "probability": probability} | spec
    return _task(
        "circuits",
        f"circuits {features} in {neurons}",
        key,
        Spec(features, (neurons,), each, **more),
        f"{features} squares of sparse inputs by {neurons} ReLUs, {each} for each of "
        "them, outputs rotated.",
    )


def cross_layer(
    key: Array,
    *,
    features: int = 20,
    neurons: tuple[int, int] = (30, 30),
    each: int = 4,
    probability: float | None = None,
    **spec: Any,
) -> Task:
    """Squares whose neurons are spread over two layers, the second reading the first.

    The site is both layers side by side, and a reader spans them.

    Args:
      key: random key of the task.
      features: ``F``.
      neurons: of the two layers.
      each: neurons that a feature's input enters in each of them.
      probability: of an input not to be 0; 1.5 of them at a time by default.
      spec: more of :class:`Spec`.

    Returns:
      :class:`toyfeat.types.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    if not isinstance(neurons, Sequence) or len(neurons) != 2:
        raise ValueError(f"cross_layer: wanted neurons of two layers, got {neurons}")
    if probability is None:
        probability = min(1.0, 1.5 / max(1, features))
    return _task(
        "cross_layer",
        "cross-layer",
        key,
        Spec(features, tuple(neurons), each, probability=probability, **spec),
        f"{features} squares by two layers of {neurons[0]} and {neurons[1]} ReLUs, "
        "each function in both.",
    )


def forward(
    clipped: bool,
    params: Params,
    x: Array,
    tap: Callable[[str, Array], Array],
    leak: Array | float = 0.0,
) -> Array:
    """``[B, F] -> [B, F]``; the site ``neurons`` is all layers side by side."""
    hidden: list[Array] = []
    for layer in params["layers"]:
        pre = dot(jnp.concatenate([x, *hidden], axis=1), layer["weight"])
        hidden.append(jax.nn.relu(pre + layer["bias"][None, :]))
    read = dot(tap(SITE, jnp.concatenate(hidden, axis=1)), params["readers"].T)
    if clipped:
        read = read + params["out"][None, :]
        read = jnp.where(read > 0, read, leak * read)
    return dot(read, params["mix"])


_PROBED = {
    clipped: from_function(partial(forward, clipped)) for clipped in (False, True)
}


def _task(maker: str, name: str, key: Array, spec: Spec, about: str) -> Task:
    _check(maker, spec)
    params, fit, covariance = _trained(spec, key)
    if not jnp.isfinite(fit):
        raise ValueError(
            f"{maker}: the fit is {fit}, wanted a low nearer to 0 or a larger "
            f"probability, got {spec}"
        )
    readers = params["readers"]
    frequency = jnp.full(spec.features, spec.probability)
    return Task(
        _PROBED[spec.clipped],
        params,
        partial(_inputs, spec),
        SITE,
        Truth(readers, dot(readers, covariance), frequency),
        "readers",
        name,
        _squared,
        float(fit),
        None,
        about,
        "A reader's part outside of what the activations span has no effect and is "
        "known from gradients alone.",
    )


def _squared(params: Params, x: Array) -> Array:
    del params
    return x**2


def _itself(params: Params, x: Array) -> Array:
    del params
    return x


def _inputs(spec: Spec, key: Array, num: int) -> Array:
    value, there = jax.random.split(key)
    shape = (num, spec.features)
    x = jax.random.uniform(value, shape, minval=spec.low, maxval=1.0)
    return jnp.where(jax.random.bernoulli(there, spec.probability, shape), x, 0.0)


@partial(jax.jit, static_argnums=0)
def _trained(spec: Spec, key: Array) -> tuple[Params, Array, Array]:
    """Parameters, share of the variance that is left, covariance of the neurons."""
    start, stream = jax.random.split(key)
    params, masks = _initial(spec, start)
    mix = params.pop("mix")
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, spec.steps))

    def whole(params: Params) -> Params:
        layers = [
            {"weight": layer["weight"] * mask, "bias": layer["bias"]}
            for layer, mask in zip(params["layers"], masks, strict=True)
        ]
        return params | {"layers": layers, "mix": mix}

    def outputs(params: Params, x: Array, leak: Any = 0.0) -> tuple[Array, Array]:
        seen: dict[int, Array] = {}
        y = forward(
            spec.clipped, whole(params), x, lambda _, a: seen.setdefault(0, a), leak
        )
        return y, seen[0]

    def error(params: Params, x: Array, leak: Array) -> Array:
        return jnp.mean((outputs(params, x, leak)[0] - dot(x**2, mix)) ** 2)

    def step(carry: Any, index: Array) -> tuple[Any, None]:
        params, state = carry
        x = _inputs(spec, jax.random.fold_in(stream, index), spec.batch)
        leak = jnp.maximum(0.0, 0.5 - index / spec.steps)  # so that no output dies
        grads = jax.grad(error)(params, x, leak)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
            change, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, change), state), None

    carry = params, optimizer.init(params)
    params, _ = jax.lax.scan(step, carry, jnp.arange(spec.steps))[0]
    x = _inputs(spec, jax.random.fold_in(stream, spec.steps), _EXAMPLES)
    y, acts = outputs(params, x)
    wanted = dot(x**2, mix)
    fit = jnp.sum((y - wanted) ** 2) / jnp.sum((wanted - wanted.mean(0)[None, :]) ** 2)
    centred = acts - acts.mean(0)[None, :]
    return whole(params), fit, dot(centred.T, centred) / _EXAMPLES


def _initial(spec: Spec, key: Array) -> tuple[Params, list[Array]]:
    """Weights at random, and which of them may differ from 0."""
    parts = jax.random.split(key, 3 + 3 * len(spec.neurons))
    layers, masks, above = [], [], []
    for i, width in enumerate(spec.neurons):
        chosen, weight, bias = parts[3 + 3 * i : 6 + 3 * i]
        places = jax.vmap(lambda k, n=width: jax.random.permutation(k, n))
        order = places(jax.random.split(chosen, spec.features))
        mine = (order < (spec.each or width)).astype(float)  # [F, width]
        shared = [(dot(one.T, mine) > 0).astype(float) for one in above]
        mask = jnp.concatenate([mine, *shared])
        limit = 1 / jnp.sqrt(jnp.maximum(1, spec.features * spec.probability))
        size = mask.shape
        layers.append(
            {
                "weight": mask
                * jax.random.uniform(weight, size, minval=-1, maxval=1)
                * limit,
                "bias": jax.random.uniform(bias, (width,), minval=-1, maxval=1)
                * limit
                / 2,
            }
        )
        masks.append(mask)
        above.append(mine)
    total = sum(spec.neurons)
    readers = jax.random.uniform(parts[0], (spec.features, total), minval=-1, maxval=1)
    readers = readers / jnp.sqrt(total)
    if spec.clipped:  # alive, and each begins with the neurons of its own feature
        readers = jnp.abs(readers) * jnp.concatenate(above, axis=1)
    params = {"layers": layers, "readers": readers}
    if spec.clipped:
        params["out"] = jnp.zeros(spec.features)
    mix = rotation(parts[1], spec.features) if spec.features > 1 else jnp.ones((1, 1))
    return params | {"mix": mix}, masks


def _check(maker: str, spec: Spec) -> None:
    for width in spec.neurons:
        check_ints(maker, neurons=width)
    counts = {"features": spec.features, "steps": spec.steps, "batch": spec.batch}
    check_ints(maker, **counts, each=spec.each)
    sizes = (spec.features, *spec.neurons, spec.steps, spec.batch)
    if min(sizes) < 1 or not 0 < spec.probability <= 1 or not spec.low < 1:
        raise ValueError(
            f"{maker}: sizes must be at least 1, the probability in (0, 1] and "
            f"low < 1, got {spec}"
        )
    if not 0 <= spec.each <= min(spec.neurons):
        raise ValueError(
            f"{maker}: each must be in 0 .. {min(spec.neurons)}, got {spec.each}"
        )


def superposition(
    key: Array,
    *,
    features: int = 5,
    hidden: int = 2,
    identity: bool = False,
    probability: float = 0.05,
    steps: int = 4000,
    batch: int = 1024,
) -> Task:
    """Sparse inputs squeezed through a narrow layer and out again by the same weights.

    ``ReLU(W^T W x + b)``; what an input writes is what its output reads.

    Args:
      key: random key of the task.
      features: ``F`` inputs and outputs.
      hidden: width ``D`` of the narrow layer.
      identity: whether an identity matrix stands after the narrow layer; the site is
        before it.
      probability: of an input to be there, U[0, 1] then.
      steps: of Adam.
      batch: inputs per step.

    Returns:
      :class:`toyfeat.types.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    check_ints(
        "superposition", features=features, hidden=hidden, steps=steps, batch=batch
    )
    if min(features, hidden, steps, batch) < 1 or not 0 < probability <= 1:
        raise ValueError(
            "superposition: sizes must be at least 1, the probability in (0, 1], got "
            f"features {features}, hidden {hidden}, steps {steps}, batch {batch}, "
            f"probability {probability}"
        )
    params, fit = _squeezed(features, hidden, probability, steps, batch, key)
    if not jnp.isfinite(fit):
        raise ValueError(
            f"superposition: the fit is {fit}, wanted a larger probability, got "
            f"{probability}"
        )
    if identity:
        params["identity"] = jnp.eye(hidden)
    rows = params["weight"]
    name = f"superposition {features}-{hidden}" + identity * " with identity"
    return Task(
        _SQUEEZE,
        params,
        partial(_uniform, features, probability),
        "hidden",
        Truth(rows, rows, jnp.full(features, probability)),
        "readers",
        name,
        _itself,
        float(fit),
        None,
        f"{features} sparse inputs in {hidden} dimensions and back.",
        "A feature that the training gave up has a row near 0, whose direction means "
        "nothing.",
    )


def _squeeze(params: Params, x: Array, tap: Callable[[str, Array], Array]) -> Array:
    hidden = tap("hidden", dot(x, params["weight"]))
    if "identity" in params:
        hidden = tap("after", dot(hidden, params["identity"]))
    return jax.nn.relu(dot(hidden, params["weight"].T) + params["bias"][None, :])


_SQUEEZE = from_function(_squeeze)


def _uniform(features: int, probability: float, key: Array, num: int) -> Array:
    value, there = jax.random.split(key)
    x = jax.random.uniform(value, (num, features))
    return jnp.where(jax.random.bernoulli(there, probability, x.shape), x, 0.0)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _squeezed(
    features: int, hidden: int, probability: float, steps: int, batch: int, key: Array
) -> tuple[Params, Array]:
    start, stream = jax.random.split(key)
    params = {
        "weight": unit(jax.random.normal(start, (features, hidden))),
        "bias": jnp.zeros(features),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def error(params: Params, x: Array) -> Array:
        return jnp.sum((_squeeze(params, x, lambda _, a: a) - x) ** 2) / len(x)

    def step(carry: Any, index: Array) -> tuple[Any, None]:
        params, state = carry
        x = _uniform(features, probability, jax.random.fold_in(stream, index), batch)
        grads = jax.grad(error)(params, x)
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, change), state), None

    carry = params, optimizer.init(params)
    params, _ = jax.lax.scan(step, carry, jnp.arange(steps))[0]
    x = _uniform(features, probability, jax.random.fold_in(stream, steps), _EXAMPLES)
    left = error(params, x) * len(x) / jnp.sum((x - x.mean(0)[None, :]) ** 2)
    return params, left
