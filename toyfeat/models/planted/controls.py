"""Controls: models in which there is nothing to find, though something could be found.

The truth of a control is empty.  Its score is the number of mechanisms that a method
returns, all of them false.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.models.planted import heads
from toyfeat.models.planted.heads import SITE, check_ints, dot, rotation, unit
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_function, from_split
from toyfeat.types import Array, Inputs, Params, Probed

# Condition number of a control's activations or gradients: not white, so that methods
# cannot pass by finding no leading direction, and far from what float32 loses.
_CONDITION = 10.0

# Size of a label beside what the activation adds to it.  The gradient of half the
# squared output is weighted by the output, which must not depend on the activation:
# at 10 that dependence is a hundredth of the squares.
_LABEL_SIZE = 10.0


def random_network(
    key: Array,
    *,
    dim: int = 32,
    width: int = 256,
    layers: int = 3,
    outputs: int = 16,
) -> Task:
    """Plant nothing: a deep network of random weights behind random activations.

    Activations are normal with a random covariance.  The network is a stack of tanh
    layers with normal weights; its first layer reads ``width`` random directions, all
    of them in every example, so that no example is a combination of a few.

    Args:
      key: random key of the task.
      dim: width ``D`` of the site.
      width: of the layers, at least ``2 * dim``: fewer directions than that could be
        told apart.
      layers: how many.
      outputs: how many.

    Returns:
      :class:`toyfeat.models.planted.Task` with an empty truth.

    Raises:
      ValueError: if sizes do not fit.
      TypeError: if a size is not an int.

    Example:
      >>> import jax
      >>> random_network(jax.random.key(0)).truth.readers.shape
      (0, 32)
    """
    sizes = {"dim": dim, "width": width, "layers": layers, "outputs": outputs}
    check_ints("random_network", **sizes)
    if not (dim >= 2 and width >= 2 * dim and layers >= 1 and outputs >= 1):
        raise ValueError(
            "random_network: wanted dim >= 2, width >= 2 * dim, layers and outputs "
            f">= 1, got dim {dim}, width {width}, layers {layers}, outputs {outputs}"
        )
    shape_key, *keys = jax.random.split(key, layers + 2)
    widths = [dim, *[width] * layers, outputs]
    weights = [
        jax.random.normal(k, (a, b)) / a**0.5
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]
    return _control(
        _RANDOM_NETWORK,
        {"shape": _random_shape(shape_key, dim), "weights": weights},
        partial(_normal_inputs, dim),
        dim,
        name="random network",
        about=f"A network of {layers} tanh layers of {width} with random weights, "
        f"behind normal activations of {dim} dimensions.",
    )


def unrelated_labels(
    key: Array,
    *,
    dim: int = 32,
    features: int = 48,
    probability: float = 0.08,
    outputs: int = 4,
) -> Task:
    """Plant sparse features in the activations, and labels that have none.

    Activations are sums of sparse sources, which a dictionary of activations finds.
    The outputs of an example are random labels plus ``a @ C`` with a normal ``C`` that
    is drawn for this example alone: gradients are noise with a random covariance.

    Args:
      key: random key of the task.
      dim: width ``D``.
      features: sources of the activations.
      probability: of a source to be active.
      outputs: how many.

    Returns:
      :class:`toyfeat.models.planted.Task` with an empty truth.

    Raises:
      ValueError: if sizes or the probability do not fit.
      TypeError: if a size is not an int.
    """
    check_ints("unrelated_labels", dim=dim, features=features, outputs=outputs)
    if not (dim >= 2 and min(features, outputs) >= 1 and 0 < probability <= 1):
        raise ValueError(
            "unrelated_labels: wanted dim >= 2, features and outputs >= 1, probability "
            f"in (0, 1], got dim {dim}, features {features}, outputs {outputs}, "
            f"probability {probability}"
        )
    rows_key, shape_key = jax.random.split(key)
    params = {
        "writers": unit(jax.random.normal(rows_key, (features, dim))),
        "shape": _random_shape(shape_key, dim),
    }
    return _control(
        _UNRELATED_LABELS,
        params,
        partial(_noisy_inputs, features, dim, outputs, probability),
        dim,
        name="unrelated labels",
        about=f"Activations of {features} sparse sources in {dim} dimensions, and "
        "labels that have nothing to do with them: the readers of every example are "
        "drawn for it alone.",
    )


def _control(
    probed: Probed,
    params: Params,
    sample: Callable[[Array, int], Inputs],
    dim: int,
    *,
    name: str,
    about: str,
) -> Task:
    """Make a task with an empty truth."""
    none = jnp.zeros((0, dim))
    return Task(
        probed=probed,
        params=params,
        sample=sample,
        site=SITE,
        truth=Truth(readers=none, writers=none, frequency=jnp.zeros(0)),
        side="readers",
        name=name,
        features=_no_features,
        fit=0.0,
        ignored=None,
        about=about,
        limits="There is nothing to find: every direction that is returned is false.",
    )


def _random_shape(key: Array, dim: int) -> Array:
    """Draw a matrix ``[D, D]`` of condition :data:`_CONDITION`."""
    # The mean square of the singular values is near 1, so that few units saturate.
    exponents = jnp.linspace(0.25, -0.75, dim)
    left, right = (rotation(k, dim) for k in jax.random.split(key))
    return dot(left * (_CONDITION**exponents)[None, :], right)


def _no_features(params: Params, inputs: Inputs) -> Array:
    del params
    return jnp.zeros((len(jax.tree.leaves(inputs)[0]), 0))


def _normal_inputs(dim: int, key: Array, num: int) -> Array:
    return jax.random.normal(key, (num, dim))


def _shaped(params: Params, inputs: Array) -> Array:
    return dot(inputs, params["shape"])


def _deep(params: Params, acts: Array) -> Array:
    *hidden, last = params["weights"]
    for weight in hidden:
        acts = jnp.tanh(dot(acts, weight))
    return dot(acts, last)


_RANDOM_NETWORK = from_split(_shaped, _deep, site=SITE)


def _noisy_inputs(
    features: int, dim: int, outputs: int, probability: float, key: Array, num: int
) -> dict[str, Array]:
    codes_key, noise_key, labels_key = jax.random.split(key, 3)
    return {
        "codes": heads.sparse_codes(codes_key, (num, features), probability),
        "noise": jax.random.normal(noise_key, (num, outputs, dim)) / dim**0.5,
        "labels": jax.random.normal(labels_key, (num, outputs)),
    }


def _noisy_outputs(
    params: Params, inputs: dict[str, Array], tap: Callable[[str, Array], Array]
) -> Array:
    acts = tap(SITE, dot(inputs["codes"], params["writers"]))
    readers = dot(inputs["noise"], params["shape"])
    reads = jnp.sum(readers * acts[:, None, :], axis=2)
    return _LABEL_SIZE * inputs["labels"] + reads


_UNRELATED_LABELS = from_function(_noisy_outputs)
