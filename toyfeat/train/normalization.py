"""Units that a dictionary is trained in, and parameters without them."""

from typing import NamedTuple

import jax.numpy as jnp

from toyfeat.dictionary.types import Dictionary
from toyfeat.train.types import TrainState
from toyfeat.types import Array, Params

MEMORY = 0.99
"""Share of a running average that is kept per step: it follows a hundred steps, less
than a warm-up."""


class Normalization(NamedTuple):
    """Units that a dictionary is trained in.

    Attributes:
      acts: ``[]``, what activations were divided by.
      target: ``[]``, what targets were divided by, which is ``acts`` unless the
        dictionary is a transcoder.
      grads: ``[K]``, what the gradients of each readout were divided by.
    """

    acts: Array
    target: Array
    grads: Array


def normalization(state: TrainState) -> Normalization:
    """Read what a trainer divides activations, targets and gradients by.

    Args:
      state: from :func:`toyfeat.trainer`, or of a whole population.

    Returns:
      :class:`Normalization`, all 1 where nothing was normalized: before the first
      step, with ``normalize=False``, and for gradients that the taps did not have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat import Taps, losses, trainer
      >>> from toyfeat.dictionary import standard
      >>> sae = standard(8, 32)
      >>> train = trainer(sae, losses.default(sae))
      >>> acts = 5 * jax.random.normal(jax.random.key(0), (64, 8))
      >>> state, taps = train.init(jax.random.key(1)), Taps(acts, None, jnp.ones(64))
      >>> state, _ = jax.jit(train.update)(state, taps)
      >>> bool(abs(normalization(state).acts - jnp.std(acts)) < 0.2)
      True
    """
    running = state.running
    square, unit = running["grads_square"], running["grads_unit"]
    grads = gradient_scale(square, unit, state.step)
    return Normalization(running["acts_scale"], running["target_scale"], grads)


def gradient_scale(square: Array, unit: Array, step: Array) -> Array:
    """Root mean square ``[..., K]`` of the gradients after ``step [...]`` updates.

    ``square`` is the running mean square in units of ``unit`` squared, so that it is
    finite and not 0 for gradients of any size.
    """
    weight = 1 - MEMORY ** step.astype(square.dtype)  # of the running mean
    weight = jnp.broadcast_to(weight[..., None], square.shape)
    known = square > 0
    ones = jnp.ones_like(square)
    root = jnp.sqrt(jnp.where(known, square, ones) / jnp.where(known, weight, ones))
    return jnp.where(known, unit, ones) * root


def denormalized(dictionary: Dictionary, state: TrainState) -> Params:
    r"""Make parameters for taps in their own units from those of a trained state.

    With :math:`s`, :math:`t` and :math:`s_k` of :func:`normalization`, activations
    ``a`` and gradients ``g`` in their own units give the codes that :math:`a / s` and
    :math:`g_k / s_k` gave in training, and reconstructions in the units of the taps:
    ``W_enc`` is divided by :math:`s`, ``W_dec`` and ``b_dec`` are multiplied by
    :math:`t`.

    Codes, and thresholds with them, stay in normalized units, but those of a
    dictionary with ``rescale_acts_by_decoder_norm`` are in units of the output, and
    multiplied by :math:`t`.

    Where gradients take part in the choice (:func:`toyfeat.dictionaries.gradient_topk`,
    :func:`toyfeat.dictionaries.paired`) there is one parameter more, ``grad_scale
    [K]``, by which ``encode`` divides the gradients while it compares codes, and only
    then.  A paired dictionary's ``W_read`` and ``P`` are not changed: :math:`g_k P` are
    codes in units of the gradients, and :math:`g_k P W_{read}` their reconstruction, in
    whatever units they are.  For other readouts than those of the training set
    ``params["grad_scale"]`` to the root mean square of each, ``[K]`` or ``[1]``.

    Args:
      dictionary: that was trained.
      state: from its trainer, of one member.

    Returns:
      Parameters, for ``encode``, ``decode``, ``forward`` and
      :func:`toyfeat.interop.save_saelens`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat import Taps, losses, trainer
      >>> from toyfeat.dictionary import standard
      >>> sae = standard(8, 32)
      >>> train = trainer(sae, losses.default(sae))
      >>> acts = 5 * jax.random.normal(jax.random.key(0), (64, 8))
      >>> state, taps = train.init(jax.random.key(1)), Taps(acts, None, jnp.ones(64))
      >>> state, _ = jax.jit(train.update)(state, taps)
      >>> inner = sae.encode(state.params, acts / normalization(state).acts)
      >>> outer = sae.encode(denormalized(sae, state), acts)
      >>> bool(jnp.allclose(outer, inner, atol=1e-5))
      True
    """
    # The encoder takes the units of activations out, the decoder puts those of targets
    # in, so that codes stay as they were in training.
    units, params = normalization(state), dict(state.params)
    params["W_enc"] = params["W_enc"] / units.acts
    params["W_dec"] = params["W_dec"] * units.target
    params["b_dec"] = params["b_dec"] * units.target
    own = dictionary.architecture.denormalize
    if own is not None:
        params |= own(dictionary.config, state.params, units)
    return params
