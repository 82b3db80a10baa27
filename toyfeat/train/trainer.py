"""A trainer: dictionary, loss and optimizer as two pure functions."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from toyfeat.checks import (
    check_flag,
    check_function,
    check_int,
    check_number,
    check_type,
)
from toyfeat.dictionary.controllers import Controller
from toyfeat.dictionary.types import Dictionary, Objective, Term
from toyfeat.train.placement import place_state
from toyfeat.train.step import split_learned, update
from toyfeat.train.types import Recipe, Trainer, TrainState
from toyfeat.types import Array

LEARNING_RATE = 3e-4
"""Learning rate of Adam where no optimizer is given: SAELens' default ``lr``."""


def trainer(
    dictionary: Dictionary,
    objective: Objective,
    optimizer: optax.GradientTransformation | None = None,
    controller: Controller | None = None,
    *,
    readouts: int = 1,
    normalize: bool = True,
    center: bool = True,
    clip: float = 1.0,
    warm_up: int = 500,
    dead_after: int = 1000,
    threshold_rate: float = 0.01,
    schedule: Callable[[Array], Array] | None = None,
    revive: int | None = None,
) -> Trainer:
    r"""Make a trainer of a dictionary: a pair of pure functions.

    ``init(key, **hyper)`` starts a :class:`TrainState`; ``hyper`` overrides defaults
    by name: the coefficient of every term, ``clip``, ``warm_up``, ``k`` (a dictionary
    with top-k codes keeps fewer), ``target`` (of the controller), and what
    ``optax.inject_hyperparams`` made a parameter of the optimizer, such as
    ``learning_rate``.  ``update(state, taps)`` returns the next state and metrics.

    Everything that makes training robust can be switched off: ``normalize=False``,
    ``center=False``, ``clip=inf``, ``warm_up=0``, no controller, no
    :func:`toyfeat.losses.dead_latents` term.

    Args:
      dictionary: what is trained.
      objective: terms, as from :func:`toyfeat.losses.default`.
      optimizer: optax; ``None`` is Adam with the hyper-parameter ``learning_rate``,
        :data:`LEARNING_RATE` by default.
      controller: sets the coefficient of one term, after the warm-up.
      readouts: ``K``, number of gradients of an example of the taps.
      normalize: divide activations by the centred root mean square of the first
        batch whose examples differ and gradients by a running one per readout;
        :func:`toyfeat.train.normalization` reads these units and
        :func:`toyfeat.denormalized` takes them out of the parameters.
      center: start ``b_dec`` at the mean of the first batch; where sparse features
        make up most of the mean, a batch top-k loses latents by it.
      clip: largest norm of the gradient of each tensor.
      warm_up: steps in which the coefficients of sparsity terms grow from 0.
      dead_after: steps without firing after which a latent is dead.
      threshold_rate: of the running average of a threshold that is not learned
        (:func:`toyfeat.dictionaries.batch_topk`).
      schedule: step to a factor of every update: decay of the learning rate for a
        whole population.
      revive: steps between which dead latents start again from examples that are
        reconstructed badly, beside or instead of
        :func:`toyfeat.losses.dead_latents`; ``None`` for never.

    Returns:
      :class:`Trainer`.  Metrics are ``loss``, every term, ``l0``, ``fvu`` (share of
      the variance that is not explained), ``dead`` (latents), ``grad_norm``, with
      gradients ``attribution_l0`` and ``unexplained_share``, with a controller
      ``factor`` and ``saturated``, with ``revive`` the number that was ``revived``.

    Raises:
      ValueError: for terms of one name, a controller of an absent term, a
        ``revive`` that is not positive, an unknown hyper-parameter, a setting that
        is not finite or out of its range, and in ``update`` for taps that do not
        fit.
      TypeError: for an argument or a hyper-parameter of another type.

    Example:
      >>> import jax, optax
      >>> from toyfeat import Taps, losses, trainer
      >>> from toyfeat.dictionary import standard
      >>> sae = standard(8, 32)
      >>> train = trainer(sae, losses.default(sae, sparsity=0.1))
      >>> acts = jax.random.normal(jax.random.key(0), (64, 8))
      >>> taps = Taps(acts, None, jax.numpy.ones(64))
      >>> state = train.init(jax.random.key(1), learning_rate=1e-2)
      >>> state, metrics = jax.jit(train.update)(state, taps)
      >>> int(state.step), bool(metrics["fvu"] < 2)
      (1, True)

    References:
      Bricken et al. (2023), "Towards monosemanticity", appendix on neuron
      resampling, for ``revive``; there an example is drawn by the square of its
      loss, here by its squared error, no example twice, and where codes compete (a
      dictionary with ``k``) the encoder is not made shorter.
    """
    _check_parts(dictionary, objective, controller, schedule)
    if revive is not None:
        revive = check_int("trainer", "revive", revive, about=", or None")
    sizes = {"readouts": readouts, "dead_after": dead_after}
    sizes = {name: check_int("trainer", name, x) for name, x in sizes.items()}
    for name, flag in {"normalize": normalize, "center": center}.items():
        check_flag("trainer", name, flag)
    check_number("trainer", "threshold_rate", threshold_rate, above=0, most=1)
    # The default learning rate is a hyper-parameter, so that members can differ in it.
    if optimizer is None:
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=LEARNING_RATE)
    recipe = Recipe(
        dictionary=dictionary,
        objective=objective,
        optimizer=optimizer,
        controller=controller,
        normalize=normalize,
        center=center,
        **sizes,
        threshold_rate=threshold_rate,
        schedule=schedule,
        revive=revive,
    )
    init = partial(_init, recipe, _default_hyper(recipe, clip, warm_up))
    return Trainer(init=init, update=partial(update, recipe), recipe=recipe)


