r"""Networks that square their inputs: known readers, known writers, closed forms.

One ReLU layer computes :math:`y = Q (x_1^2, \dots, x_m^2)` from :math:`m` inputs,
behind a fixed random rotation :math:`Q` of the outputs, so that for :math:`m > 1`
no single output is a feature.  The activations of the hidden layer mostly show
how the function is put together; the direction that is read is the row of the
last layer.

References:
  Chughtai and Bushnaq (2025), "Activation space interpretability may be doomed",
  examples 4a and 4b.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from toyfeat.loops import train_chunk, train_in_chunks
from toyfeat.models.planted.targets import untapped
from toyfeat.models.planted.task import Truth
from toyfeat.tap import from_function
from toyfeat.types import Array, Params

_HIGHEST = jax.lax.Precision.HIGHEST

SITE = "hidden"
"""The ReLU layer, where the readers and writers of the truth live."""


class Squaring(NamedTuple):
    """Inputs and sizes of a squaring network.

    Attributes:
      features: number ``F`` of inputs, each with its own square.
      neurons: width ``D`` of the ReLU layer.
      bias: whether the ReLU layer has a bias.  Without one the network can only
        compute ``c_+ max(x, 0) + c_- max(-x, 0)``.
      residual: width of a residual stream that carries the input past the
        layer, ``r' = r + a W_out``; 0 for none.
      low: lower end of the uniform inputs, or ``None`` for N(0, 1) inputs.
      high: upper end of the uniform inputs.
      probability: chance that an input is not set to zero.
    """

    features: int = 1
    neurons: int = 10
    bias: bool = True
    residual: int = 0
    low: float | None = -1.0
    high: float = 1.0
    probability: float = 1.0


class Trained(NamedTuple):
    """Networks trained from ``P`` seeds; every leaf has the leading axis ``P``.

    Attributes:
      params: parameters.
      rotation: ``[P, F, F]``, the rotation ``Q`` of the outputs.
      loss: ``[P]``, mean squared error over the last chunk of training.
    """

    params: Params
    rotation: Array
    loss: Array


def initial_params(key: Array, task: Squaring) -> Params:
    """Draw uniform weights within ``1 / sqrt(fan-in)``, and unit-norm embeddings.

    Args:
      key: random key.
      task: the shape of the network.

    Returns:
      ``{"w_in", "b_in", "w_out"}`` without ``b_in`` if the task has no bias, and
      with ``{"embed", "unembed"}`` if it has a residual stream.
    """
    names = ("w_in", "b_in", "w_out", "embed", "unembed")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    width = task.residual or task.features

    def uniform(key: Array, fan_in: int, *shape: int) -> Array:
        limit = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

    params = {
        "w_in": uniform(keys["w_in"], task.features, width, task.neurons),
        "w_out": uniform(keys["w_out"], task.neurons, task.neurons, width),
    }
    if task.bias:
        params["b_in"] = uniform(keys["b_in"], task.features, task.neurons)
    if task.residual:
        embed = jax.random.normal(keys["embed"], (task.features, task.residual))
        unembed = jax.random.normal(keys["unembed"], (task.residual, task.features))
        params["embed"] = embed / jnp.linalg.norm(embed, axis=1, keepdims=True)
        params["unembed"] = unembed / jnp.linalg.norm(unembed, axis=0, keepdims=True)
    return params


def forward(params: Params, x: Array, tap: Callable[[str, Array], Array]) -> Array:
    """Run a squaring network; its sites are ``hidden`` and the residual stream.

    Args:
      params: from :func:`initial_params`.
      x: ``[B, F]``.
      tap: called with ``"resid_pre"`` ``[B, residual]`` (if there is a residual
        stream), ``"hidden"`` ``[B, D]`` and ``"resid_post"``.

    Returns:
      ``[B, F]``.
    """
    residual = "embed" in params
    stream = tap("resid_pre", _dot(x, params["embed"])) if residual else x
    hidden = _dot(stream, params["w_in"])
    if "b_in" in params:
        hidden = hidden + params["b_in"][None, :]
    written = _dot(tap(SITE, jax.nn.relu(hidden)), params["w_out"])
    if not residual:
        return written
    return _dot(tap("resid_post", stream + written), params["unembed"])


probed = from_function(forward)
"""The squaring network as a probed model."""


def random_inputs(key: Array, task: Squaring, num: int) -> Array:
    """Draw ``[num, F]`` inputs from the distribution of a task."""
    value, active = jax.random.split(key)
    shape = (num, task.features)
    if task.low is None:
        x = jax.random.normal(value, shape)
    else:
        x = jax.random.uniform(value, shape, minval=task.low, maxval=task.high)
    return jnp.where(jax.random.bernoulli(active, task.probability, shape), x, 0.0)


def targets(rotation: Array, x: Array) -> Array:
    """Compute the rotated squares ``[B, F]`` of the inputs, ``y = Q phi(x)``."""
    return _dot(x**2, rotation.T)


def truth(task: Squaring, params: Params, rotation: Array, covariance: Array) -> Truth:
    r"""Compute readers and writers of the squares at the hidden layer.

    With the last layer :math:`y = V a`, square ``f`` is read by row ``f`` of
    :math:`U = Q^\top V` and written along row ``f`` of :math:`U \Sigma`, the
    regression pattern of what is read.

    Args:
      task: what was trained.
      params: of one network.
      rotation: ``[F, F]``.
      covariance: ``[D, D]``, centred, of the hidden activations.

    Returns:
      Truth with rows ``[F, D]``.

    References:
      Haufe et al. (2014), "On the interpretation of weight vectors of linear
      models", equation 6.
    """
    last = params["w_out"]
    if "unembed" in params:
        last = _dot(last, params["unembed"])
    readers = _dot(rotation.T, last.T)
    frequency = jnp.full((task.features,), task.probability)
    writers = _dot(readers, covariance)
    return Truth(readers=readers, writers=writers, frequency=frequency)


def train(
    keys: Array,
    task: Squaring,
    *,
    steps: int,
    batch: int,
    learning_rate: optax.ScalarOrSchedule,
    chunk: int = 500,
    on_chunk: Callable[[int, Array], None] | None = None,
) -> Trained:
    """Train one network per key with Adam, all of them in one compiled step.

    Args:
      keys: ``[P]`` random keys, one per network.
      task: what to train.
      steps: optimizer steps, on fresh inputs each; rounded up to whole chunks.
      batch: inputs per step.
      learning_rate: for ``optax.adam``; a schedule of the step is fine.
      chunk: steps per compiled call.
      on_chunk: called with the steps done and the losses ``[P]`` of the chunk,
        for progress.

    Returns:
      The trained networks.

    Raises:
      ValueError: if a count is not positive.
      FloatingPointError: if a loss is not finite.

    Example:
      >>> import jax
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> trained = train(
      ...     keys, Squaring(), steps=10, batch=8, learning_rate=1e-2, chunk=10
      ... )
      >>> trained.params["w_out"].shape
      (2, 10, 1)
    """
    for name, count in (("steps", steps), ("batch", batch), ("chunk", chunk)):
        if count < 1:
            raise ValueError(f"train: {name} must be at least 1, got {count}")
    optimizer = optax.adam(learning_rate)

    # Key 0 of a network is for its start, key ``i + 1`` for the inputs of step ``i``.
    def start(key: Array) -> tuple[Array, Any]:
        key_params, key_rotation = jax.random.split(jax.random.fold_in(key, 0))
        params = initial_params(key_params, task)
        normal = jax.random.normal(key_rotation, (task.features, task.features))
        rotation = jnp.linalg.qr(normal)[0] if task.features > 1 else jnp.ones((1, 1))
        return rotation, (params, optimizer.init(params))

    def run(key: Array, rotation: Array, state: Any, first: Array) -> tuple[Any, Array]:
        def sample(step: Array) -> tuple[Array, Array]:
            x = random_inputs(jax.random.fold_in(key, step + 1), task, batch)
            return x, targets(rotation, x)

        return train_chunk(
            _error, state, sample, steps=chunk, optimizer=optimizer, first=first
        )

    # All networks train side by side: ``vmap`` over keys, rotations and states.
    rotation, state = jax.jit(jax.vmap(start))(keys)
    run_chunk = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None)), donate_argnums=2)
    state, losses = train_in_chunks(
        lambda state, first: run_chunk(keys, rotation, state, first),
        state,
        steps=steps,
        chunk=chunk,
        on_chunk=on_chunk,
    )
    return Trained(params=state[0], rotation=rotation, loss=losses)


def no_bias_error(task: Squaring) -> float:
    r"""Compute the least mean squared error of a network of one input without bias.

    The network can only compute :math:`c_+ x_+ + c_- x_-`, whose best fit to
    :math:`x^2` leaves :math:`E x^4 - \sum_\pm (E x_\pm^3)^2 / E x_\pm^2`: 1/80
    for U[-1, 1] and :math:`3 - 8 / \pi` for N(0, 1).

    Args:
      task: one input; its distribution counts.

    Returns:
      The error.

    Example:
      >>> round(1 / no_bias_error(Squaring(bias=False)))
      80
    """
    halves = [(_half_moment(task, 3, s), _half_moment(task, 2, s)) for s in (1, -1)]
    explained = sum(third**2 / second for third, second in halves if second > 0)
    return sum(_half_moment(task, 4, s) for s in (1, -1)) - explained


def no_bias_variances(task: Squaring, e: Array) -> Array:
    r"""Compute the two nonzero eigenvalues of the activation covariance without bias.

    The activations are :math:`x_+ p + x_- q` with :math:`p = \mathrm{ReLU}(E)`,
    :math:`q = \mathrm{ReLU}(-E)` on disjoint neurons, so the covariance in the
    basis :math:`p / |p|, q / |q|` is 2 x 2.

    Args:
      task: one input.
      e: ``[D]``, the input weights ``E``.

    Returns:
      ``[2]``, descending; all other eigenvalues are 0.
    """
    # Entries of the 2 x 2 covariance in the basis p / |p|, q / |q|.
    p, q = jnp.linalg.norm(jax.nn.relu(e)), jnp.linalg.norm(jax.nn.relu(-e))
    first = [_half_moment(task, 1, s) for s in (1, -1)]
    second = [_half_moment(task, 2, s) for s in (1, -1)]
    pp = (second[0] - first[0] ** 2) * p**2
    qq = (second[1] - first[1] ** 2) * q**2
    pq = -first[0] * first[1] * p * q
    # Eigenvalues of a symmetric 2 x 2 matrix.
    half, root = (pp + qq) / 2, jnp.hypot((pp - qq) / 2, pq)
    return jnp.stack([half + root, half - root])


def _half_moment(task: Squaring, power: int, sign: int) -> float:
    """Compute the moment ``E max(sign * x, 0)^power`` of the inputs."""
    if task.low is None:
        full = 2 ** (power / 2) * math.gamma((power + 1) / 2) / math.sqrt(math.pi)
        return task.probability * full / 2
    ends = (task.low, task.high) if sign > 0 else (-task.high, -task.low)
    low, high = (max(end, 0.0) for end in ends)
    full = (high ** (power + 1) - low ** (power + 1)) / (power + 1)
    return task.probability * full / (task.high - task.low)


def _error(params: Params, pair: tuple[Array, Array]) -> Array:
    x, y = pair
    return jnp.mean((forward(params, x, untapped) - y) ** 2)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_HIGHEST)
