"""Gradients by weights: attributions of components, and directions in weight space.

:func:`attributions` are those of attribution-based parameter decomposition; for the
cheapest relative of all, :func:`gradient_batch` turns gradients by weights into rows
that a dictionary is trained on (:func:`toyfeat.dictionaries.topk`).

References:
  Braun et al. (2025), APD, arXiv 2501.14926.
  Chrisman, Bushnaq, Sharkey (2025), L3D, arXiv 2504.00194.
"""

from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_key
from toyfeat.partition.decomposition import Components, Decomposition
from toyfeat.partition.sources import Distance, mean_squared_error
from toyfeat.types import Array, Inputs, Params, Taps


def attributions(
    decomposition: Decomposition,
    params: Params,
    components: Components,
    inputs: Inputs,
) -> dict[str, Array]:
    r"""Measure how much outputs change along each part of the weights.

    :math:`A_c(x) = \sqrt{\mathrm{mean}_o (\nabla_\theta f_o(x) \cdot P_c)^2}`, to first
    order at the target, one forward derivative per part.

    Args:
      decomposition: with the weights.
      params: of the target.
      components: parts of the weights.
      inputs: of the model, ``B`` examples.

    Returns:
      Weight to ``[B, C]``.
    """
    leaves, tree = jax.tree.flatten(params)

    def along(number: int, part: Array) -> Array:
        direction = [jnp.zeros_like(x) for x in leaves]
        direction[number] = part.astype(direction[number].dtype)
        fn = lambda p: decomposition.target(p, inputs)  # noqa: E731
        _, change = jax.jvp(fn, (params,), (jax.tree.unflatten(tree, direction),))
        return jnp.sqrt(jnp.mean(change**2, axis=tuple(range(1, change.ndim))))

    found = {}
    for path, weight in decomposition.weights.items():
        v, u = components[path]["V"], components[path]["U"]

        def of_part(column: Array, row: Array, weight: Any = weight) -> Array:
            part = column[:, None] * row[None, :]
            return along(weight.leaf, part.reshape(weight.shape))

        found[path] = jax.vmap(of_part, in_axes=(1, 0), out_axes=1)(v, u)
    return found


def gradient_batch(
    key: Array,
    decomposition: Decomposition,
    params: Params,
    inputs: Array,
    *,
    distance: Distance = mean_squared_error,
) -> Taps:
    """Compute gradients by the weights, one row per example, to train a dictionary on.

    Each is the gradient of the distance between the output of an example and that of
    another one, drawn at random, which is held constant.

    Args:
      key: of the draw.
      decomposition: its weights are what is differentiated by, side by side.
      params: of the target.
      inputs: ``[B, ...]``.
      distance: between outputs.

    Returns:
      :class:`toyfeat.Taps` whose ``acts`` are ``[B, N]``, ``N`` entries of all weights
      in the order of ``decomposition.weights``.
    """
    check_key("gradient_batch", key)
    outputs = decomposition.target(params, inputs)
    others = outputs[jax.random.permutation(key, len(outputs))]
    leaves, tree = jax.tree.flatten(params)
    numbers = [weight.leaf for weight in decomposition.weights.values()]

    def gradient(x: Array, other: Array) -> Array:
        def loss(own: list[Array]) -> Array:
            full = list(leaves)
            for number, leaf in zip(numbers, own, strict=True):
                full[number] = leaf
            output = decomposition.target(jax.tree.unflatten(tree, full), x[None])
            return distance(output, other[None])[0]

        grads = jax.grad(loss)([leaves[number] for number in numbers])
        return jnp.concatenate([grad.ravel() for grad in grads])

    rows = jax.vmap(gradient)(inputs, others)
    return Taps(rows, None, jnp.ones(len(rows)))
