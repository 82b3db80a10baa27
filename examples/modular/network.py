r"""A transformer that adds modulo ``p``, and the sums that it is to know.

One layer without LayerNorm reads the three tokens ``a b =`` and gives logits of
:math:`(a + b) \bmod p` at the last position.  Its embeddings learn a few waves
:math:`\cos(2 \pi k a / p), \sin(2 \pi k a / p)`, and the rest of the network adds
angles: the features are planes, one for each frequency :math:`k`.

References:
  Nanda et al. (2023), "Progress measures for grokking via mechanistic
  interpretability", arXiv 2301.05217, for the model.
  Bushnaq et al. (2024), "The local interaction basis", arXiv 2405.10928, for its
  use as a test of interpretability methods.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.models.planted.targets import untapped
from toyfeat.tap import from_function
from toyfeat.types import Array, Params, Probed

_HIGHEST = jax.lax.Precision.HIGHEST

SITES = ("resid_in", "resid_mid", "mlp_out")
"""The residual stream before attention, before the MLP and after it."""


class Modular(NamedTuple):
    """The modulus, and the sizes of the transformer.

    Attributes:
      modulus: ``p``, the number of summands and of answers.
      d_model: width of the residual stream.
      heads: attention heads, each ``d_model / heads`` wide.
      d_mlp: width of the ReLU layer.
    """

    modulus: int = 113
    d_model: int = 128
    heads: int = 4
    d_mlp: int = 512


def initial_params(key: Array, task: Modular) -> Params:
    """Draw normal weights of variance ``1 / fan-in``; biases are 0.

    The embeddings, which nothing fans into, have variance ``1 / d_model``.

    Args:
      key: random key.
      task: the shape of the network.

    Returns:
      ``{"embed": [p + 1, D], "position": [3, D]}``, ``{"query", "key", "value":
      [heads, D, D / heads]}``, ``{"output": [heads, D / heads, D]}``, ``{"w_in",
      "b_in", "w_out", "b_out"}`` of the MLP and ``{"unembed": [D, p]}``.

    Raises:
      ValueError: if the modulus is less than 2, a size is not positive or the
        heads do not divide ``d_model``.

    Example:
      >>> import jax
      >>> params = initial_params(jax.random.key(0), Modular(modulus=5))
      >>> params["embed"].shape, params["value"].shape, params["unembed"].shape
      ((6, 128), (4, 128, 32), (128, 5))
    """
    check_sizes(task)
    width, head = task.d_model, task.d_model // task.heads
    shapes = {  # name: (shape, fan-in)
        "embed": ((task.modulus + 1, width), width),
        "position": ((3, width), width),
        "query": ((task.heads, width, head), width),
        "key": ((task.heads, width, head), width),
        "value": ((task.heads, width, head), width),
        "output": ((task.heads, head, width), width),
        "w_in": ((width, task.d_mlp), width),
        "w_out": ((task.d_mlp, width), task.d_mlp),
        "unembed": ((width, task.modulus), width),
    }
    keys = jax.random.split(key, len(shapes))
    # Draw as many numbers for each as the largest needs: one program to compile.
    largest = max(math.prod(shape) for shape, _ in shapes.values())
    normal = jax.vmap(lambda key: jax.random.normal(key, (largest,)))(keys)
    params = {
        name: row[: math.prod(shape)].reshape(shape) / math.sqrt(fan_in)
        for row, (name, (shape, fan_in)) in zip(normal, shapes.items(), strict=True)
    }
    return params | {"b_in": jnp.zeros(task.d_mlp), "b_out": jnp.zeros(width)}


def logits(params: Params, inputs: Array, tap: Callable[[str, Array], Array]) -> Array:
    """Run the transformer, after the attention at the last position only.

    Args:
      params: from :func:`initial_params`.
      inputs: ``[B, 2]`` int, the summands, each less than ``p``.
      tap: called with ``"resid_in"`` ``[B, 3, D]``, the residual stream of the
        tokens ``a b =`` before attention, ``"resid_mid"`` ``[B, D]``, that of
        the last token after attention, and ``"mlp_out"`` ``[B, D]``, that after
        the MLP, which the unembedding reads.

    Returns:
      ``[B, p]``.

    Raises:
      ValueError: if the inputs are not pairs.

    Example:
      >>> import jax
      >>> params = initial_params(jax.random.key(0), Modular(modulus=5))
      >>> logits(params, jnp.array([[1, 2], [4, 3]]), lambda _, x: x).shape
      (2, 5)
    """
    if inputs.ndim != 2 or inputs.shape[1] != 2:
        raise ValueError(f"logits: inputs must be pairs [B, 2], got {inputs.shape}")
    # Tokens a, b and "=", which has the last row of the embedding.
    equals = jnp.full_like(inputs[:, :1], params["embed"].shape[0] - 1)
    tokens = jnp.concatenate([inputs, equals], axis=1)
    stream = tap(SITES[0], params["embed"][tokens] + params["position"][None])

    # Attention of the last position over all three.
    query = _einsum("bd,hdk->bhk", stream[:, -1], params["query"])
    key = _einsum("bpd,hdk->bphk", stream, params["key"])
    value = _einsum("bpd,hdk->bphk", stream, params["value"])
    scores = jnp.sum(query[:, None] * key, axis=-1) / math.sqrt(query.shape[-1])
    pattern = jax.nn.softmax(scores, axis=1)
    mixed = jnp.sum(pattern[..., None] * value, axis=1)
    attended = _einsum("bhk,hkd->bd", mixed, params["output"])
    mid = tap(SITES[1], stream[:, -1] + attended)

    # The MLP, and the unembedding of the residual stream.
    hidden = _einsum("bd,dm->bm", mid, params["w_in"]) + params["b_in"][None]
    written = _einsum("bm,md->bd", jax.nn.relu(hidden), params["w_out"])
    out = tap(SITES[2], mid + written + params["b_out"][None])
    return _einsum("bd,dp->bp", out, params["unembed"])


def probed() -> Probed:
    """Return the transformer as a probed model, with the sites of :data:`SITES`.

    Example:
      >>> import jax
      >>> import toyfeat as ft
      >>> params = initial_params(jax.random.key(0), Modular(modulus=5))
      >>> taps = ft.tap(
      ...     probed(), params, jnp.array([[1, 2], [4, 3]]),
      ...     sites=SITES, readout=None,
      ... )
      >>> {site: taps[site].acts.shape for site in SITES}
      {'resid_in': (6, 128), 'resid_mid': (2, 128), 'mlp_out': (2, 128)}
    """
    return _PROBED


_PROBED = from_function(logits)


def pairs(task: Modular) -> tuple[Array, Array]:
    """List all pairs of summands, with their sums.

    Args:
      task: of which the modulus counts.

    Returns:
      Inputs ``[p * p, 2]`` and labels ``[p * p]``, both int32.

    Example:
      >>> inputs, labels = pairs(Modular(modulus=2))
      >>> inputs.tolist(), labels.tolist()
      ([[0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0])
    """
    index = jnp.arange(task.modulus**2, dtype=jnp.int32)
    inputs = jnp.stack([index // task.modulus, index % task.modulus], axis=1)
    return inputs, jnp.sum(inputs, axis=1) % task.modulus


def split(
    key: Array, task: Modular, fraction: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Split all pairs at random into those to train on and those held out.

    Args:
      key: random key.
      task: of which the modulus counts.
      fraction: share to train on, rounded to whole pairs and to at least one.

    Returns:
      Inputs and labels to train on, and those held out (of length 0 if the fraction
      is 1).

    Raises:
      ValueError: if the fraction is not in (0, 1].

    Example:
      >>> import jax
      >>> train, held_out = split(jax.random.key(0), Modular(modulus=10), 0.3)
      >>> train[0].shape, held_out[0].shape, held_out[1].shape
      ((30, 2), (70, 2), (70,))
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"split: fraction must be in (0, 1], got {fraction}")
    inputs, labels = pairs(task)
    order = jax.random.permutation(jax.random.fold_in(key, 0), len(labels))
    num = max(round(fraction * len(labels)), 1)
    train, held_out = order[:num], order[num:]
    return (inputs[train], labels[train]), (inputs[held_out], labels[held_out])


def accuracy(params: Params, inputs: Array, labels: Array) -> Array:
    """Compute the share of the inputs whose largest logit is that of the label.

    Args:
      params: from :func:`initial_params` or training.
      inputs: ``[B, 2]``, as from :func:`pairs`.
      labels: ``[B]``.

    Returns:
      A scalar in [0, 1]; NaN if there are no inputs.
    """
    answers = jnp.argmax(logits(params, inputs, untapped), axis=1)
    return jnp.mean(answers.astype(labels.dtype) == labels)


def check_sizes(task: Modular) -> None:
    """Check the sizes of a transformer.

    Raises:
      ValueError: if they do not fit.
    """
    if task.modulus < 2:
        raise ValueError(f"Modular: modulus must be at least 2, got {task.modulus}")
    for name in ("d_model", "heads", "d_mlp"):
        if getattr(task, name) < 1:
            raise ValueError(
                f"Modular: {name} must be at least 1, got {getattr(task, name)}"
            )
    if task.d_model % task.heads:
        raise ValueError(
            f"Modular: heads must divide d_model, got {task.heads} and {task.d_model}"
        )


def _einsum(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b, precision=_HIGHEST)
