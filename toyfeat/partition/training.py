"""Training of decompositions: a trainer for :func:`toyfeat.fit` and populations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from toyfeat.checks import check_int, check_number, check_type
from toyfeat.dictionary.controllers import Controller
from toyfeat.loops import train
from toyfeat.metrics.partition import ALIVE
from toyfeat.partition.decomposition import Components, Decomposition
from toyfeat.partition.importance import Importance
from toyfeat.partition.losses import Term, weight_error
from toyfeat.partition.recipe import PartitionRecipe, describe_recipe
from toyfeat.partition.sources import (
    Distance,
    LossInputs,
    loss_inputs,
    mean_squared_error,
)
from toyfeat.train import Trainer, TrainState
from toyfeat.train.placement import run_update
from toyfeat.types import Array, Params, Taps

_WARM_UP_RATE, _WARM_UP_DECAY = 0.01, 0.1  # AdamW, as published for the toys
_MEASURED: tuple[str, ...] = ("l0", "alive", "remainder")  # metrics beside the terms
_LEAST = 1e-30  # keeps a quotient finite where the coefficient of a term is 0


def trainer(
    decomposition: Decomposition,
    params: Params,
    objective: tuple[Term, ...],
    importance: Importance,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    schedule: Callable[[Array], Array] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    controller: Controller | None = None,
    distance: Distance = mean_squared_error,
    warm_up: int = 200,
    warm_up_decay: float = _WARM_UP_DECAY,
    networks: bool = False,
    inputs_from: Callable[[Array], Any] = lambda acts: acts,
) -> Trainer:
    """Make a trainer of a decomposition, for :func:`toyfeat.fit`.

    Batches are :class:`toyfeat.Taps` whose ``acts`` are the inputs of the model; their
    weights count.  ``init(key, **hyper)`` overrides coefficients of terms,
    ``learning_rate``, ``target`` (of the controller) and ``network``.
    :func:`toyfeat.population` trains seeds and settings together.

    Args:
      decomposition: what is trained.
      params: of the target.
      objective: terms of :mod:`toyfeat.partition.losses`.
      importance: function of the causal importances.
      steps: length of the training, for what changes on the way (powers, ramps).
      learning_rate: of all parameters, a hyper-parameter.
      schedule: step to a factor of the learning rate.
      optimizer: optax, without a learning rate; ``None`` for Adam.
      controller: of the coefficient of a term, by ``"l0"`` or the value of another
        term (:func:`toyfeat.controllers.target_l0` or ``target_error``).
      distance: between outputs of the masked model and of the target, ``[B]``.
      warm_up: steps at the start on the error of the weights alone.
      warm_up_decay: decay of weights in them.
      networks: whether every leaf of ``params`` has a leading axis of targets, of which
        ``init(key, network=)`` takes one.
      inputs_from: ``acts [N, D]`` to inputs of the model, such as int tokens.

    Returns:
      :class:`toyfeat.Trainer`.  ``state.params`` has ``"components"`` and
      ``"importance"``; metrics are ``loss``, every term, ``l0`` (importances over
      .1 per example, summed over sites), ``alive`` (components that have
      one in the batch), ``remainder`` (share of the weights' squares) and
      ``grad_norm``.

    Raises:
      TypeError: for an argument of another type.
      ValueError: for terms of one name, and a controller of a term or by a metric
        that is not there.
    """
    hint = "make one by ft.partition.decompose_weights"
    check_type("trainer", "decomposition", decomposition, Decomposition, hint=hint)
    check_int("trainer", "steps", steps)
    check_int("trainer", "warm_up", warm_up, least=0)
    _check_terms(objective, controller)
    recipe = PartitionRecipe(
        decomposition=decomposition,
        params=params,
        objective=tuple(objective),
        importance=importance,
        steps=steps,
        schedule=schedule,
        optimizer=optax.scale_by_adam() if optimizer is None else optimizer,
        controller=controller,
        distance=distance,
        warm_up=warm_up,
        warm_up_decay=warm_up_decay,
        networks=networks,
        inputs_from=inputs_from,
    )
    hyper = _default_hyper(recipe, learning_rate)
    return Trainer(
        partial(_init, recipe, hyper),
        partial(_update, recipe),
        settings=partial(describe_recipe, recipe),
    )


def _default_hyper(recipe: PartitionRecipe, learning_rate: float) -> dict[str, float]:
    """Collect the settings that ``init`` can override, with their defaults."""
    hyper = {term.name: term.coefficient for term in recipe.objective}
    hyper |= {"learning_rate": learning_rate}
    hyper |= {} if recipe.controller is None else {"target": recipe.controller.target}
    return hyper | ({"network": 0} if recipe.networks else {})


def _check_terms(objective: tuple[Term, ...], controller: Controller | None) -> None:
    """Check that terms have names of their own, and the controller one of them."""
    names = [term.name for term in objective]
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"trainer: terms must be one or more of different names, got {names}; "
            "rename one by _replace(name=...)"
        )
    if controller is None:
        return
    known = [*names, *_MEASURED]
    wanted = ("steers", controller.term, names), ("reads", controller.measures, known)
    for verb, name, there in wanted:
        if name not in there:
            raise ValueError(
                f"trainer: the controller {verb} {name!r}, the objective has {there}; "
                "make it with one of them"
            )


def cosine(steps: int, end: float = 0.0) -> Callable[[Array], Array]:
    """Make a factor of the learning rate that falls from 1 along a cosine.

    Args:
      steps: until the end.
      end: the factor there.

    Returns:
      Step to factor, for :func:`trainer`.
    """
    schedule = optax.cosine_decay_schedule(1.0, steps, end)
    return lambda step: jnp.asarray(schedule(step))


def _init(
    recipe: PartitionRecipe, defaults: dict[str, float], key: Array, **hyper: Any
) -> TrainState:
    """Start a state: the target, its parts after the warm-up, the settings."""
    if unknown := set(hyper) - set(defaults):
        raise ValueError(
            f"trainer: unknown hyper-parameters {sorted(unknown)}; known are "
            f"{sorted(defaults)}"
        )
    for name, value in hyper.items():
        if not isinstance(value, Tracer):
            check_number("trainer", name, value, least=0)
    values = {n: jnp.asarray(hyper.get(n, x), jnp.float32) for n, x in defaults.items()}
    target = recipe.params
    if recipe.networks:
        index = values["network"].astype(jnp.int32)
        target = jax.tree.map(lambda x: jnp.asarray(x)[index], target)
    parts_key, importance_key, sources_key, run_key = jax.random.split(key, 4)
    components = _fit_weights(recipe, target, recipe.decomposition.init(parts_key))
    params = {
        "components": components,
        "importance": recipe.importance.init(importance_key),
    }
    running: dict[str, Any] = {"target": target, "key": run_key}
    for number, term in enumerate(recipe.objective):
        if term.persistent is not None:
            term_key = jax.random.fold_in(sources_key, number)
            running[term.name] = term.persistent.init(term_key, recipe.decomposition)
    if recipe.controller is not None:
        running["factor"] = jnp.full((), recipe.controller.start)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=recipe.optimizer.init(params),
        controller=() if recipe.controller is None else recipe.controller.init(),
        running=running,
        hyper=values,
    )
    return jax.tree.map(jnp.array, state)  # no array twice: states are donated


def _fit_weights(
    recipe: PartitionRecipe, target: Params, components: Components
) -> Components:
    """Bring the sums of the parts near the weights, before masks are learned."""
    if not recipe.warm_up:
        return components

    def loss(components: Components, batch: Any) -> Array:
        del batch
        return weight_error(recipe.decomposition, target, components)

    optimizer = optax.adamw(_WARM_UP_RATE, weight_decay=recipe.warm_up_decay)
    steps = recipe.warm_up
    return train(
        loss, components, lambda _: (), steps=steps, optimizer=optimizer
    ).params


def _update(
    recipe: PartitionRecipe, state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Array]]:
    """Do one update, ``(state, taps) -> (state, metrics)``, on any devices."""
    return run_update(partial(_update_once, recipe), state, taps)


def _update_once(
    recipe: PartitionRecipe, state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Array]]:
    """Do one update where products need no sharding of their results."""
    running: dict[str, Any] = dict(state.running)
    prepare = partial(_loss_inputs, recipe, state, taps)
    # Terms that keep an adversary let it ascend first, against fixed parameters.
    kept = {t.name: t.persistent for t in recipe.objective if t.persistent is not None}
    if kept:
        fixed = prepare(jax.lax.stop_gradient(state.params))
        for name, persistent in kept.items():
            running[name] = persistent.ascend(fixed, running[name])
    sources = {name: running[name]["sources"] for name in kept}
    # Loss, and gradients of parameters and sources from one graph.
    coefficients = {term.name: state.hyper[term.name] for term in recipe.objective}
    if recipe.controller is not None:
        coefficients[recipe.controller.term] *= running["factor"]

    def loss(params: Params, sources: Any) -> tuple[Array, Any]:
        inputs = prepare(params)._replace(sources=sources)
        losses = {term.name: term.loss(inputs) for term in recipe.objective}
        total = sum(coefficients[name] * value for name, value in losses.items())
        return jnp.asarray(total), (losses, _measure(inputs))

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (total, (losses, measured)), (grads, source_grads) = value_and_grad(
        state.params, sources
    )
    # The last ascent is by the gradient of the error itself.
    for name, persistent in kept.items():
        scale = jnp.maximum(coefficients[name], _LEAST)
        own = jax.tree.map(lambda g, s=scale: g / s, source_grads[name])
        progress = state.step.astype(jnp.float32) / recipe.steps
        running[name] = persistent.finish(own, running[name], progress)
    params, opt_state = _step(recipe, state, grads)
    metrics = {"loss": total, **losses, **measured, "grad_norm": optax.tree.norm(grads)}
    control, metrics = _control(recipe, state, running, metrics)
    after = state._replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        controller=control,
        running=running,
    )
    return after, metrics


def _control(
    recipe: PartitionRecipe,
    state: TrainState,
    running: dict[str, Any],
    metrics: dict[str, Array],
) -> tuple[Any, dict[str, Array]]:
    """Set the factor of the next step in ``running``; the controller's state."""
    if recipe.controller is None:
        return state.controller, metrics
    control, factor, saturated = recipe.controller.update(
        state.controller, metrics[recipe.controller.measures], state.hyper["target"]
    )
    running["factor"] = factor
    metrics |= {"factor": factor, "saturated": saturated.astype(factor.dtype)}
    return control, metrics


def _step(
    recipe: PartitionRecipe, state: TrainState, grads: Params
) -> tuple[Params, Any]:
    """Do the step of the optimizer."""
    rate = state.hyper["learning_rate"]
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        changes, opt_state = recipe.optimizer.update(
            grads, state.opt_state, state.params
        )
        if recipe.schedule is not None:
            rate = rate * jnp.asarray(recipe.schedule(state.step), rate.dtype)
    changes = jax.tree.map(lambda x: -rate * x, changes)
    return optax.apply_updates(state.params, changes), opt_state


def _loss_inputs(
    recipe: PartitionRecipe, state: TrainState, taps: Taps, params: Params
) -> LossInputs:
    """Run the target and the importance function on a batch of a step."""
    return loss_inputs(
        recipe.decomposition,
        recipe.importance,
        state.running["target"],
        params,
        recipe.inputs_from(taps.acts),
        taps.weights,
        key=jax.random.fold_in(state.running["key"], state.step),
        progress=state.step.astype(jnp.float32) / recipe.steps,
        distance=recipe.distance,
    )


def _measure(inputs: LossInputs) -> dict[str, Array]:
    """Count components per example, and those that are alive in the batch."""
    l0 = alive = jnp.zeros(())
    for lower in inputs.lower.values():
        active = (lower > ALIVE) & (
            inputs.weights.reshape(-1, *(1,) * (lower.ndim - 1)) > 0
        )
        per_example = jnp.sum(active, axis=-1, dtype=lower.dtype)
        per_example = per_example.reshape(len(active), -1).mean(1)
        l0 = l0 + inputs.weights @ per_example
        found = jnp.any(active, axis=tuple(range(active.ndim - 1)))
        alive = alive + jnp.sum(found, dtype=lower.dtype)
    remainder = weight_error(
        inputs.decomposition, inputs.params, inputs.components, relative=True
    )
    measured = dict(zip(_MEASURED, (l0, alive, remainder), strict=True))
    return jax.lax.stop_gradient(measured)
