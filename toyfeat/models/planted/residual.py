r"""Residual networks that are trained to add ReLUs of sparse inputs.

Inputs :math:`x` of ``F`` features enter a residual stream by fixed random unit rows
:math:`W_E`, layers of ReLUs read it and write to it, and the same rows read it off:
:math:`\hat y = r_L W_E^\top` is trained towards :math:`x + \mathrm{relu}(x)`.  There
are fewer ReLUs than features.

Since :math:`W_E` is fixed, everything is computed among features and neurons: products
of weights come first, and the stream itself, which is wide, is never written down.

References:
  Braun et al. (2025), APD, arXiv 2501.14926, section 3, for the networks; Bushnaq et
  al. (2025), SPD, arXiv 2506.20790, for two and three layers.
  "Compressed computation is (probably) not computation in superposition", arXiv
  2606.14673, for what is left without the noise of :math:`W_E W_E^\top`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from toyfeat.loops import train
from toyfeat.models.planted.heads import check_ints, dot, sparse_uniform, unit
from toyfeat.models.planted.targets import unexplained_variance, untapped
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_function
from toyfeat.types import Array, Params

SITE = "neurons"
MLP_IN = "mlp_in"
# Inputs behind frequencies, covariances and the fit.  A feature of frequency .005 is
# active in 250 of them, which knows its share to 6 %.
_EXAMPLES = 50_000


class Spec(NamedTuple):
    """A network and its training; hashable, so that one program serves every key.

    Attributes:
      features: ``F``.
      neurons: ReLUs of every layer.
      embedding: width of the residual stream, 0 for one dimension per feature.
      probability: of an input not to be 0; it is U[-1, 1] then.
      steps: of AdamW, whose rate falls to 0 along a cosine.
      batch: inputs per step.
      learning_rate: of the first step.
      decay: of the weights.
    """

    features: int
    neurons: tuple[int, ...]
    embedding: int
    probability: float = 0.01
    steps: int = 1000
    batch: int = 2048
    learning_rate: float = 3e-3
    decay: float = 0.01


def resid_mlp(
    key: Array,
    *,
    layers: int = 1,
    features: int = 100,
    neurons: int = 50,
    embedding: int = 1000,
    **spec: Any,
) -> Task:
    """Plant ReLUs of sparse inputs that layers of a residual network compute together.

    The site is the neurons of all layers side by side; the reader of a feature is what
    its output reads of them, so a reader spans the layers.  The published networks have
    100 features and 50 neurons (1 layer), 100 and 25 (2) and 102 and 17 (3).

    Args:
      key: random key of the task.
      layers: how many.
      features: ``F`` inputs and outputs.
      neurons: of each layer.
      embedding: width of the residual stream.
      spec: other fields of :class:`Spec`.

    Returns:
      :class:`toyfeat.models.planted.Task`; writers are the regression patterns of the
      readers.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    check_ints("resid_mlp", layers=layers, neurons=neurons)
    sizes = Spec(features, (neurons,) * layers, embedding, **spec)
    _check("resid_mlp", sizes)
    make_task, params, measured = _plant(sizes, key)
    readers = dot(jnp.concatenate(params["out"]), params["embed"].T).T
    return make_task(
        probed=_NEURONS,
        site=SITE,
        truth=Truth(
            readers=readers,
            writers=dot(readers, measured.covariance),
            frequency=jnp.full(features, sizes.probability / 2),
        ),
        name=f"residual network of {layers} layer{'s' * (layers != 1)}",
        features=_positive_inputs,
        about=f"ReLUs of {features} sparse inputs by {layers} x {neurons} neurons "
        f"behind a residual stream of {embedding} dimensions.",
        limits="What an output reads of the neurons is planted, whether or not they "
        "compute its ReLU: a feature that training gave up has a short row.",
    )


