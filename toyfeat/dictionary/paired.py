r"""Paired dictionaries: latents that both write activations and read gradients.

Latent ``j`` has a writer :math:`w_j` (row of ``W_dec``, for the activations) and a
reader :math:`r_j` (row of ``W_read``, for the gradients) under one index.
"""

from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.dictionary.base import (
    DECODER_NORM,
    factory_config,
    make_dictionary,
    normalized_grads,
    weighted_mean,
)
from toyfeat.dictionary.gather import row_products, weighted_rows
from toyfeat.dictionary.topk import keep_largest
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    Inputs,
    RuleInputs,
    SavedAs,
    Term,
    zero_bias,
)
from toyfeat.linalg.precision import nonzero
from toyfeat.types import Array, Params


def paired(
    dim: int, latents: int, k: int, *, decoder_norm: float = DECODER_NORM
) -> Dictionary:
    r"""Make a dictionary of activations and gradients with one support.

    With codes :math:`f = \max(0, (a - b_{dec}) W_{enc} + b_{enc})` and :math:`h_k = g_k
    P`, the ``k`` latents of the largest :math:`f_j^2 |w_j|^2 \sum_k h_{kj}^2 |r_j|^2`
    reconstruct both, :math:`\hat a = b_{dec} + \sum_j f_j w_j` and :math:`\hat g_k =
    \sum_j h_{kj} r_j`. The product asks for a latent that is in the activation *and* in
    the gradients: a sum lets one latent write a feature and another read it
    (docs/decisions/dictionary.md, "Paired latents are chosen by a product").
    Activations and gradients have to be in units of their root mean square, which
    :func:`toyfeat.trainer` sees to; train with :func:`toyfeat.losses.default`.

    Args:
      dim: width ``D`` of the activations.
      latents: number of latents ``M``.
      k: number of latents that an example uses, in all of its ``K`` readouts.
      decoder_norm: length of the rows of ``W_dec`` and ``W_read`` at the start.

    Returns:
      :class:`Dictionary` with the parameters of :func:`toyfeat.dictionaries.standard`,
      the readers ``W_read [M, D]`` and ``P [D, M]``.  Without gradients ``encode``
      chooses by the activations alone.  Gradients are divided by ``grad_scale [K]`` in
      the score, if :func:`toyfeat.denormalized` added it.

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
    config = factory_config(PAIRED, dim, latents, k=k)
    return make_dictionary(PAIRED, config, decoder_norm=decoder_norm)


def gradient_reconstruction() -> Term:
    r"""Penalize the error of gradients, :math:`\frac 1 K \sum_k |g_k - \hat g_k|^2`.

    Returns:
      :class:`Term` for :func:`toyfeat.dictionaries.paired`.
    """

    def loss(inputs: Inputs) -> Array:
        if inputs.out.grad_recon is None or inputs.grads is None:
            raise ValueError("gradient_reconstruction: only of a paired dictionary")
        error = jnp.sum((inputs.grads - inputs.out.grad_recon) ** 2, axis=2)
        return weighted_mean(inputs, jnp.mean(error, axis=1))

    return Term("gradient_reconstruction", loss, needs_grads=True)


def _tensors(key: Array, config: Config, shared: Params) -> Params:
    rows = shared["W_dec"]
    return zero_bias(key, config, shared) | {"W_read": rows, "P": rows.T}


def _rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    rows, readers = params["W_dec"], params["W_read"]
    # How much a latent writes; relative lengths, so that squares stay finite.
    relative = rows / nonzero(jnp.max(jnp.abs(rows)))
    score = jax.nn.relu(batch.pre) ** 2 * jnp.sum(relative**2, axis=1)[None, :]
    # Times how much it reads, over all readouts.
    if batch.grads is not None:
        grads = normalized_grads(params, batch.grads)
        sizes = jnp.mean((grads @ params["P"]) ** 2, axis=1)
        score = score * sizes * jnp.sum(readers**2, axis=1)[None, :]
    values, index, filled = keep_largest(config, params, batch, score)
    if batch.grads is None:
        return Codes(values, index)
    recon = _grad_recon(params, batch.grads, index, filled)
    return Codes(values, index, grad_recon=recon)


def _grad_recon(
    params: Params, grads: Array, index: Array | None, filled: Array
) -> Array:
    """Gradients ``[N, K, D]`` from the codes ``h`` of the support."""
    # All latents, of which the support is a mask.
    if index is None:
        codes = grads @ params["P"]
        codes = jnp.where(filled[:, None, :], codes, jnp.zeros_like(codes))
        return codes @ params["W_read"]
    # Every readout of an example is a row of its own, with the example's support.
    num, readouts, dim = grads.shape
    flat = grads.reshape(-1, dim)
    index = jnp.repeat(index, readouts, axis=0)
    # Codes of the gradients, 0 at places that are not filled.
    codes = row_products(flat, index, params["P"].T)
    filled = jnp.repeat(filled, readouts, axis=0)
    codes = jnp.where(filled, codes, jnp.zeros_like(codes))
    return weighted_rows(codes, index, params["W_read"]).reshape(num, readouts, dim)


def _denormalize(config: Config, params: Params, units: Any) -> Params:
    del config, params
    return {"grad_scale": units.grads}


PAIRED = Architecture(
    name="paired",
    rule=_rule,
    tensors=_tensors,
    latent_axes={"b_enc": 0, "W_read": 0, "P": 1},
    selects="example",
    reads_gradients=True,
    transcodes=False,
    losses=(gradient_reconstruction(),),
    revived_from={"W_read": "grads", "P": "grads"},
    denormalize=_denormalize,
    # SAELens compares codes times the lengths of their rows, as the score does, if it
    # is told to rescale.
    saved_as=SavedAs(
        "topk",
        extra_tensors=("W_read", "P", "grad_scale"),
        overrides={"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True},
    ),
)
"""Latents that are both in the activation and in the gradients."""
