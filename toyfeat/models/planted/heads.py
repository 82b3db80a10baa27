r"""Models that read activations by known covectors, and write them by known vectors.

The activations are sums of writers, :math:`a = \sum_f s_f w_f + \text{background}`,
and the model is :math:`y = Q\, \mathrm{diag}(c)\, \mathrm{ReLU}(R a - b)`: its
readers are the rows of :math:`R`, and no single output is a feature.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.tap import from_split
from toyfeat.types import Array, Params, Subject, Task, Truth

SITE = "acts"
_HIGHEST = jax.lax.Precision.HIGHEST


def dot(a: Array, b: Array) -> Array:
    """``a @ b`` without rounding the factors."""
    return jnp.matmul(a, b, precision=_HIGHEST)


def check_ints(maker: str, **sizes: Any) -> None:
    """Refuse sizes that are not ints."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer):
            raise TypeError(f"{maker}: wanted an int for {name}, got {size!r}")


def unit(rows: Array) -> Array:
    """Rows of length 1."""
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def rotation(key: Array, size: int) -> Array:
    """``[size, size]``, a random orthogonal matrix."""
    return jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]


def features(params: Params, acts: Array) -> Array:
    """``[B, F]``, what passes the thresholds, before the gains."""
    return jax.nn.relu(dot(acts, params["readers"].T) - params["threshold"][None, :])


def outputs(params: Params, acts: Array) -> Array:
    """``[B, O]``, the features times their gains, rotated."""
    return dot(features(params, acts) * params["gain"][None, :], params["mix"])


def head(key: Array, readers: Array, threshold: Any, gain: Any = 1.0) -> Params:
    """Parameters of :func:`outputs`, with as many outputs as features."""
    num = len(readers)
    return {
        "readers": readers,
        "threshold": jnp.broadcast_to(jnp.asarray(threshold, float), (num,)),
        "gain": jnp.broadcast_to(jnp.asarray(gain, float), (num,)),
        "mix": rotation(key, num),
    }


def task(
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
    """A task of a model that is :func:`outputs` of what ``prefix`` writes.

    The truth are the first ``F`` of the features that the head reads.
    """
    num = len(truth.frequency)

    def planted(params: Params, inputs: Any) -> Array:
        return features(params, prefix(params, inputs))[:, :num]

    return Task(
        from_split(prefix, outputs, site=SITE),
        params,
        sample,
        SITE,
        truth,
        "readers",
        name,
        planted,
        0.0,
        ignored,
        about,
        limits,
    )


def blind(task: Task) -> Subject:
    """What a method may see of a task: no truth, no side, no name."""
    return Subject(task.probed, task.params, task.sample, task.site)


def dual(readers: Array) -> Array:
    """``[F, D]``, vectors that each reader sees alone: ``readers @ dual.T = 1``."""
    return jnp.linalg.pinv(readers).T


def sparse(key: Array, shape: tuple[int, ...], probability: Any) -> Array:
    """Independent codes, U[.5, 1.5] with a probability and 0 otherwise."""
    there, size = jax.random.split(key)
    size = jax.random.uniform(size, shape, minval=0.5, maxval=1.5)
    return jnp.where(jax.random.bernoulli(there, probability, shape), size, 0.0)
