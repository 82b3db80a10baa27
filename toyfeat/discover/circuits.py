r"""Circuits: the smallest set of latents that keeps a model's effect on a task.

An *effect* is a function of a mask ``m [M]`` over latents: what a model does, such as
the mean logit difference of a task, with latent ``j`` at ``m_j`` of its own value and
the rest of a baseline's.  The *share* that a set keeps is

.. math:: (E(m) - E(0)) / (E_{all} - E(0))
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_choice, check_function, check_int, check_number
from toyfeat.linalg.precision import nonzero
from toyfeat.types import Array, ArrayLike

Effect = Callable[[Any, Array], Array]
"""``(data, mask [M]) -> []``; ``data`` is a pytree of arrays that it needs."""

METHODS = ("attribution", "integrated", "mask")
_RATE = 0.1
"""Step of Adam on the entries of a mask, a tenth of their range."""
_PRICE = 100.0
r"""Of a share that is missing, squared, in units of the sum of the whole mask: a mask
stops short of the share by :math:`1 / (2 \cdot 100)` times the slope of its size."""


class Circuit(NamedTuple):
    """Latents of a task in the order of their importance, and how many are needed.

    Attributes:
      order: ``[M]`` int, the most important latent first.
      scores: ``[M]``, by which they are ordered: shares of the effect per unit of the
        mask, or the mask that was learned.
      shares: the shares that were asked for.
      sizes: how many of the first latents keep each share; ``None`` where no number of
        them was found that does.
      counts: ``[S]`` int, the numbers of latents that were tried.
      kept: ``[S]``, the share that each kept.
    """

    order: np.ndarray
    scores: np.ndarray
    shares: tuple[float, ...]
    sizes: tuple[int | None, ...]
    counts: np.ndarray
    kept: np.ndarray


def find_circuit(
    effect: Effect,
    data: Any,
    latents: int,
    *,
    whole: ArrayLike | float | None = None,
    shares: tuple[float, ...] = (0.9, 0.95),
    method: Literal["attribution", "integrated", "mask"] = "attribution",
    steps: int = 10,
    precision: float = 0.0,
) -> Circuit:
    r"""Find the smallest set of latents that keeps shares of an effect.

    Latents are ordered, and the first ones are kept: numbers in growing steps are tried
    up to the first that keeps a share, and then halves of the last step.  The share is
    no monotone function of the number, so that a smaller one may be missed.

    - ``"attribution"`` orders by :math:`\partial E / \partial m_j` with all latents
      there: one backward pass.  It misses latents that stand in for each other.
    - ``"integrated"`` orders by the mean of that derivative on the way from none to
      all latents, at ``steps`` places.  Its scores sum to about the share that all
      latents keep.
    - ``"mask"`` learns a mask in [0, 1] by projected Adam, with the sum of the mask and
      a price on the missing part of the largest share, in ``steps`` updates.  Each
      moves an entry by a twentieth, so that fewer than some fifty switch off little.

    Args:
      effect: of a mask, differentiable, a number.
      data: its first argument.  Arrays belong there: what a closure holds is a constant
        of the compiled program, and stays in memory with it.
      latents: ``M``.
      whole: the effect that shares are of, such as that of the model without a
        dictionary; the effect of all latents by default.
      shares: to keep, in (0, 1].
      method: how latents are ordered.
      steps: of the two last methods.
      precision: by what share a size may be too large; 0 for exact sizes.

    Returns:
      :class:`Circuit`.

    Raises:
      ValueError: for another method or share, or if keeping nothing has the whole
        effect already.
      TypeError: for arguments of another type.

    Example:
      >>> weights = jnp.array([3.0, 0.0, 6.0, 1.0])
      >>> circuit = find_circuit(lambda w, mask: w @ mask, weights, 4)
      >>> circuit.order[:2].tolist(), circuit.sizes
      ([2, 0], (2, 3))

    References:
      Marks et al. (2024), "Sparse feature circuits", for attributions and integrated
      gradients of latents; Sundararajan et al. (2017) for the latter.
    """
    check_function("find_circuit", "effect", effect, "(data, mask)")
    check_int("find_circuit", "latents", latents)
    check_int("find_circuit", "steps", steps)
    check_choice("find_circuit", "method", method, METHODS)
    check_number("find_circuit", "precision", precision, least=0)
    _check_shares(shares)
    _check_effect(effect, data, latents)
    measure = partial(_measure, effect, data)
    empty, total = _effect_ends(measure, latents, whole)
    if method == "mask":
        ends = jnp.asarray([empty, total])
        scores = _learn_mask(effect, steps, data, ends, jnp.ones(latents), max(shares))
    else:
        places = 1 if method == "attribution" else steps
        scores = _attributions(effect, places, data, latents) / (total - empty)
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores, kind="stable")

    def kept(count: int) -> float:
        mask = jnp.zeros(latents).at[order[:count]].set(1.0)
        return (float(measure(mask)) - empty) / (total - empty)

    counts, found, sizes = _search(kept, latents, shares, precision)
    return Circuit(order, scores, shares, sizes, counts, found)


def keep_latents(circuit: Circuit, share: float) -> np.ndarray:
    """Make the mask ``[M]`` of the latents that keep a share.

    Raises:
      ValueError: for a share that was not asked for or not reached.
    """
    sizes = dict(zip(circuit.shares, circuit.sizes, strict=True))
    size = sizes.get(share)
    if size is None:
        raise ValueError(
            f"keep_latents: wanted a share that was reached, got {share} of {sizes}"
        )
    mask = np.zeros(len(circuit.order), np.float32)
    mask[circuit.order[:size]] = 1
    return mask


def _check_shares(shares: tuple[float, ...]) -> None:
    """Raise unless there are shares, all of them in (0, 1]."""
    for share in shares:
        check_number("find_circuit", "a share", share, above=0, most=1)
    if not shares:
        raise ValueError("find_circuit: wanted shares to keep, got none; give (0.9,)")


def _check_effect(effect: Effect, data: Any, latents: int) -> None:
    """Raise unless the effect returns a number."""
    shape = jax.eval_shape(effect, data, jnp.ones(latents)).shape
    if shape != ():
        raise ValueError(
            "find_circuit: effect must return a number, got an array of shape "
            f"{shape}; take its mean"
        )


def _effect_ends(
    measure: Callable[[Array], Array], latents: int, whole: ArrayLike | float | None
) -> tuple[float, float]:
    """Measure the effect of no latent and the whole one, which must differ."""
    empty = float(measure(jnp.zeros(latents)))
    total = float(measure(jnp.ones(latents)) if whole is None else np.asarray(whole))
    if not abs(total - empty) > 1e-6 * max(abs(total), abs(empty)):
        raise ValueError(
            f"find_circuit: the whole effect is {total:.3g} and that of no latent "
            f"{empty:.3g}, so that there is nothing to keep; give a task whose effect "
            "the site carries"
        )
    return empty, total


@partial(jax.jit, static_argnums=0)
def _measure(effect: Effect, data: Any, mask: Array) -> Array:
    return effect(data, mask)


@partial(jax.jit, static_argnums=(0, 1, 3))
def _attributions(effect: Effect, places: int, data: Any, latents: int) -> Array:
    """Average derivatives by the mask at places from none (0) to all latents (1)."""
    slope = jax.grad(effect, argnums=1)
    if places == 1:
        return slope(data, jnp.ones(latents))
    middles = (jnp.arange(places).astype(jnp.float32) + 0.5) / places
    slopes = jax.lax.map(lambda x: slope(data, jnp.full(latents, x)), middles)
    return jnp.mean(slopes, axis=0)


@partial(jax.jit, static_argnums=(0, 1))
def _learn_mask(
    effect: Effect, steps: int, data: Any, ends: Array, mask: Array, share: float
) -> Array:
    """Learn a mask in [0, 1] that keeps a share with as small a sum as it can."""
    empty, total = ends[0], ends[1]

    def loss(mask: Array) -> Array:
        missing = share - (effect(data, mask) - empty) / (total - empty)
        return jnp.mean(mask) + _PRICE * jnp.maximum(missing, 0) ** 2

    # Adam, projected on the cube, with a rate that falls to 0.
    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mask, first, second = state
        slope = jax.grad(loss)(mask)
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        count = (i + 1).astype(mask.dtype)
        size = jnp.sqrt(second / (1 - 0.99**count))
        move = first / (1 - 0.9**count) / nonzero(size)
        rate = _RATE * (1 - i.astype(mask.dtype) / steps)
        return jnp.clip(mask - rate * move, 0, 1), first, second

    zeros = jnp.zeros_like(mask)
    return jax.lax.fori_loop(0, steps, step, (mask, zeros, zeros))[0]


def _search(
    kept: Callable[[int], float],
    latents: int,
    shares: tuple[float, ...],
    precision: float,
) -> tuple[np.ndarray, np.ndarray, tuple[int | None, ...]]:
    """Try numbers of latents in growing steps, then between the last two."""
    tried: dict[int, float] = {}

    def reaches(count: int, share: float) -> bool:
        if count not in tried:
            tried[count] = kept(count)
        return tried[count] >= share

    sizes: list[int | None] = []
    for share in shares:
        below, count = 0, 1
        while not reaches(count, share) and count < latents:
            below, count = count, min(latents, max(count + 1, count * 3 // 2))
        if not reaches(count, share):
            sizes.append(None)
            continue
        while count - below > max(1, precision * count):
            middle = (below + count) // 2
            below, count = (
                (below, middle) if reaches(middle, share) else (middle, count)
            )
        sizes.append(count)
    counts = np.array(sorted(tried))
    return counts, np.array([tried[int(n)] for n in counts]), tuple(sizes)
