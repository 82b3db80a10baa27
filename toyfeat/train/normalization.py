"""Units that a dictionary is trained in: of batches, and of its parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.types import Dictionary
from toyfeat.linalg.precision import nonzero
from toyfeat.train.types import Recipe, Trainer, TrainState
from toyfeat.types import Array, Params, Taps

MEMORY = 0.99
"""Share of a running average that is kept per step: it follows a hundred steps, less
than a warm-up."""

LEAST = 1e-30
"""Keeps quotients finite where a sum of weights, a norm or a variance is 0; in
normalized units all others are far larger."""


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


class NormalizedBatch(NamedTuple):
    """A batch in normalized units; the weights sum to 1.

    ``unit`` and ``effect_units`` are those of :class:`toyfeat.losses.Inputs`.
    """

    acts: Array
    target: Array
    grads: Array | None
    weights: Array
    unit: Array
    effect_units: Array
    context: Any


def normalize_batch(
    recipe: Recipe, state: TrainState, taps: Taps
) -> tuple[TrainState, NormalizedBatch]:
    """Divide a batch by its units, which the state records."""
    acts, grads = taps.acts, taps.grads
    target = acts if taps.targets is None else taps.targets
    weights = taps.weights / jnp.maximum(jnp.sum(taps.weights), LEAST)
    acts, target = _zero_unweighted(acts, weights), _zero_unweighted(target, weights)
    running, params = dict(state.running), dict(state.params)
    # Activations and targets: the size in the first batch whose examples differ.
    first = ~running["begun"]
    running["begun"] = running["begun"] | _varies(acts, weights)
    if recipe.normalize:
        scale = jnp.where(first, _size(acts, weights), running["acts_scale"])
        target_scale = scale  # one b_dec is in the units of both
        if recipe.dictionary.config.d_out is not None:
            size = _size(target, weights)
            target_scale = jnp.where(first, size, running["target_scale"])
        running["acts_scale"], running["target_scale"] = scale, target_scale
        acts, target = acts / scale, target / target_scale
    # The decoder starts at the mean of that batch.
    if recipe.center:
        params["b_dec"] = jnp.where(first, weights @ target, params["b_dec"])
    # Gradients: a running size per readout.
    sizes = jnp.ones_like(running["grads_unit"])
    if grads is not None:
        grads = _zero_unweighted(jax.lax.stop_gradient(grads), weights)
        if recipe.normalize:
            grads, sizes = _normalize_grads(running, state.step, grads, weights)
    batch = NormalizedBatch(
        acts=acts,
        target=target,
        grads=grads,
        weights=weights,
        unit=running["target_scale"],
        effect_units=running["target_scale"] * sizes,
        context=taps.context,
    )
    return state._replace(running=running, params=params), batch


def _normalize_grads(
    running: dict[str, Array], step: Array, grads: Array, weights: Array
) -> tuple[Array, Array]:
    """Divide gradients by their running size ``[K]``, which ``running`` gets.

    It is kept in units of their first largest entry, so that squares are finite.
    """
    largest = jnp.max(jnp.abs(grads), axis=(0, 2))
    unit = running["grads_unit"]
    unit = jnp.where(unit > 0, unit, largest)
    relative = grads / nonzero(unit)[None, :, None]
    square = jnp.einsum("n,nkd->k", weights, relative**2) / grads.shape[2]
    square = MEMORY * running["grads_square"] + (1 - MEMORY) * square
    running |= {"grads_unit": unit, "grads_square": square}
    size = gradient_scale(square, jnp.ones_like(unit), step + 1)
    return relative / size[None, :, None], size * nonzero(unit)


def _zero_unweighted(values: Array, weights: Array) -> Array:
    """Put 0 in place of what has no weight, which may be NaN."""
    counted = (weights > 0).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(counted, values, jnp.zeros_like(values))


def _varies(values: Array, weights: Array) -> Array:
    """Test whether examples that have weight differ."""
    # Largest and smallest, and not a look at one of them: rows may be on many devices.
    counted = (weights > 0)[:, None]
    high = jnp.max(jnp.where(counted, values, jnp.full_like(values, -jnp.inf)), axis=0)
    low = jnp.min(jnp.where(counted, values, jnp.full_like(values, jnp.inf)), axis=0)
    return jnp.any(high != low) & jnp.any(counted)


def _size(values: Array, weights: Array) -> Array:
    """Root mean square entry after centring; 1 if that is 0."""
    centred = values - (weights @ values)[None, :]
    sizes = jnp.where(weights[:, None] > 0, jnp.abs(centred), 0)
    largest = jnp.max(sizes)  # squares of what is small or large are not finite
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    square = weights @ jnp.mean((sizes / largest) ** 2, axis=1)
    return largest * jnp.sqrt(jnp.where(square > 0, square, jnp.ones_like(square)))


def normalized(dictionary: Dictionary, params: Params, state: TrainState) -> Params:
    """Make parameters in a state's units from those for taps in their own units.

    The inverse of :func:`denormalized`: that one's map with the units inverted.

    Args:
      dictionary: that the parameters are of.
      params: as a file of SAELens holds them, or :func:`denormalized` returns them.
      state: whose units they are for.

    Returns:
      Parameters of a state.
    """
    running = dict(state.running)
    for name in ("acts_scale", "target_scale"):
        running[name] = 1 / running[name]
    inverse = state._replace(params=params, running=running)
    moved = denormalized(dictionary, inverse)
    return {name: moved[name] for name in state.params}


def warm_start(
    trainer: Trainer, key: Array, params: Params, taps: Taps, **hyper: Any
) -> TrainState:
    """Start a state from parameters that are trained already.

    Args:
      trainer: of the dictionary that the parameters are of.
      key: of what else is random in a state.
      params: for taps in their own units, such as a file of SAELens holds.
      taps: a batch whose activations set the units of the state.
      hyper: as of ``trainer.init``.

    Returns:
      A state with no step done, a fresh optimizer and these parameters.

    Raises:
      ValueError: for a trainer of your own, or parameters of other shapes.
    """
    recipe = trainer.recipe
    if recipe is None:
        raise ValueError(
            "warm_start: trainer must be of toyfeat.trainer, got one without a "
            "recipe; put the parameters into its state yourself"
        )
    state = trainer.init(key, **hyper)
    wanted = {name: x.shape for name, x in state.params.items()}
    shapes = {name: x.shape for name, x in params.items() if name in wanted}
    if shapes != wanted:
        raise ValueError(
            f"warm_start: params must have the shapes of the dictionary {wanted}, got "
            f"{shapes}; give those of this architecture, width and number of latents"
        )
    # The units of the batch; gradients get theirs in the first step.
    bare = taps._replace(grads=None, context=None)
    state, _ = normalize_batch(recipe, state, bare)
    own = normalized(recipe.dictionary, params, state)
    return jax.tree.map(jnp.array, state._replace(params=own))
