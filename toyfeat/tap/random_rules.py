"""Rules of readouts that draw random numbers: sampled labels and random directions.

Every input has a key of its own, so that what is drawn for it does not depend on the
chunk that it is in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.tap.label_rules import label_residual
from toyfeat.tap.rules import Chunk, check_single_output, pull_to_outputs, to_float32
from toyfeat.types import Array, Outputs


def _categorical_residual(key: Array, logits: Array) -> Array:
    """Probabilities minus a one-hot label drawn from them."""
    return label_residual(jax.random.categorical(key, logits), logits)


def _bernoulli_residual(key: Array, logits: Array) -> Array:
    """Probabilities minus labels 0 or 1 drawn from them."""
    mean = jax.nn.sigmoid(logits)
    return mean - jax.random.bernoulli(key, mean).astype(mean.dtype)


def _gaussian_residual(key: Array, mean: Array) -> Array:
    """Mean minus a label drawn around it with unit variance."""
    return -jax.random.normal(key, mean.shape, mean.dtype)


# Family to the gradient of the negative log-likelihood of a label drawn from the model,
# in the natural parameter.
RESIDUALS = {
    "categorical": _categorical_residual,
    "bernoulli": _bernoulli_residual,
    "gaussian": _gaussian_residual,
}

# Kind of a random direction to the draw of its entries, zero mean and unit variance.
DRAWS: dict[str, Callable[..., Array]] = {
    "rademacher": jax.random.rademacher,
    "gaussian": jax.random.normal,
}


def _draw_per_input(
    keys: Array, num: int, outputs: list[Array], draw: Callable[[Array, Array], Array]
) -> list[Array]:
    """Draw ``num`` times for every input, ``[num, B, ...]``, divided by sqrt(num)."""

    def draw_for_input(key: Array, output: list[Array]) -> list[Array]:
        # A key for every draw and every leaf.
        split = jax.random.split(key, (num, len(output)))
        draw_num = jax.vmap(draw, in_axes=(0, None))
        return [
            draw_num(split[:, i], to_float32(leaf)) / num**0.5
            for i, leaf in enumerate(output)
        ]

    return jax.vmap(draw_for_input, out_axes=1)(keys, outputs)


def draw_labels(key: Array, probs: Array, draws: int) -> Array:
    """Draw labels ``[T, K]`` of predictions ``[T, V]``, stratified over the draws."""
    place, order = jax.random.split(key)
    num = len(probs)
    # One uniform number in each of K equal parts of [0, 1), the parts turned at random
    # at every position: each draw alone is uniform, and independent between positions.
    uniform = jax.random.uniform(place, (num, draws))
    turn = jax.random.randint(order, (num, 1), 0, draws)
    strata = (jnp.arange(draws)[None, :] + turn) % draws
    points = (strata.astype(uniform.dtype) + uniform) / draws
    # Labels by the inverse of the cumulative distribution, in units of its last value.
    total = jnp.cumsum(probs, axis=1)
    find = jax.vmap(lambda sums, x: jnp.searchsorted(sums, x * sums[-1], side="right"))
    return jnp.minimum(find(total, points), probs.shape[1] - 1)


def sampled_labels(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Differentiate the loss against labels that are drawn from the model."""
    num, family, select = options
    check_single_output("sampled_labels", select, outputs)

    def residuals(outputs: list[Array]) -> list[Array]:
        return _draw_per_input(chunk.keys, num, outputs, RESIDUALS[family])

    return pull_to_outputs(select, outputs, residuals)


def random_directions(
    options: tuple[Any, ...], outputs: Outputs, chunk: Chunk
) -> Outputs:
    """Draw directions with independent entries of zero mean and unit variance."""
    num, kind, select, over = options
    check_single_output("random_directions", select, outputs)

    def draw(key: Array, leaf: Array) -> Array:
        return DRAWS[kind](key, leaf.shape, leaf.dtype)

    def cotangents(outputs: list[Array]) -> list[Array]:
        if over == "all":
            return _draw_per_input(chunk.keys, num, outputs, draw)
        if len(outputs) != 1 or outputs[0].ndim < 2:
            raise ValueError(
                f"random_directions: over={over!r} wants one output [B, ..., units], "
                f"got shapes {[leaf.shape for leaf in outputs]}"
            )
        return [_draw_along_axis(chunk.keys, num, outputs[0], draw, over)]

    return pull_to_outputs(select, outputs, cotangents)


def _draw_along_axis(
    keys: Array,
    num: int,
    leaf: Array,
    draw: Callable[[Array, Array], Array],
    over: str,
) -> Array:
    """Draw over the positions of one unit at a time, or over the units of one."""
    size, *positions, units = leaf.shape
    flat = leaf.reshape(size, -1, units)
    # The signs have extent 1 on the other axis, which the one-hot rows spread out:
    # [num, 1, B, positions, units] times [1, K / num, 1, positions, units].
    if over == "positions":
        signs = _draw_per_input(keys, num, [flat[:, :, :1]], draw)[0]
        one_hots = jnp.eye(units, dtype=signs.dtype)[None, :, None, None, :]
    else:
        signs = _draw_per_input(keys, num, [flat[:, :1, :]], draw)[0]
        one_hots = jnp.eye(flat.shape[1], dtype=signs.dtype)[None, :, None, :, None]
    return (signs[:, None] * one_hots).reshape(-1, size, *positions, units)
