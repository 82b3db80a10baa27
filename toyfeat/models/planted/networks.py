"""Tasks whose network is trained to square its inputs.

References:
  Chughtai and Bushnaq (2025), "Activation space interpretability may be doomed",
  examples 4a and 4b, for squares and circuits in superposition.
  Braun et al. (2025), APD, arXiv 2501.14926, section 3, for cross-layer functions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from toyfeat.loops import train
from toyfeat.models.planted.heads import check_ints, dot, rotation, sparse_uniform
from toyfeat.models.planted.targets import unexplained_variance, untapped
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_function
from toyfeat.types import Array, Params

SITE = "neurons"
# Inputs behind the covariance of writers and the fit: their standard errors are
# 1 / sqrt(50,000), half a percent.
_EXAMPLES = 50_000
# Slope of a clipped output below 0 when training starts, 0 from this share of the steps
# on.  Without it 90 % of the outputs die (docs/decisions/planted.md, "behind a ReLU").
_LEAK = 0.5


class Spec(NamedTuple):
    """A network and its training; hashable, so that one program serves every key.

    Attributes:
      features: ``F`` inputs, each with its square as target.
      neurons: ReLUs of every layer.
      each: neurons that a feature's input enters in every layer, 0 for all.
      clipped: whether outputs pass a ReLU, which removes small interference.
      probability: of an input not to be 0.
      low: inputs are U[low, 1].
      steps: of Adam, whose rate falls to 0 along a cosine.
      batch: inputs per step.
      learning_rate: of the first step.
    """

    features: int
    neurons: tuple[int, ...]
    each: int = 0
    clipped: bool = False
    probability: float = 1.0
    low: float = -0.5
    steps: int = 4000
    batch: int = 512
    learning_rate: float = 3e-3


def squares(
    key: Array, *, features: int = 1, neurons: int = 30, low: float = -0.5, **spec: Any
) -> Task:
    """Plant squares of inputs that all neurons compute together.

    Args:
      key: random key of the task.
      features: ``F`` inputs.
      neurons: width ``D`` of the one ReLU layer.
      low: inputs are U[low, 1], which for -1 is symmetric and easier.
      spec: other fields of :class:`Spec`.

    Returns:
      :class:`toyfeat.models.planted.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    target = (
        "The square of one input" if features == 1 else f"{features} squares of inputs"
    )
    return _make_task(
        "squares",
        "x²" if features == 1 else "squares",
        key,
        Spec(features=features, neurons=(neurons,), low=low, **spec),
        f"{target} from {low:g} to 1, by {neurons} ReLUs that approximate it together.",
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
    """Plant squares of sparse inputs in superposition, with a few neurons for each.

    With more features than neurons no linear read-out can tell them apart (it leaves
    ``1 - neurons / features`` of the variance at least), so from as many on the outputs
    pass a ReLU with a bias.

    Args:
      key: random key of the task.
      features: ``F``, fewer or more than the neurons.
      neurons: width ``D`` of the ReLU layer.
      each: neurons that a feature's input enters.
      probability: of an input not to be 0; one of them at a time by default.
      spec: other fields of :class:`Spec`.

    Returns:
      :class:`toyfeat.models.planted.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    check_ints("circuits", features=features, neurons=neurons)
    if probability is None:
        probability = 1 / max(1, features)
    options = {"clipped": features >= neurons, "probability": probability} | spec
    return _make_task(
        "circuits",
        f"circuits {features} in {neurons}",
        key,
        Spec(features=features, neurons=(neurons,), each=each, **options),
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
    """Plant squares across two layers of neurons, the second of which reads the first.

    The site is both layers side by side, and a reader spans them.

    Args:
      key: random key of the task.
      features: ``F``.
      neurons: of the two layers.
      each: neurons that a feature's input enters in each of them.
      probability: of an input not to be 0; 1.5 of them at a time by default.
      spec: other fields of :class:`Spec`.

    Returns:
      :class:`toyfeat.models.planted.Task`.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    if not isinstance(neurons, Sequence) or len(neurons) != 2:
        raise ValueError(f"cross_layer: wanted neurons of two layers, got {neurons}")
    if probability is None:
        probability = min(1.0, 1.5 / max(1, features))
    return _make_task(
        "cross_layer",
        "cross-layer",
        key,
        Spec(
            features=features,
            neurons=tuple(neurons),
            each=each,
            probability=probability,
            **spec,
        ),
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
    """Run the network; the site ``neurons`` is all layers side by side.

    Args:
      clipped: whether outputs pass a ReLU with a bias.
      params: ``{"layers", "readers", "mix"}``, and ``"out"`` if clipped.
      x: ``[B, F]``.
      tap: called with the site and its value.
      leak: slope of a clipped output below 0.

    Returns:
      ``[B, F]``.
    """
    hidden: list[Array] = []
    for layer in params["layers"]:  # a layer reads the inputs and all layers before it
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


def _make_task(maker: str, name: str, key: Array, spec: Spec, about: str) -> Task:
    """Train a network of squares, and state its truth."""
    _check(maker, spec)
    params, fit, covariance = _train_squares(spec, key)
    if not jnp.isfinite(fit):
        raise ValueError(
            f"{maker}: the fit is {fit}, wanted a low nearer to 0 or a larger "
            f"probability, got {spec}"
        )
    readers = params["readers"]
    return Task(
        probed=_PROBED[spec.clipped],
        params=params,
        sample=partial(_inputs, spec),
        site=SITE,
        truth=Truth(
            readers=readers,
            writers=dot(readers, covariance),  # regression patterns
            frequency=jnp.full(spec.features, spec.probability),
        ),
        side="readers",
        name=name,
        features=_squared,
        fit=float(fit),
        ignored=None,
        about=about,
        limits="A reader's part outside of what the activations span has no effect and "
        "is known from gradients alone.",
    )


def _squared(params: Params, x: Array) -> Array:
    del params
    return x**2


def _inputs(spec: Spec, key: Array, num: int) -> Array:
    shape = (num, spec.features)
    return sparse_uniform(key, shape, spec.probability, low=spec.low)


@partial(jax.jit, static_argnums=0)
def _train_squares(spec: Spec, key: Array) -> tuple[Params, Array, Array]:
    """Train one network.

    Returns:
      Parameters, the share of the targets' variance that they leave, and the
      covariance ``[D, D]`` of the neurons.
    """
    init_key, data_key = jax.random.split(key)
    params, masks = _initial_params(spec, init_key)
    mix = params.pop("mix")  # a fixed rotation, not trained

    def masked(params: Params) -> Params:
        layers = [
            {"weight": layer["weight"] * mask, "bias": layer["bias"]}
            for layer, mask in zip(params["layers"], masks, strict=True)
        ]
        return params | {"layers": layers, "mix": mix}

    def loss(params: Params, batch: tuple[Array, Array]) -> Array:
        x, leak = batch
        y = forward(spec.clipped, masked(params), x, untapped, leak)
        return jnp.mean((y - dot(x**2, mix)) ** 2)

    def sample(step: Array) -> tuple[Array, Array]:
        x = _inputs(spec, jax.random.fold_in(data_key, step), spec.batch)
        return x, jnp.maximum(0.0, _LEAK - step / spec.steps)

    optimizer = optax.adam(optax.cosine_decay_schedule(spec.learning_rate, spec.steps))
    trained = train(loss, params, sample, steps=spec.steps, optimizer=optimizer)
    params = masked(trained.params)
    # Measure the fit and the covariance on inputs that training did not see.
    x = _inputs(spec, jax.random.fold_in(data_key, spec.steps), _EXAMPLES)
    y, sites = _PROBED[spec.clipped](params, x, {})
    targets = dot(x**2, mix)
    fit = unexplained_variance(jnp.sum((y - targets) ** 2), targets)
    centred = sites[SITE] - sites[SITE].mean(0)[None, :]
    return params, fit, dot(centred.T, centred) / _EXAMPLES


def _initial_params(spec: Spec, key: Array) -> tuple[Params, list[Array]]:
    """Draw weights, and the masks of those that may differ from 0."""
    keys = jax.random.split(key, 3 + 3 * len(spec.neurons))
    # Uniform within 1 / sqrt(fan-in), where the fan-in is of inputs that are not 0.
    limit = 1 / jnp.sqrt(jnp.maximum(1, spec.features * spec.probability))
    layers, masks, entered = [], [], []
    for i, width in enumerate(spec.neurons):
        mask_key, weight_key, bias_key = keys[3 + 3 * i : 6 + 3 * i]
        own = _random_entries(mask_key, spec, width)
        # A neuron reads those of earlier layers that share a feature with it.
        shared = [(dot(above.T, own) > 0).astype(float) for above in entered]
        mask = jnp.concatenate([own, *shared])
        weight = jax.random.uniform(weight_key, mask.shape, minval=-1, maxval=1)
        bias = jax.random.uniform(bias_key, (width,), minval=-1, maxval=1)
        layers.append({"weight": mask * weight * limit, "bias": bias * limit / 2})
        masks.append(mask)
        entered.append(own)
    total = sum(spec.neurons)
    readers = jax.random.uniform(keys[0], (spec.features, total), minval=-1, maxval=1)
    readers = readers / jnp.sqrt(total)
    if spec.clipped:  # alive, and each begins with the neurons of its own feature
        readers = jnp.abs(readers) * jnp.concatenate(entered, axis=1)
    mix = rotation(keys[1], spec.features) if spec.features > 1 else jnp.ones((1, 1))
    params = {"layers": layers, "readers": readers, "mix": mix}
    if spec.clipped:
        params["out"] = jnp.zeros(spec.features)
    return params, masks


def _random_entries(key: Array, spec: Spec, width: int) -> Array:
    """``[F, width]``, 1 where a feature's input enters a neuron of a layer."""
    keys = jax.random.split(key, spec.features)
    order = jax.vmap(lambda key: jax.random.permutation(key, width))(keys)
    return (order < (spec.each or width)).astype(float)


def _check(maker: str, spec: Spec) -> None:
    """Raise for sizes that do not fit."""
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
