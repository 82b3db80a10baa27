"""Ablation of latents that are said not to matter, by an adversary."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int, check_number
from toyfeat.lm.evaluate import compile_rule
from toyfeat.lm.replacements import Replacement
from toyfeat.lm.split import HeldOut, SplitDecoder
from toyfeat.types import Array, Params, Taps

_STEP = 2.5
"""Length of a step times the number of steps: every entry of a mask can cross its range
and come back, as in Madry et al. (2018), "Towards deep learning models resistant to
adversarial attacks"."""


class AblationScores(NamedTuple):
    """KL of predictions from the model's own, in nats per token that counts.

    Attributes:
      none: with the whole reconstruction.
      all: without any of the latents that are said not to matter.
      random: with each of them multiplied by a random number of [0, 1].
      adversarial: with the factors in [0, 1] that an adversary found.
      unimportant: share of the active latents that are said not to matter.
    """

    none: float
    all: float
    random: float
    adversarial: float
    unimportant: float


def adversarial_ablation(
    split: SplitDecoder,
    params: Params,
    held_out: HeldOut,
    replacement: Replacement,
    *,
    share: float = 0.05,
    steps: int = 20,
    seed: int = 0,
    batch: int = 8,
) -> AblationScores:
    r"""Look for the worst ablation of the latents that are said not to matter.

    Of the active latents of a token those with the smallest attributions, together at
    most ``share`` of :math:`\sum_j |A_j|`, are said not to matter.  Each gets a factor
    :math:`m_j \in [0, 1]`, all tokens of a window together, and projected gradient
    ascent looks for the factors with the largest KL.  Where attributions tell what
    matters, the worst ablation costs little more than a random one.

    Args:
      split: the decoder split at a site.
      params: parameters of the decoder.
      held_out: from :func:`toyfeat.lm.split.tap_held_out`; its first gradient is that
        of the attributions.
      replacement: whose parts are ablated.
      share: of the attributions of a token.
      steps: of the ascent; more steps find worse ablations.
      seed: of the random factors, from which the ascent starts too.
      batch: windows at a time.

    Returns:
      :class:`AblationScores`.

    Raises:
      ValueError: for a share that is not in 0 .. 1.
      TypeError: for steps that are not a number of them.

    References:
      Bushnaq et al. (2026), for adversarial ablations of parts of weights.
    """
    check_number("adversarial_ablation", "share", share, least=0, most=1)
    check_int("adversarial_ablation", "steps", steps)
    rule = compile_rule(replacement)
    attack = jax.jit(partial(_attack, split.run), static_argnames=("steps",))
    sums, key = np.zeros(6), jax.random.key(seed)
    for start in range(0, len(held_out.tokens), batch):
        rows = slice(start, start + batch)
        names = "entry", "acts", "grads", "weights"
        entry, acts, grads, weights = (
            jnp.asarray(getattr(held_out, name)[rows]) for name in names
        )
        taps = Taps(
            acts.reshape(-1, acts.shape[2]),
            grads.reshape(-1, *grads.shape[2:]),
            weights.reshape(-1),
        )
        replaced = rule(taps)
        free = _unimportant(replaced.parts, taps, share)
        active = jnp.any(replaced.parts != 0, axis=2) & (taps.weights > 0)[:, None]
        parts = replaced.recon, replaced.parts
        own = jax.random.fold_in(key, start)
        kls = attack(params, (entry, acts, weights), parts, free, own, steps=steps)
        counts = jnp.sum(free & active), jnp.sum(active)
        sums += [float(x) for x in (*kls, *counts)]
    means = (sums[:4] / held_out.weights.sum(dtype=np.float64)).tolist()
    return AblationScores(*means, unimportant=float(sums[4] / max(sums[5], 1)))


def _unimportant(parts: Array, taps: Taps, share: float) -> Array:
    """Select the smallest attributions that sum to at most a share, ``[N, k]`` bool."""
    if taps.grads is None:
        raise ValueError("adversarial_ablation: wanted held-out text with gradients")
    sizes = jnp.abs(jnp.einsum("nkd,nd->nk", parts, taps.grads[:, 0]))
    order = jnp.argsort(sizes, axis=1)
    sums = jnp.cumsum(jnp.take_along_axis(sizes, order, axis=1), axis=1)
    is_small = sums <= share * sums[:, -1:]
    ranks = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(is_small, ranks, axis=1)


def _attack(
    run: Callable[..., Array],
    params: Params,
    window: tuple[Array, Array, Array],
    replaced: tuple[Array, Array],
    free: Array,
    key: Array,
    *,
    steps: int,
) -> tuple[Array, Array, Array, Array]:
    """Compute the summed KL of no, all, random and adversarial ablations."""
    entry, acts, weights = window
    recon, parts = replaced
    counts = weights[:, :, None] > 0
    clean = jax.nn.log_softmax(run(params, entry, acts))

    def kl(factors: Array) -> Array:
        # What a factor below 1 takes away, of the latents that may be ablated.
        removed = jnp.where(free, 1 - factors, jnp.zeros_like(factors))
        value = recon - jnp.einsum("nk,nkd->nd", removed, parts)
        value = jnp.where(counts, value.reshape(acts.shape), acts)
        spliced = jax.nn.log_softmax(run(params, entry, value))
        return jnp.sum(weights * jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2))

    ones = jnp.ones(free.shape, recon.dtype)
    start = jax.random.uniform(key, free.shape, recon.dtype)
    ascend = jax.value_and_grad(kl)

    # Projected gradient ascent by signs, which keeps the worst factors it has seen.
    def step(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        factors, worst = state
        value, slope = ascend(factors)
        moved = factors + _STEP / steps * jnp.sign(slope)
        return jnp.clip(moved, 0, 1), jnp.maximum(worst, value)

    last, worst = jax.lax.fori_loop(0, steps, step, (start, kl(start)))
    return kl(ones), kl(0 * ones), kl(start), jnp.maximum(worst, kl(last))