def compressed_computation(
    key: Array, *, features: int = 100, neurons: int = 50, **spec: Any
) -> Task:
    r"""Plant fewer mechanisms than features: a control for finding one per feature.

    One layer of ReLUs with a residual stream of one dimension per feature, so that
    :math:`W_E W_E^\top` has no noise that a network could make use of.  While one
    feature is active at a time, what ``n`` neurons make of the positive ones is a
    matrix of rank ``n`` in place of the identity of rank ``F``.  By Eckart and Young
    it leaves ``F - n`` at least, as much as the naive solution, which computes ``n``
    of the ReLUs: :math:`p (1 - n / F) / 6` per feature, a twelfth of the probability
    for 100 features and 50 neurons.  Training ends 4 % above that, with every feature
    computed in part.  The site is what the neurons read, where activations have ``F``
    features and the model has ``neurons`` readers.

    Args:
      key: random key of the task.
      features: ``F`` inputs and outputs, the width ``D`` of the site.
      neurons: fewer than the features.
      spec: other fields of :class:`Spec`.

    Returns:
      :class:`toyfeat.models.planted.Task`, whose readers are those of the neurons.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    check_ints("compressed_computation", features=features, neurons=neurons)
    sizes = Spec(features, (neurons,), 0, **spec)
    _check("compressed_computation", sizes)
    if not neurons < features:
        raise ValueError(
            f"compressed_computation: wanted fewer neurons than features = {features}, "
            f"got {neurons}; with as many there is nothing to compress"
        )
    make_task, params, measured = _plant(sizes, key)
    readers = params["in"][0].T
    return make_task(
        probed=_MLP_IN,
        site=MLP_IN,
        truth=Truth(
            readers=readers,
            writers=readers * sizes.probability / 3,  # variance of an input
            frequency=measured.frequency,
        ),
        name="compressed computation",
        features=_neurons_themselves,
        about=f"ReLUs of {features} sparse inputs by {neurons} neurons, which can "
        f"compute {neurons} of them: {features} mechanisms would be too many.",
        limits="A neuron reads many features and a third of the neurons is active at a "
        "time, so that sparse codes have no reason to prefer their readers.",
    )


class _Measured(NamedTuple):
    """Figures of a trained network on inputs that training did not see.

    Attributes:
      fit: share of the variance of the targets that is left.
      covariance: ``[N, N]`` of the neurons.
      frequency: ``[N]``, how often a neuron is active.
    """

    fit: Array
    covariance: Array
    frequency: Array


def _plant(spec: Spec, key: Array) -> tuple[Callable[..., Task], Params, _Measured]:
    """Train a network, and return the maker of its tasks, parameters and figures."""
    params, measured = _train_residual(spec, key)
    make_task = partial(
        Task,
        params=params,
        sample=partial(_inputs, spec),
        side="readers",
        fit=float(measured.fit),
        ignored=None,
    )
    return make_task, params, measured


def _check(maker: str, spec: Spec) -> None:
    """Raise for knobs that do not fit."""
    counts = {"features": spec.features, "embedding": spec.embedding}
    check_ints(maker, **counts, steps=spec.steps, batch=spec.batch)
    sizes = (spec.features, *spec.neurons, spec.steps, spec.batch)
    if not spec.neurons or min(sizes) < 1 or spec.embedding < 0:
        raise ValueError(f"{maker}: sizes must be at least 1, got {spec}")
    if not 0 < spec.probability <= 1:
        raise ValueError(f"{maker}: the probability must be in (0, 1], got {spec}")


def _inputs(spec: Spec, key: Array, num: int) -> Array:
    return sparse_uniform(key, (num, spec.features), spec.probability, low=-1.0)


def _targets(x: Array) -> Array:
    return x + jax.nn.relu(x)


def _positive_inputs(params: Params, x: Array) -> Array:
    del params
    return jax.nn.relu(x)


def _hidden(params: Params, x: Array) -> list[Array]:
    """Return the neurons of every layer; each reads the inputs and layers before it."""
    hidden: list[Array] = []
    for weight in params["in"]:
        reads = dot(x, dot(params["embed"], weight))
        for above, write in zip(hidden, params["out"], strict=False):
            reads = reads + dot(above, dot(write, weight))
        hidden.append(jax.nn.relu(reads))
    return hidden


def _neurons_themselves(params: Params, x: Array) -> Array:
    return jnp.concatenate(_hidden(params, x), axis=1)


def _read_off(params: Params, x: Array, neurons: Array) -> Array:
    """Return the outputs: what the embedding reads of inputs and neurons."""
    embed = params["embed"]
    writes = dot(jnp.concatenate(params["out"]), embed.T)
    return dot(x, dot(embed, embed.T)) + dot(neurons, writes)


def _by_neurons(params: Params, x: Array, tap: Callable[[str, Array], Array]) -> Array:
    neurons = tap(SITE, jnp.concatenate(_hidden(params, x), axis=1))
    return _read_off(params, x, neurons)


def _by_mlp_in(params: Params, x: Array, tap: Callable[[str, Array], Array]) -> Array:
    acts = tap(MLP_IN, dot(x, params["embed"]))
    return _read_off(params, x, jax.nn.relu(dot(acts, params["in"][0])))


def _by_stream(params: Params, x: Array, tap: Callable[[str, Array], Array]) -> Array:
    embed, stream = params["embed"], dot(x, params["embed"])
    for layer, weights in enumerate(zip(params["in"], params["out"], strict=True)):
        stream = tap(f"stream_{layer}", stream)
        stream = stream + dot(jax.nn.relu(dot(stream, weights[0])), weights[1])
    return dot(stream, embed.T)


RESIDUAL_STREAM = from_function(_by_stream)
"""The same network with its stream written down, whose weights meet inputs one by one,
as :func:`toyfeat.partition.decompose_weights` needs them for two layers and more."""

_NEURONS = from_function(_by_neurons)
_MLP_IN = from_function(_by_mlp_in)


def _first_weights(key: Array, width: int, neurons: tuple[int, ...]) -> Params:
    """Draw weights of variance 1 over the fan-in, as published."""
    in_keys, out_keys = jax.random.split(key, (2, len(neurons)))
    return {
        "in": [
            jax.random.normal(k, (width, n)) / width**0.5
            for k, n in zip(in_keys, neurons, strict=True)
        ],
        "out": [
            jax.random.normal(k, (n, width)) / n**0.5
            for k, n in zip(out_keys, neurons, strict=True)
        ],
    }


@partial(jax.jit, static_argnums=0)
def _train_residual(spec: Spec, key: Array) -> tuple[Params, _Measured]:
    """Train one network, and measure it."""
    embed_key, init_key, data_key = jax.random.split(key, 3)
    width = spec.embedding or spec.features
    embed = jnp.eye(spec.features)
    if spec.embedding:
        embed = unit(jax.random.normal(embed_key, (spec.features, width)))
    weights = _first_weights(init_key, width, spec.neurons)

    def loss(weights: Params, x: Array) -> Array:
        y = _by_neurons(weights | {"embed": embed}, x, untapped)
        return jnp.mean((y - _targets(x)) ** 2)

    def draw(step: Array | int, num: int) -> Array:
        return _inputs(spec, jax.random.fold_in(data_key, step), num)

    # Train on fresh inputs, then measure on inputs that training did not see.
    schedule = optax.cosine_decay_schedule(spec.learning_rate, spec.steps)
    optimizer = optax.adamw(schedule, weight_decay=spec.decay)
    trained = train(
        loss,
        weights,
        lambda step: draw(step, spec.batch),
        steps=spec.steps,
        optimizer=optimizer,
    )
    params = trained.params | {"embed": embed}
    x = draw(spec.steps, _EXAMPLES)
    neurons = _neurons_themselves(params, x)
    error = jnp.sum((_read_off(params, x, neurons) - _targets(x)) ** 2)
    centred = neurons - neurons.mean(0)[None, :]
    return params, _Measured(
        fit=unexplained_variance(error, _targets(x)),
        covariance=dot(centred.T, centred) / _EXAMPLES,
        frequency=jnp.mean(neurons > 0, axis=0, dtype=neurons.dtype),
    )
