"""Which codes are kept, and how derivatives pass."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.types import Array

_CANDIDATES = 2  # per example, in units of k, among which a batch's cut is sought


def best_of_each(score: Array, k: int) -> tuple[Array, Array]:
    """Where the ``k`` largest of each row are, and which of them are finite."""
    top, index = _top(jax.lax.stop_gradient(score), k)
    return index, jnp.isfinite(top)


def first_of(most: int, fewer: Array) -> Array:
    """Which of ``most`` places ``[1, most]`` are among the first ``fewer``."""
    places = jnp.arange(most, dtype=jnp.int32)[None, :]
    return places < jnp.asarray(fewer, jnp.int32)


def cut_of_batch(
    codes: Array, k: int, fewer: Array | None, num: Array | None = None
) -> Array:
    """The ``k num``-th largest of all ``codes [N, M] >= 0``, ``num`` at most ``N``.

    It is sought among the largest few of each example first; where one of them may
    have more than that above the cut, among all.
    """
    codes = jax.lax.stop_gradient(codes)
    latents = codes.shape[1]
    each = jnp.asarray(k if fewer is None else fewer, jnp.float32)
    wanted = each * jnp.asarray(len(codes) if num is None else num, jnp.float32)
    wanted = jnp.maximum(wanted.astype(jnp.int32), 1)
    few = _CANDIDATES * k
    if latents < 2 * few:
        return _cut(codes, wanted)
    top, _ = _top(codes, few)
    cut = _cut(top, wanted)
    enough = jnp.all(top[:, -1] < cut) | (cut == 0)
    return jax.lax.cond(enough, lambda: cut, lambda: _cut(codes, wanted))


def _top(score: Array, k: int) -> tuple[Array, Array]:
    """``top_k`` behind a barrier: a slice of its results makes XLA sort whole rows."""
    return jax.lax.optimization_barrier(tuple(jax.lax.top_k(score, k)))


def _cut(codes: Array, wanted: Array) -> Array:
    """The ``wanted``-th largest of non-negative floats, by bisection of their bits."""
    whole = jnp.uint32 if codes.dtype == jnp.float32 else jnp.uint64
    bits = jax.lax.bitcast_convert_type(codes, whole)

    def halve(step: Array, low: Array) -> Array:
        one = jnp.asarray(1, whole) << (last - jnp.asarray(step, whole))
        count = jnp.sum(bits >= (low | one), dtype=jnp.int32)
        return jnp.where(count >= wanted, low | one, low)

    last = jnp.asarray(jnp.finfo(codes.dtype).bits - 2, whole)  # the sign is 0
    steps = jnp.finfo(codes.dtype).bits - 1
    low = jax.lax.fori_loop(0, steps, halve, jnp.zeros((), whole))
    return jax.lax.bitcast_convert_type(low, codes.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumped(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """``max(0, pre)`` where ``pre > threshold [M]``, with a kernel derivative.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equation 11.
    """
    del bandwidth
    return jnp.where(pre > threshold[None, :], jax.nn.relu(pre), jnp.zeros_like(pre))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def stepped(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """1 where ``pre > threshold [M]``, 0 elsewhere, with a kernel derivative.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equation 12.
    """
    del bandwidth
    return (pre > threshold[None, :]).astype(pre.dtype)


def _near(pre: Array, threshold: Array, bandwidth: float) -> Array:
    return (jnp.abs(pre - threshold[None, :]) < bandwidth / 2).astype(pre.dtype)


def _jumped_forward(
    pre: Array, threshold: Array, bandwidth: float
) -> tuple[Array, tuple]:
    return jumped(pre, threshold, bandwidth), (pre, threshold)


def _jumped_backward(bandwidth: float, kept: tuple, change: Array) -> tuple:
    pre, threshold = kept
    above = ((pre > threshold[None, :]) & (pre > 0)).astype(pre.dtype)
    total = jnp.sum(_near(pre, threshold, bandwidth) * change, axis=0)
    return above * change, -(threshold / bandwidth) * total


def _stepped_forward(
    pre: Array, threshold: Array, bandwidth: float
) -> tuple[Array, tuple]:
    return stepped(pre, threshold, bandwidth), (pre, threshold)


def _stepped_backward(bandwidth: float, kept: tuple, change: Array) -> tuple:
    pre, threshold = kept
    total = jnp.sum(_near(pre, threshold, bandwidth) * change, axis=0)
    return jnp.zeros_like(pre), -total / bandwidth


jumped.defvjp(_jumped_forward, _jumped_backward)
stepped.defvjp(_stepped_forward, _stepped_backward)
