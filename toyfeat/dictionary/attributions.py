"""First-order effects of latents on readouts."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.kernels import row_products, transposed_product
from toyfeat.dictionary.selection import largest_level
from toyfeat.types import Array, Parts

_SHARE = 0.95  # of the whole first-order effect that the counted latents have


class Penalty(NamedTuple):
    """A function of one number and its derivative, elementwise on arrays.

    Attributes:
      value: of attributions in units of their usual size.
      slope: its derivative, from the attributions and the values.
    """

    value: Callable[[Array], Array]
    slope: Callable[[Array, Array], Array]


def attributions(parts: Parts) -> Array:
    """``A[n, k, j] = f[n, j] (W_dec[j] . g[n, k])``, ``[N, K, M]``.

    Where only a few latents of an example can be there, only those: ``[N, K, k]``.
    """
    assert parts.grads is not None  # the trainer checks
    values, index, rows = parts.out.values, parts.out.index, parts.params["W_dec"]
    if index is None:
        return values[:, None, :] * (parts.grads @ rows.T)
    by_readout = jax.vmap(row_products, (1, None, None), 1)
    if parts.grads.shape[1] == 1:
        slopes = row_products(parts.grads[:, 0], index, rows)[:, None]
    else:
        slopes = by_readout(parts.grads, index, rows)
    return values[:, None, :] * slopes


def penalised(parts: Parts, penalty: Penalty, scale: Array) -> Array:
    """Mean over examples and readouts of ``sum_j penalty(A[k, j] / scale)``."""
    out, weights = parts.out, parts.weights
    if out.index is not None:
        sizes = penalty.value(attributions(parts) / scale)
        return weights @ jnp.mean(jnp.sum(sizes, axis=2), axis=1)
    assert parts.grads is not None
    grads, rows = parts.grads / scale, parts.params["W_dec"]
    return _penalised(penalty, out.values, rows, grads, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _penalised(
    penalty: Penalty, values: Array, rows: Array, grads: Array, weights: Array
) -> Array:
    """One readout after the other, so that no ``[N, K, M]`` is made."""

    def one(grads: Array) -> Array:
        return weights @ jnp.sum(penalty.value(values * (grads @ rows.T)), axis=1)

    if grads.shape[1] == 1:
        return one(grads[:, 0])
    return jnp.mean(jax.lax.map(one, jnp.swapaxes(grads, 0, 1)))


def _penalised_forward(penalty: Penalty, *args: Array) -> tuple:
    """The derivatives by values and rows are taken along with each readout."""
    values, rows, grads, weights = args
    share = weights / grads.shape[1]

    def one(grads: Array) -> tuple[Array, Array, Array]:
        slopes = grads @ rows.T
        sizes = values * slopes
        penalties = penalty.value(sizes)
        loss = share @ jnp.sum(penalties, axis=1)
        by_size = share[:, None] * penalty.slope(sizes, penalties)
        by_rows = transposed_product(by_size * values, grads)
        return loss, by_size * slopes, by_rows

    if grads.shape[1] == 1:
        loss, *by_both = one(grads[:, 0])
        return loss, tuple(by_both)

    def add(total: tuple, grads: Array) -> tuple:
        return jax.tree.map(jnp.add, total, one(grads)), None

    start = jax.tree.map(jnp.zeros_like, (weights[0], values, rows))
    loss, *by_both = jax.lax.scan(add, start, jnp.swapaxes(grads, 0, 1))[0]
    return loss, tuple(by_both)


def _penalised_backward(penalty: Penalty, kept: tuple, change: Array) -> tuple:
    del penalty
    by_values, by_rows = kept
    return change * by_values, change * by_rows, None, None


_penalised.defvjp(_penalised_forward, _penalised_backward)


def unexplained(parts: Parts) -> Array:
    """``(x - x_hat) . g``, the effect that no latent has, ``[N, K]``."""
    assert parts.grads is not None
    return jnp.einsum("nd,nkd->nk", parts.target - parts.out.recon, parts.grads)


def attribution_l0(
    attributions: Array, unexplained: Array, latents: int | None = None
) -> tuple[Array, Array]:
    r"""How many latents it takes to account for the first-order effect.

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
    most = attributions.shape[-1] if latents is None else latents
    sizes, rest = jnp.abs(attributions), jnp.abs(unexplained)
    whole = jnp.sum(sizes, axis=-1)
    total = whole + rest
    wanted = _SHARE * total

    def enough(level: Array) -> Array:
        return _sum_where(sizes, sizes >= level[..., None]) >= wanted

    # Ties share a level: as many of them count as are needed beside what is larger.
    level = largest_level(enough, wanted.shape, wanted.dtype)
    larger = sizes > level[..., None]
    missing = wanted - _sum_where(sizes, larger)
    ties = jnp.ceil(missing / jnp.where(level > 0, level, jnp.ones_like(level)))
    there = jnp.sum(sizes == level[..., None], axis=-1).astype(wanted.dtype)
    ties = jnp.minimum(ties, there)  # sums in another order are rounded otherwise
    count = jnp.sum(larger, axis=-1).astype(wanted.dtype) + ties
    count = jnp.where(whole < wanted, jnp.full_like(count, most), count)
    none = total == 0
    count = jnp.where(none, jnp.zeros_like(count), count)
    return count, rest / jnp.where(none, jnp.ones_like(total), total)


def _sum_where(sizes: Array, there: Array) -> Array:
    return jnp.sum(jnp.where(there, sizes, jnp.zeros_like(sizes)), axis=-1)
