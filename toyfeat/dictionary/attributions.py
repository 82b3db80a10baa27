"""First-order effects of latents on readouts."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.base import required_grads
from toyfeat.dictionary.gather import row_products, transposed_product
from toyfeat.dictionary.selection import largest_level
from toyfeat.dictionary.types import Inputs
from toyfeat.types import Array

SHARE = 0.95
"""Share of the first-order effect that :func:`attribution_l0` accounts for."""


class Penalty(NamedTuple):
    """Function of one number and its derivative, elementwise on arrays.

    Attributes:
      value: of attributions in units of their usual size.
      slope: its derivative, from the attributions and the values.
    """

    value: Callable[[Array], Array]
    slope: Callable[[Array, Array], Array]


def _l1(gamma: float) -> Penalty:
    """Make ``|c|``, which has no ``gamma``."""
    del gamma
    return Penalty(jnp.abs, lambda sizes, _: jnp.sign(sizes))


def _geman_mcclure(gamma: float) -> Penalty:
    """Make ``c**2 / (c**2 + gamma**2)``, whose slope costs no second division.

    The slope is ``2 c (1 - value)**2 / gamma**2``.  Where ``c`` is many ``gamma`` it
    has few correct digits, and is next to 0.
    """

    def value(sizes: Array) -> Array:
        return sizes * sizes * (1 / (sizes * sizes + gamma**2))

    def slope(sizes: Array, values: Array) -> Array:
        remainder = 1 - values
        return (2 / gamma**2) * sizes * remainder * remainder

    return Penalty(value, slope)


def _log(gamma: float) -> Penalty:
    """Make ``log(1 + |c| / gamma) / log(1 + 1 / gamma)``, which is 1 at ``c = 1``."""
    at_one = math.log1p(1 / gamma)

    def slope(sizes: Array, values: Array) -> Array:
        del values
        return jnp.sign(sizes) / (at_one * (jnp.abs(sizes) + gamma))

    return Penalty(lambda sizes: jnp.log1p(jnp.abs(sizes) / gamma) / at_one, slope)


PENALTIES: dict[str, Callable[[float], Penalty]] = {
    "l1": _l1,
    "geman_mcclure": _geman_mcclure,
    "log": _log,
}
"""Name to a penalty, of the attribution that counts as small, ``gamma``."""


def attributions(inputs: Inputs) -> Array:
    """Compute ``A[n, k, j] = f[n, j] (W_dec[j] . g[n, k])``, ``[N, K, M]``.

    Where only a few latents of an example may be active, only those: ``[N, K, k]``.
    """
    grads, rows = required_grads(inputs), inputs.params["W_dec"]
    values, index = inputs.out.values, inputs.out.index
    # All latents: one product of gradients and rows.
    if index is None:
        return values[:, None, :] * (grads @ rows.T)
    # A few latents of each example: only their rows, readout by readout.
    if grads.shape[1] == 1:
        slopes = row_products(grads[:, 0], index, rows)[:, None]
    else:
        slopes = jax.vmap(row_products, (1, None, None), 1)(grads, index, rows)
    return values[:, None, :] * slopes


def mean_penalty(inputs: Inputs, penalty: Penalty, scale: Array) -> Array:
    """Mean over examples and readouts of ``sum_j penalty(A[k, j] / scale)``."""
    out, weights = inputs.out, inputs.weights
    if out.index is not None:
        sizes = penalty.value(attributions(inputs) / scale)
        return weights @ jnp.mean(jnp.sum(sizes, axis=2), axis=1)
    grads, rows = required_grads(inputs) / scale, inputs.params["W_dec"]
    return _mean_penalty(penalty, out.values, rows, grads, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_penalty(
    penalty: Penalty, values: Array, rows: Array, grads: Array, weights: Array
) -> Array:
    """Go through the readouts one by one, so that no ``[N, K, M]`` is made."""

    def by_readout(grads: Array) -> Array:
        return weights @ jnp.sum(penalty.value(values * (grads @ rows.T)), axis=1)

    if grads.shape[1] == 1:
        return by_readout(grads[:, 0])
    return jnp.mean(jax.lax.map(by_readout, jnp.swapaxes(grads, 0, 1)))


def _mean_penalty_forward(penalty: Penalty, *args: Array) -> tuple:
    """Take the derivatives by values and rows along with each readout."""
    values, rows, grads, weights = args
    share = weights / grads.shape[1]

    def by_readout(grads: Array) -> tuple[Array, Array, Array]:
        # Attributions of this readout, and what they cost.
        slopes = grads @ rows.T
        sizes = values * slopes
        penalties = penalty.value(sizes)
        loss = share @ jnp.sum(penalties, axis=1)
        # The chain rule: A = f (w . g) by f is w . g, by w it is f g.
        by_size = share[:, None] * penalty.slope(sizes, penalties)
        by_rows = transposed_product(by_size * values, grads)
        return loss, by_size * slopes, by_rows

    if grads.shape[1] == 1:
        loss, *by_both = by_readout(grads[:, 0])
        return loss, tuple(by_both)

    def add(total: tuple, grads: Array) -> tuple:
        return jax.tree.map(jnp.add, total, by_readout(grads)), None

    # Add up loss and derivatives over the readouts, one [N, M] at a time.
    start = jax.tree.map(jnp.zeros_like, (weights[0], values, rows))
    loss, *by_both = jax.lax.scan(add, start, jnp.swapaxes(grads, 0, 1))[0]
    return loss, tuple(by_both)


def _mean_penalty_backward(penalty: Penalty, slopes: tuple, change: Array) -> tuple:
    del penalty
    by_values, by_rows = slopes
    return change * by_values, change * by_rows, None, None


_mean_penalty.defvjp(_mean_penalty_forward, _mean_penalty_backward)


def unexplained_effect(inputs: Inputs) -> Array:
    """Compute ``(x - x_hat) . g``, the effect that no latent has, ``[N, K]``."""
    error = inputs.target - inputs.out.recon
    return jnp.einsum("nd,nkd->nk", error, required_grads(inputs))


def attribution_l0(
    attributions: Array, unexplained: Array, latents: int | None = None
) -> tuple[Array, Array]:
    r"""Count the latents that it takes to account for the first-order effect.

    The fewest latents whose :math:`|A_j|` sum to at least 95 % of
    :math:`\sum_j |A_j| + |(x - \hat x) \cdot g|`; all of them if none suffices.

    Args:
      attributions: ``[..., M]``, ``A_j = f_j (W_dec[j] . g)``, or those of the
        latents that are not zero.
      unexplained: ``[...]``, ``(x - x_hat) . g``.
      latents: ``M``, if ``attributions`` holds fewer.

    Returns:
      ``[...]`` counts as floats, and ``[...]`` shares of the sum that no latent
      has, 0 where the sum is.

    Example:
      >>> import jax.numpy as jnp
      >>> count, share = attribution_l0(jnp.array([9.0, -0.9, 0.1]), jnp.zeros(()))
      >>> float(count), float(share)
      (2.0, 0.0)
    """
    num = attributions.shape[-1] if latents is None else latents
    sizes, missed = jnp.abs(attributions), jnp.abs(unexplained)
    explained = jnp.sum(sizes, axis=-1)
    total = explained + missed
    wanted = SHARE * total

    def enough(level: Array) -> Array:
        return _sum_where(sizes, sizes >= level[..., None]) >= wanted

    # The largest size such that sizes of at least this much suffice.
    level = largest_level(enough, wanted.shape, wanted.dtype)
    # Ties at that size: as many of them count as are needed beside what is larger.
    larger = sizes > level[..., None]
    needed = wanted - _sum_where(sizes, larger)
    ties = jnp.ceil(needed / jnp.where(level > 0, level, jnp.ones_like(level)))
    num_ties = jnp.sum(sizes == level[..., None], axis=-1).astype(wanted.dtype)
    ties = jnp.minimum(ties, num_ties)  # sums in another order are rounded otherwise
    count = jnp.sum(larger, axis=-1).astype(wanted.dtype) + ties
    # The error may be so large that all latents together do not suffice.
    count = jnp.where(explained < wanted, jnp.full_like(count, num), count)
    no_effect = total == 0
    count = jnp.where(no_effect, jnp.zeros_like(count), count)
    return count, missed / jnp.where(no_effect, jnp.ones_like(total), total)


def _sum_where(sizes: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, sizes, jnp.zeros_like(sizes)), axis=-1)