def _default_hyper(recipe: Recipe, clip: float, warm_up: int) -> dict[str, float]:
    """Collect the settings that ``init`` can override, with their defaults."""
    defaults = {term.name: term.coefficient for term in recipe.objective}
    defaults |= {"clip": clip, "warm_up": warm_up}
    if recipe.dictionary.config.k is not None:
        defaults["k"] = recipe.dictionary.config.k
    if recipe.controller is not None:
        defaults["target"] = recipe.controller.target
    _check_hyper(defaults)
    return defaults


def _check_parts(
    dictionary: Dictionary,
    objective: Objective,
    controller: Controller | None,
    schedule: Callable[[Array], Array] | None,
) -> None:
    """Check the dictionary, the terms, the controller and the schedule.

    Raises:
      TypeError: if a part is of another type.
      ValueError: if parts do not fit each other.
    """
    hint = "make one by toyfeat.dictionaries"
    check_type("trainer", "dictionary", dictionary, Dictionary, hint=hint)
    terms = objective if isinstance(objective, tuple | list) else ()
    if not terms or not all(isinstance(term, Term) for term in terms):
        raise TypeError(
            f"trainer: objective must be one or more terms in a tuple, got "
            f"{objective!r:.80}; toyfeat.losses.default(dictionary) makes one"
        )
    # Metrics and coefficients are found by the name of their term.
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(
            f"trainer: terms must have different names, got {names}; rename one by "
            "_replace(name=...)"
        )
    if controller is not None and not isinstance(controller, Controller):
        raise TypeError(
            "trainer: controller must be a Controller or None, got "
            f"{controller!r:.80}; make one by toyfeat.controllers"
        )
    if controller is not None and controller.term not in names:
        raise ValueError(
            f"trainer: the controller steers {controller.term!r}, the objective has "
            f"{names}; make it with term= one of them"
        )
    if schedule is not None:
        hint = f"lambda step: {schedule!r:.20} is a constant factor"
        check_function("trainer", "schedule", schedule, "of the step", hint=hint)


def _init(
    recipe: Recipe, defaults: dict[str, float], key: Array, **hyper: Any
) -> TrainState:
    """Start a state: random parameters, a fresh optimizer, the settings, no counts."""
    dictionary, controller = recipe.dictionary, recipe.controller
    params = dictionary.init(key)
    dtype = params["W_dec"].dtype
    # The optimizer knows only the tensors that have a gradient.
    learned, _ = split_learned(dictionary.architecture, params)
    opt_state: Any = recipe.optimizer.init(learned)
    # Settings live in the state, so that members of a population can differ in them;
    # those that optax.inject_hyperparams made are handed to the optimizer.
    injected = getattr(opt_state, "hyperparams", {})
    known = {**defaults, **injected}
    _check_overrides(dictionary, hyper, known, bool(injected))
    values = {name: jnp.asarray(hyper.get(name, x), dtype) for name, x in known.items()}
    if injected:
        opt_state = opt_state._replace(
            hyperparams={name: values[name] for name in injected}
        )
    running = _initial_running(recipe, dtype)
    if recipe.revive is not None:
        running["key"] = jax.random.fold_in(key, 1)  # draws of revival are its own
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        controller=() if controller is None else controller.init(),
        running=running,
        hyper=values,
    )
    state = jax.tree.map(jnp.array, state)  # no array twice: states are donated
    return place_state(dictionary, state)


