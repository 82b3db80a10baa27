r"""Dictionaries whose latents both write and are read.

Latent ``j`` has a writer :math:`w_j` (row of ``W_dec``: what the activations hold)
and a reader :math:`r_j` (row of ``W_read``: what the gradients hold) under one index.
"""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.dictionary.coding import compared, of_config
from toyfeat.dictionary.kernels import (
    affine,
    row_products,
    scattered,
    taken,
    weighted_rows,
)
from toyfeat.dictionary.selection import best_of_each, first_of
from toyfeat.linalg.precise import nonzero
from toyfeat.types import Array, Dictionary, DictionaryConfig, Forward, Params


def paired(dim: int, latents: int, k: int, *, decoder_norm: float = 0.1) -> Dictionary:
    r"""Features of activations and of gradients that share their support.

    With codes :math:`f = \max(0, (a - b_{dec}) W_{enc} + b_{enc})` and
    :math:`h_k = g_k P`, the ``k`` latents of the largest
    :math:`f_j^2 |w_j|^2 \sum_k h_{kj}^2 |r_j|^2` reconstruct both,
    :math:`\hat a = b_{dec} + \sum_j f_j w_j` and :math:`\hat g_k = \sum_j h_{kj} r_j`.
    The product asks for a latent that is in the activation *and* in the gradients: a
    sum lets one latent write a feature and another read it.
    Activations and gradients have to be in units of their root mean square, which
    :func:`toyfeat.trainer` sees to; train with :func:`toyfeat.dictionary_objective`.

    Args:
      dim: width ``D`` of the activations.
      latents: how many features ``M``.
      k: how many an example uses, in all of its ``K`` readouts.
      decoder_norm: length of the rows of ``W_dec`` and ``W_read`` at the start.

    Returns:
      :class:`Dictionary` with the parameters of :func:`toyfeat.standard`, the readers
      ``W_read [M, D]`` and ``P [D, M]``.  Without gradients ``encode`` chooses by
      the activations alone.  If ``grad_scale [K]`` is there, which
      :func:`toyfeat.folded` adds, gradients are divided by it in the score.

    Raises:
      ValueError: if a size is not positive or ``k`` is not in ``1 .. latents``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> both = paired(4, 16, 2)
      >>> params = both.init(jax.random.key(0))
      >>> out = both.forward(params, jnp.ones((3, 4)), grads=jnp.ones((3, 5, 4)))
      >>> out.codes.shape, out.grad_recon.shape
      ((3, 16), (3, 5, 4))
    """
    config = DictionaryConfig("paired", dim, latents, k=k)
    plain = of_config(config._replace(architecture="topk"), decoder_norm=decoder_norm)
    return Dictionary(
        partial(_initial, plain),
        partial(_encode, config),
        plain.decode,
        partial(_forward, config),
        config,
    )


def _initial(plain: Dictionary, key: Array) -> Params:
    params = plain.init(key)
    rows = params["W_dec"]
    return params | {"W_read": rows, "P": rows.T}


def _encode(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    train: bool = False,
    k: Array | None = None,
) -> Array:
    del train
    return _forward(config, params, acts, grads=grads, k=k).codes


def _forward(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    k: Array | None = None,
) -> Forward:
    if acts.ndim != 2 or acts.shape[1] != config.d_in:
        raise ValueError(
            f"encode: wanted acts [N, {config.d_in}], got shape {acts.shape}"
        )
    rows, readers, origin = params["W_dec"], params["W_read"], params["b_dec"]
    pre = affine(acts, origin, params["W_enc"], params["b_enc"])
    relative = rows / nonzero(jnp.max(jnp.abs(rows)))  # squares stay finite
    score = jax.nn.relu(pre) ** 2 * jnp.sum(relative**2, axis=1)[None, :]
    if grads is not None:
        sizes = jnp.mean((compared(params, grads) @ params["P"]) ** 2, axis=1)
        score = score * sizes * jnp.sum(readers**2, axis=1)[None, :]
    assert config.k is not None  # of_config checked
    index, here = best_of_each(score, config.k)
    if k is not None:
        here = here & first_of(config.k, k)
    values = taken(acts, origin, params["W_enc"], params["b_enc"], pre, index)
    values = jnp.where(here, jax.nn.relu(values), jnp.zeros_like(values))
    recon = weighted_rows(values, index, rows) + origin[None, :]
    grad_recon = None
    if grads is not None:
        grad_recon = _read(params, grads, index, here)
    codes = scattered(values, index, config.d_sae)
    return Forward(codes, pre, recon, values, index, grad_recon)


def _read(params: Params, grads: Array, index: Array, here: Array) -> Array:
    """Gradients ``[N, K, D]`` from the codes ``h`` of the support."""
    num, readouts, dim = grads.shape
    flat = grads.reshape(-1, dim)
    of_all = jnp.repeat(index, readouts, axis=0)
    codes = row_products(flat, of_all, params["P"].T)
    codes = jnp.where(jnp.repeat(here, readouts, axis=0), codes, jnp.zeros_like(codes))
    recon = weighted_rows(codes, of_all, params["W_read"])
    return recon.reshape(num, readouts, dim)
