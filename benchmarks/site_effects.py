"""What moves along writers do to a language model, beside random directions.

Used by ``real_site.py``.  Moves are of one length, a share of the root mean square
length of the activations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import bootstrap_interval

from toyfeat.types import Array, Features, Params, Probed

LENGTH = 0.2
"""Length of a move, as a share of the root mean square length of the activations."""

DRAWS = 4
"""Tokens sampled at the end of every window."""

PAIRS = 8
"""Windows per direction in which a token's log-probability is looked at."""

WINDOWS = 8
"""Windows on which whole distributions are looked at."""

BATCH = 8
"""Windows at a time."""


def effects(
    key: Array,
    probed: Probed,
    params: Params,
    tokens: np.ndarray,
    site: str,
    features: Features,
) -> dict[str, dict[str, Any]]:
    """Move held-out activations along writers, along readers, and at random.

    Args:
      key: of the sampled tokens and the random directions.
      probed: the model, tokens to logits.
      params: its parameters.
      tokens: ``[num, T]``, held-out windows.
      site: where activations are moved.
      features: directions to look at.

    Returns:
      For each kind of move, means over directions with their bootstrap intervals:
      ``divergence``, nats per token by which all next-token distributions of some
      windows move if every activation is moved; ``gain``, nats that the
      log-probability of a token sampled at the end of a window gains, at the windows
      and tokens whose gradients lie most along the reader, if the last activation is
      moved the way in which the gradient says that it gains; ``predicted``, what the
      gradient says.
    """
    label_key, random_key = jax.random.split(key)
    num, dim = features.readers.shape
    tokens = np.asarray(tokens, np.int32)
    ends = last_gradients(label_key, probed, params, tokens, site)
    length = LENGTH * float(jnp.sqrt(jnp.mean(jnp.sum(ends.acts**2, axis=-1))))
    random = np.asarray(jax.random.normal(random_key, (max(1, num), dim)))
    moves = {"random": unit(random)}
    if num:
        moves |= {"writers": unit(features.writers), "readers": unit(features.readers)}
    pairs = steepest_pairs(ends, unit(features.readers)) if num else None
    rng = np.random.default_rng(0)
    rows = {}
    for name, directions in moves.items():
        steps = length * directions
        values = {"divergence": divergences(probed, params, tokens, site, steps)}
        if pairs is not None:
            values |= gains(probed, params, tokens, site, ends, pairs, steps)
        rows[f"move along {name}"] = {"directions": len(steps), "length": length}
        for what, each in values.items():
            rows[f"move along {name}"] |= {
                what: float(each.mean()),
                f"{what} interval": bootstrap_interval(each, rng),
            }
    return rows


class Ends(NamedTuple):
    """Last positions of windows, with tokens sampled there.

    Attributes:
      acts: ``[num, D]``, activations.
      labels: ``[num, K]``, tokens drawn from the model.
      grads: ``[num, K, D]``, gradients of their log-probabilities.
    """

    acts: Array
    labels: Array
    grads: Array


def last_gradients(
    key: Array, probed: Probed, params: Params, tokens: np.ndarray, site: str
) -> Ends:
    """Sample tokens at the ends of windows, and take gradients there.

    The last activation moves nothing but the last distribution, so that its gradient is
    of one token's log-probability alone.
    """

    @jax.jit
    def ends(params: Params, key: Array, tokens: Array) -> Ends:
        def last(step: Array) -> tuple[Array, Array]:
            move = {site: lambda act: act.at[:, -1].add(step.astype(act.dtype))}
            logits, acts = probed(params, tokens, move)
            return jax.nn.log_softmax(logits[:, -1]), acts[site][:, -1]

        still = jnp.zeros_like(probed(params, tokens, {})[1][site][:, -1])
        log_probs, pull, acts = jax.vjp(last, still, has_aux=True)
        shape = (DRAWS, len(tokens))
        labels = jax.random.categorical(key, log_probs, shape=shape)
        one_hot = jax.nn.one_hot(labels, log_probs.shape[-1])
        (grads,) = jax.vmap(pull)(one_hot)
        return Ends(acts, labels.T, jnp.swapaxes(grads, 0, 1))

    parts = []
    for i, start in enumerate(range(0, len(tokens), BATCH)):
        batch = tokens[start : start + BATCH]
        parts.append(ends(params, jax.random.fold_in(key, i), batch))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


class Pairs(NamedTuple):
    """Windows and sampled tokens, ``[R, PAIRS]`` indices each."""

    window: np.ndarray
    draw: np.ndarray


def steepest_pairs(ends: Ends, readers: np.ndarray) -> Pairs:
    """Take for each unit reader the gradients that lie most along it."""
    along = np.abs(np.einsum("nkd,rd->rnk", np.asarray(ends.grads), readers))
    # One token of a window, so that pairs of a reader are of different windows.
    draw = along.argmax(-1)
    window = np.argsort(-along.max(-1), axis=1)[:, :PAIRS]
    return Pairs(window, np.take_along_axis(draw, window, axis=1))


def gains(
    probed: Probed,
    params: Params,
    tokens: np.ndarray,
    site: str,
    ends: Ends,
    pairs: Pairs,
    steps: np.ndarray,
) -> dict[str, np.ndarray]:
    """Measure what log-probabilities gain, and what gradients predict, ``[R]`` each."""

    @jax.jit
    def log_prob(params: Params, tokens: Array, label: Array, step: Array) -> Array:
        move = {site: lambda act: act.at[:, -1].add(step.astype(act.dtype))}
        logits = probed(params, tokens, move)[0]
        log_probs = jax.nn.log_softmax(logits[:, -1])
        return jnp.take_along_axis(log_probs, label[:, None], axis=1)[:, 0]

    gain, predicted = [], []
    for window, draw, step in zip(*pairs, steps, strict=True):
        slope = np.asarray(ends.grads[window, draw]) @ step
        moves = np.sign(slope)[:, None] * step
        args = params, tokens[window], ends.labels[window, draw]
        gain.append(np.mean(log_prob(*args, moves) - log_prob(*args, 0 * moves)))
        predicted.append(np.abs(slope).mean())
    return {"gain": np.array(gain), "predicted": np.array(predicted)}


def divergences(
    probed: Probed, params: Params, tokens: np.ndarray, site: str, steps: np.ndarray
) -> np.ndarray:
    """Measure how far distributions move, mean KL divergence in nats, ``[R]``."""
    some = jnp.asarray(tokens[:WINDOWS])
    still = jax.jit(lambda p: jax.nn.log_softmax(probed(p, some, {})[0]))(params)

    @jax.jit
    def divergence(params: Params, step: Array) -> Array:
        move = {site: lambda act: act + _everywhere(step, act)}
        moved = jax.nn.log_softmax(probed(params, some, move)[0])
        return jnp.mean(jnp.sum(jnp.exp(still) * (still - moved), axis=-1))

    return np.array([float(divergence(params, step)) for step in steps])


def _everywhere(step: Array, act: Array) -> Array:
    return jnp.broadcast_to(step.astype(act.dtype), act.shape)


def unit(rows: Any) -> np.ndarray:
    """Rows at unit length."""
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
