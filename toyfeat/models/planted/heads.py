r"""Models that read activations by known covectors, and write them by known vectors.

The activations are sums of writers, :math:`a = \sum_f s_f w_f + \text{background}`,
and the model is :math:`y = Q\, \mathrm{diag}(c)\, \mathrm{ReLU}(R a - b)`: its
readers are the rows of :math:`R`, and no single output is a feature.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_int
from toyfeat.linalg import dense
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_split
from toyfeat.types import Array, Params

SITE = "acts"
_HIGHEST = jax.lax.Precision.HIGHEST


def dot(a: Array, b: Array) -> Array:
    """Multiply matrices in full float32 precision."""
    return jnp.matmul(a, b, precision=_HIGHEST)


def check_ints(maker: str, **sizes: Any) -> None:
    """Raise ``TypeError`` for a size that is not an int."""
    for name, size in sizes.items():
        check_int(maker, name, size, least=None)


def check_threshold(name: str, threshold: float) -> None:
    """Raise for a threshold that the smallest code does not pass."""
    if not 0 <= threshold <= 0.5:
        raise ValueError(f"{name}: wanted threshold in 0 .. 0.5, got {threshold}")


def unit(rows: Array) -> Array:
    """Normalize rows to length 1."""
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def rotation(key: Array, size: int) -> Array:
    """Draw a random orthogonal matrix ``[size, size]``."""
    return dense.qr(jax.random.normal(key, (size, size)))[0]


def dual(readers: Array) -> Array:
    """Dual basis ``[F, D]``: ``readers @ dual.T`` is the identity."""
    return jnp.linalg.pinv(readers).T


def sparse_codes(key: Array, shape: tuple[int, ...], probability: Any) -> Array:
    """Draw independent codes, U[.5, 1.5] with a probability and 0 otherwise."""
    active_key, size_key = jax.random.split(key)
    sizes = jax.random.uniform(size_key, shape, minval=0.5, maxval=1.5)
    return jnp.where(jax.random.bernoulli(active_key, probability, shape), sizes, 0.0)


def sparse_uniform(
    key: Array,
    shape: tuple[int, ...],
    probability: Any,
    *,
    low: Any = 0.0,
    high: Any = 1.0,
) -> Array:
    """Draw independent inputs, U[low, high] with a probability and 0 otherwise."""
    value_key, active_key = jax.random.split(key)
    values = jax.random.uniform(value_key, shape, minval=low, maxval=high)
    return jnp.where(jax.random.bernoulli(active_key, probability, shape), values, 0.0)


def features(params: Params, acts: Array) -> Array:
    """Features ``[B, F]``: what passes the thresholds, before the gains."""
    return jax.nn.relu(dot(acts, params["readers"].T) - params["threshold"][None, :])


def outputs(params: Params, acts: Array) -> Array:
    """Outputs ``[B, O]``: the features times their gains, rotated."""
    return dot(features(params, acts) * params["gain"][None, :], params["mix"])


def write_codes(params: Params, codes: Array) -> Array:
    """Activations ``[B, D]``: the codes times their writers."""
    return dot(codes, params["writers"])


def head(key: Array, readers: Array, threshold: Any, gain: Any = 1.0) -> Params:
    """Parameters of :func:`outputs`, with as many outputs as features."""
    num = len(readers)
    return {
        "readers": readers,
        "threshold": jnp.broadcast_to(jnp.asarray(threshold, float), (num,)),
        "gain": jnp.broadcast_to(jnp.asarray(gain, float), (num,)),
        "mix": rotation(key, num),
    }


def make_task(
    name: str,
    prefix: Callable[[Params, Any], Array],
    params: Params,
    sample: Callable[[Array, int], Any],
    truth: Truth,
    *,
    ignored: Array | None = None,
    about: str,
    limits: str,
) -> Task:
    """Make a task of a model that is :func:`outputs` of what ``prefix`` writes.

    The truth is the first ``F`` of the features that the head reads.

    Args:
      name: of the task.
      prefix: ``(params, inputs) -> acts``.
      params: of the head and of the prefix.
      sample: ``(key, num) -> inputs``.
      truth: readers, writers and frequencies.
      ignored: structure of the activations that the model does not read.
      about: what is planted.
      limits: what no method could know.

    Returns:
      The task, whose readers are scored.
    """
    # A head may read more than is planted, such as features that hardly matter.
    num = len(truth.frequency)

    def planted(params: Params, inputs: Any) -> Array:
        return features(params, prefix(params, inputs))[:, :num]

    return Task(
        probed=from_split(prefix, outputs, site=SITE),
        params=params,
        sample=sample,
        site=SITE,
        truth=truth,
        side="readers",
        name=name,
        features=planted,
        fit=0.0,
        ignored=ignored,
        about=about,
        limits=limits,
    )