def _initial_running(recipe: Recipe, dtype: Any) -> dict[str, Array]:
    """Make the running averages and counts of a trainer that has seen no batch."""
    unit, control = np.ones((), dtype), recipe.controller  # NumPy compiles nothing
    values = {
        # Units of activations and targets, and whether a batch has set them.
        "acts_scale": unit,
        "target_scale": unit,
        "begun": np.zeros((), bool),
        # Mean squares of gradients and of attributions.
        "grads_unit": np.zeros(recipe.readouts, dtype),
        "grads_square": np.zeros(recipe.readouts, dtype),
        "attribution_square": np.zeros((), dtype),
        # Steps since each latent fired, and what the controller multiplies by.
        "silent": np.zeros(recipe.dictionary.config.d_sae, np.int32),
        "factor": unit * (1 if control is None else control.start),
    }
    return {name: jnp.asarray(value) for name, value in values.items()}


def _check_overrides(
    dictionary: Dictionary,
    hyper: dict[str, Any],
    known: Mapping[str, Any],
    injected: bool,
) -> None:
    """Check settings given to ``init``: known, in their ranges, one number each."""
    if unknown := set(hyper) - set(known):
        hint = "" if injected else "; wrap the optimizer in optax.inject_hyperparams"
        raise ValueError(
            f"trainer: unknown hyper-parameters {sorted(unknown)}; known are "
            f"{sorted(known)}{hint}"
        )
    _check_hyper(hyper)
    _check_k(dictionary, hyper)
    for name, value in hyper.items():
        if np.shape(value) != ():
            raise ValueError(
                f"trainer: {name} must be one number, got shape {np.shape(value)}; "
                "toyfeat.population(trainer) takes one for each member"
            )


def _check_k(dictionary: Dictionary, hyper: dict[str, Any]) -> None:
    """Check that a smaller ``k`` is a whole number that the dictionary has room for."""
    limit = dictionary.config.k
    if "k" not in hyper or limit is None or isinstance(hyper["k"], Tracer):
        return
    k = np.asarray(hyper["k"])
    if not np.all((k >= 1) & (k <= limit) & (k == np.floor(k))):
        raise ValueError(
            f"trainer: k must be a whole number in 1 .. {limit}, what the dictionary "
            f"was made with, got {hyper['k']}; make it with a larger k"
        )


def _check_hyper(hyper: dict[str, Any]) -> None:
    """Check that hyper-parameters are numbers in their ranges.

    Raises:
      ValueError: for a value out of its range.
      TypeError: for what is not a number.
    """
    for name, value in hyper.items():
        if isinstance(value, Tracer):
            continue  # the values of a population under vmap are not there to see
        values = np.asarray(value)
        kinds = jnp.integer, jnp.floating
        if not any(jnp.issubdtype(values.dtype, kind) for kind in kinds):
            raise TypeError(
                f"trainer: {name} must be a number, got {value!r}; pass a float"
            )
        if name in ("target", "clip") and not np.all(values > 0):
            raise ValueError(
                f"trainer: the {name} must be positive, got {value}; without a limit "
                "it is clip=inf, without a target controller=None"
            )
        if name in ("warm_up", "learning_rate") and not np.all(values >= 0):
            raise ValueError(
                f"trainer: {name} must not be negative, got {value}; 0 switches it off"
            )
        if name != "clip" and not np.all(np.isfinite(values)):
            raise ValueError(
                f"trainer: {name} must be finite, got {value}; pass another number"
            )


UNSTABILIZED: Mapping[str, Any] = {
    "normalize": False,
    "center": False,
    "clip": np.inf,
    "warm_up": 0,
}
"""Settings of :func:`trainer` with all that makes training robust switched off."""
