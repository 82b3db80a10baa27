"""First-order effects of latents on readouts."""

import jax
import jax.numpy as jnp

from toyfeat.dictionary.kernels import row_products
from toyfeat.types import Array, Parts

_SHARE = 0.95  # of the whole first-order effect that the counted latents have


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
    sizes = -jnp.sort(-jnp.abs(attributions), axis=-1)
    so_far = jnp.cumsum(sizes, axis=-1)
    rest = jnp.abs(unexplained)
    total = so_far[..., -1] + rest
    wanted = _SHARE * total
    count = 1 + jnp.sum(so_far < wanted[..., None], axis=-1)
    count = jnp.where(so_far[..., -1] < wanted, most, count)
    none = total == 0
    count = jnp.where(none, 0, count).astype(attributions.dtype)
    return count, rest / jnp.where(none, jnp.ones_like(total), total)
