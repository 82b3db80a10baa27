"""The units in which a dictionary was trained, and parameters without them."""

import jax.numpy as jnp

from toyfeat.dictionary.coding import BY_GRADIENTS
from toyfeat.types import Array, Dictionary, Params, Scales, TrainState

MEMORY = 0.99
"""How much of a running statistic is kept per step."""


def scales(state: TrainState) -> Scales:
    """What a trainer divided activations, targets and gradients by.

    Args:
      state: from :func:`toyfeat.trainer`, or of a whole population.

    Returns:
      :class:`Scales`, all of them 1 where nothing was scaled: before the first
      step, with ``normalize=False``, and for gradients that the taps did not have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat import Taps, dictionary_objective, standard, trainer
      >>> sae = standard(8, 32)
      >>> init, update = trainer(sae, dictionary_objective(sae))
      >>> acts = 5 * jax.random.normal(jax.random.key(0), (64, 8))
      >>> state, taps = init(jax.random.key(1)), Taps(acts, None, jnp.ones(64))
      >>> state, _ = jax.jit(update)(state, taps)
      >>> bool(abs(scales(state).acts - jnp.std(acts)) < 0.2)
      True
    """
    running = state.running
    square, unit = running["grads_square"], running["grads_unit"]
    grads = gradient_scale(square, unit, state.step)
    return Scales(running["acts_scale"], running["target_scale"], grads)


def gradient_scale(square: Array, unit: Array, step: Array) -> Array:
    """Root mean square ``[..., K]`` after ``step [...]`` updates.

    ``square`` is the running mean square in units of ``unit`` squared, so that it is
    finite and not 0 for gradients of any size.
    """
    seen = 1 - MEMORY ** step.astype(square.dtype)
    seen = jnp.broadcast_to(seen[..., None], square.shape)
    there = square > 0
    one = jnp.ones_like(square)
    root = jnp.sqrt(jnp.where(there, square, one) / jnp.where(there, seen, one))
    return jnp.where(there, unit, one) * root


def folded(dictionary: Dictionary, state: TrainState) -> Params:
    r"""Parameters for taps as they are, from a state whose taps are scaled.

    With :math:`s`, :math:`t` and :math:`s_k` of :func:`scales`, activations ``a`` and
    gradients ``g`` as they are give the codes that :math:`a / s` and :math:`g_k / s_k`
    gave in training, and reconstructions in the units of the taps:
    ``W_enc`` is divided by :math:`s`, ``W_dec`` and ``b_dec`` are multiplied by
    :math:`t`.

    Codes, and thresholds with them, stay in scaled units, but those of a dictionary
    with ``rescale_acts_by_decoder_norm`` are in units of what they add, and
    multiplied by :math:`t`.

    Where gradients take part in the choice (:func:`toyfeat.gradient_topk`,
    :func:`toyfeat.paired`) there is one parameter more, ``grad_scale [K]``, by which
    ``encode`` divides the gradients while it compares codes, and only then.  A paired
    dictionary's ``W_read`` and ``P`` are what they were: :math:`g_k P` are codes in
    units of the gradients, and :math:`g_k P W_{read}` their reconstruction, in
    whatever units they are.  For other readouts than those of the training set
    ``params["grad_scale"]`` to the root mean square of each, ``[K]`` or ``[1]``.

    Args:
      dictionary: that was trained.
      state: from its trainer, of one member.

    Returns:
      Parameters, for ``encode``, ``decode``, ``forward`` and
      :func:`toyfeat.save_saelens`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat import Taps, dictionary_objective, standard, trainer
      >>> sae = standard(8, 32)
      >>> init, update = trainer(sae, dictionary_objective(sae))
      >>> acts = 5 * jax.random.normal(jax.random.key(0), (64, 8))
      >>> state, taps = init(jax.random.key(1)), Taps(acts, None, jnp.ones(64))
      >>> state, _ = jax.jit(update)(state, taps)
      >>> inner = sae.encode(state.params, acts / scales(state).acts)
      >>> outer = sae.encode(folded(sae, state), acts)
      >>> bool(jnp.allclose(outer, inner, atol=1e-5))
      True
    """
    of, config = scales(state), dictionary.config
    params = dict(state.params)
    params["W_enc"] = params["W_enc"] / of.acts
    params["W_dec"] = params["W_dec"] * of.target
    params["b_dec"] = params["b_dec"] * of.target
    rescaled = config.rescale_acts_by_decoder_norm
    if "topk_threshold" in params and rescaled:
        params["topk_threshold"] = params["topk_threshold"] * of.target
    if config.architecture in BY_GRADIENTS:
        # Effects are those of unit rows where rows count in the codes, else of W_dec.
        longer = config.architecture == "gradient_topk" and not rescaled
        params["grad_scale"] = of.grads * of.target if longer else of.grads
    return params
