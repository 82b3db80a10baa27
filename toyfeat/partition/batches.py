"""Batches of sparse inputs, in which zeros are computed once.

Where inputs are active with probability ``p``, a share :math:`(1 - p)^F` of examples is
zeros, all the same.  One example with their weight stands for them, and the others
are drawn given that an input is active: the same mean of the loss, with less noise, for
a fraction of the work (23 % of the rows for five inputs of probability .05).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.checks import check_flag, check_int, check_number
from toyfeat.data import Batches
from toyfeat.types import Array, Taps


def sparse_batches(
    key: Array,
    features: int,
    *,
    probability: float,
    batch: int,
    low: float = 0.0,
    high: float = 1.0,
    join_zeros: bool = True,
) -> Batches:
    """Make batches of inputs that are U[low, high] with a probability, and 0 otherwise.

    Args:
      key: random key.
      features: inputs of an example.
      probability: of an input to be active.
      batch: examples per step.
      low: smallest active value.
      high: largest active value.
      join_zeros: whether the examples of zeros that are expected are one, with their
        weight; the batch has then as many rows as examples with an active input are
        expected, and one more.

    Returns:
      :class:`toyfeat.data.Batches`, whose ``acts`` are the inputs.

    Example:
      >>> import jax
      >>> batches = sparse_batches(jax.random.key(0), 5, probability=0.05, batch=4096)
      >>> taps = batches(0)
      >>> taps.acts.shape, float(taps.weights.sum())
      ((928, 5), 4096.0)
    """
    check_int("sparse_batches", "features", features)
    check_int("sparse_batches", "batch", batch)
    check_number("sparse_batches", "probability", probability, above=0, most=1)
    check_flag("sparse_batches", "join_zeros", join_zeros)
    rows = batch
    if join_zeros:
        rows = min(batch, round(batch * -math.expm1(features * _log_rest(probability))))
    zeros = batch - rows
    take = partial(_take, features, probability, rows, zeros, low, high, join_zeros)
    return Batches(take, {"key": jax.random.key_data(key)})


def _log_rest(probability: float) -> float:
    """Logarithm of the probability that an input is 0."""
    return math.log1p(-probability) if probability < 1 else -math.inf


def _take(
    features: int,
    probability: float,
    rows: int,
    zeros: int,
    low: float,
    high: float,
    join_zeros: bool,
    data: dict[str, Array],
    step: Array,
) -> Taps:
    """Draw the batch of a step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(data["key"]), step)
    active_key, first_key, value_key = jax.random.split(key, 3)
    active = jax.random.bernoulli(active_key, probability, (rows, features))
    if join_zeros and probability < 1:
        # The first active input is geometric, cut off behind the last: the inverse of
        # its distribution function, at one random point of each of equal shares, so
        # that every batch has nearly as many examples of each input.
        log_rest = _log_rest(probability)
        place = jnp.arange(rows, dtype=jnp.float32)
        share = (place + jax.random.uniform(first_key, (rows,))) / rows
        share = share * -math.expm1(features * log_rest)
        # The inputs behind the first are independent of it.
        first = jnp.floor(jnp.log1p(-share) / log_rest).astype(jnp.int32)
        first = jnp.clip(first, 0, features - 1)[:, None]
        place = jnp.arange(features)[None, :]
        active = (place == first) | ((place > first) & active)
    values = jax.random.uniform(value_key, (rows, features), minval=low, maxval=high)
    x = jnp.where(active, values, 0)
    weights = jnp.ones(rows)
    if zeros:
        x = jnp.concatenate([x, jnp.zeros((1, features))])
        weights = jnp.concatenate([weights, jnp.full(1, float(zeros))])
    return Taps(x, None, weights)
