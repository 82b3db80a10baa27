"""One step of training: normalize, differentiate, update, count, measure."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from toyfeat.dictionary.attributions import (
    attribution_l0,
    attributions,
    unexplained_effect,
)
from toyfeat.dictionary.selection import number_of, smallest_positive
from toyfeat.dictionary.shards import run_automatic, sharding
from toyfeat.dictionary.types import Architecture, Inputs
from toyfeat.train.normalization import (
    LEAST,
    MEMORY,
    NormalizedBatch,
    normalize_batch,
)
from toyfeat.train.placement import place_state, run_update, state_shardings
from toyfeat.train.revival import revive_dead
from toyfeat.train.types import Recipe, TrainState
from toyfeat.types import Array, Params, Taps

_PROBED = 64
"""Examples on which attributions are measured: a mean over them is enough for a
controller, which averages over steps, and cheap beside a batch of thousands."""


def split_learned(architecture: Architecture, params: Params) -> tuple[Params, Params]:
    """Split parameters into those with a gradient and those that are averaged."""
    averaged = architecture.averaged_threshold
    learned = {name: x for name, x in params.items() if name != averaged}
    return learned, {name: x for name, x in params.items() if name == averaged}


def update(
    recipe: Recipe, state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Array]]:
    """Do one update, ``(state, taps) -> (state, metrics)``."""
    _check(recipe, taps)
    split, architecture = recipe.dictionary.split, recipe.dictionary.architecture
    if split is None:
        return run_update(partial(_update, recipe), state, taps)
    # On a mesh the next state lies where the last one does, metrics everywhere.
    shardings = state_shardings(split, architecture, state), sharding(split)
    return run_automatic(split, partial(_update, recipe), shardings, state, taps)


def _update(
    recipe: Recipe, state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Array]]:
    """Do one update where products need no sharding of their results."""
    architecture = recipe.dictionary.architecture
    # Loss and gradients of the batch in normalized units.
    state, batch = normalize_batch(recipe, state, taps)
    (total, (inputs, losses)), grads = _loss_and_grads(recipe, state, batch)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(partial(_clip, state.hyper["clip"]), grads)
    # Step of the optimizer; what is not learned is averaged.
    learned, averaged = split_learned(architecture, state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        changes, opt_state = recipe.optimizer.update(grads, state.opt_state, learned)
    if recipe.schedule is not None:
        pace = jnp.asarray(recipe.schedule(state.step), norm.dtype)
        changes = jax.tree.map(lambda x: pace * x, changes)
    params: Params = optax.apply_updates(learned, changes)
    params = _clip_thresholds(architecture, params)
    params |= _average_threshold(recipe, inputs, averaged)
    # Metrics, and counts of how long each latent has been silent.
    metrics = {"loss": total, **losses, **_batch_metrics(inputs), "grad_norm": norm}
    running, effects = _update_counts(state, inputs)
    metrics |= effects | {"dead": jnp.sum(running["silent"] >= recipe.dead_after)}
    # The controller sets the factor of the next step.
    control, running, control_metrics = _run_controller(recipe, state, running, metrics)
    next_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        controller=control,
        running=running,
        hyper=state.hyper,
    )
    # Dead latents start again.
    if recipe.revive is not None:
        next_state, revival_metrics = revive_dead(
            inputs, next_state, every=recipe.revive, dead_after=recipe.dead_after
        )
        metrics |= revival_metrics
    next_state = place_state(recipe.dictionary, next_state)
    return next_state, metrics | control_metrics


def _loss_and_grads(recipe: Recipe, state: TrainState, batch: NormalizedBatch) -> Any:
    """Compute the loss with its inputs and terms, and its gradient."""
    learned, averaged = split_learned(recipe.dictionary.architecture, state.params)
    coefficients = _coefficients(recipe, state)
    dead = state.running["silent"] >= recipe.dead_after
    # The usual size of an attribution: 1 before the first, then a running mean, whose
    # weights sum to 1 - MEMORY**step.
    weight = 1 - MEMORY ** state.step.astype(batch.weights.dtype)
    square = state.running["attribution_square"]
    known = (weight > 0) & (square > 0)
    scale = jnp.sqrt(jnp.where(known, square / jnp.where(known, weight, 1), 1))

    def loss(learned: Params) -> tuple[Array, tuple[Inputs, dict[str, Array]]]:
        params = {**learned, **averaged}
        out = recipe.dictionary.forward(
            params,
            batch.acts,
            grads=batch.grads,
            k=state.hyper.get("k"),
            weights=batch.weights,
        )
        inputs = Inputs(
            dictionary=recipe.dictionary,
            params=params,
            acts=batch.acts,
            target=batch.target,
            out=out,
            grads=batch.grads,
            weights=batch.weights,
            dead=dead,
            scale=scale,
            coefficients=coefficients,
            unit=batch.unit,
            effect_units=batch.effect_units,
            context=batch.context,
        )
        # Terms without their coefficients are metrics; their weighted sum is the loss.
        losses = {term.name: term.loss(inputs) for term in recipe.objective}
        total = sum(coefficients[name] * value for name, value in losses.items())
        return jnp.asarray(total), (inputs, losses)

    return jax.value_and_grad(loss, has_aux=True)(learned)


def _coefficients(recipe: Recipe, state: TrainState) -> dict[str, Array]:
    """Coefficient of every term, with warm-up and controller applied."""
    steps = state.hyper["warm_up"]
    warm = jnp.minimum(state.step.astype(steps.dtype) / jnp.maximum(steps, 1), 1)
    warm = jnp.where(steps > 0, warm, jnp.ones_like(warm))
    controlled = "" if recipe.controller is None else recipe.controller.term
    values = {}
    for term in recipe.objective:
        value = state.hyper[term.name]
        value = value * warm if term.warm_up else value
        if term.name == controlled:
            value = value * state.running["factor"]
        values[term.name] = value
    return values


def _run_controller(
    recipe: Recipe,
    state: TrainState,
    running: dict[str, Array],
    metrics: dict[str, Array],
) -> tuple[Any, dict[str, Array], dict[str, Array]]:
    """Run the controller after the warm-up: its state, the factor, its metrics."""
    controller = recipe.controller
    if controller is None:
        return state.controller, running, {}
    if controller.measures not in metrics:
        raise ValueError(
            f"update: the controller reads the metric {controller.measures!r}, got "
            f"{', '.join(sorted(metrics))}; attribution_l0 needs taps with gradients"
        )
    measured = metrics[controller.measures]
    after, factor, saturated = controller.update(
        state.controller, measured, state.hyper["target"]
    )
    # During the warm-up the coefficient is not its own yet: the controller waits.
    begun = state.step >= state.hyper["warm_up"].astype(state.step.dtype)
    control = jax.tree.map(partial(jnp.where, begun), after, state.controller)
    factor = jnp.where(begun, factor, running["factor"])
    saturated = (saturated & begun).astype(factor.dtype)
    running = {**running, "factor": factor}
    return control, running, {"factor": factor, "saturated": saturated}


def _clip(limit: Array, grad: Array) -> Array:
    """Shorten a gradient that is longer than the limit."""
    norm = jnp.linalg.norm(grad)
    return grad * jnp.minimum(1, limit / jnp.maximum(norm, LEAST))


def _clip_thresholds(architecture: Architecture, params: Params) -> Params:
    """Cut tensors off at 0 that must not be negative."""
    return {
        name: jnp.maximum(x, 0) if name in architecture.nonnegative else x
        for name, x in params.items()
    }


def _average_threshold(recipe: Recipe, inputs: Inputs, averaged: Params) -> Params:
    """Move a threshold that is not learned towards the smallest code of the batch."""
    name = recipe.dictionary.architecture.averaged_threshold
    if name is None:
        return averaged
    old = averaged[name]
    # Codes of examples without weight are not counted.
    low = smallest_positive(inputs.out.codes * jnp.sign(inputs.weights)[:, None])
    new = old + recipe.threshold_rate * (low - old)
    return {name: jnp.where(jnp.isfinite(low), new, old)}


def _update_counts(
    state: TrainState, inputs: Inputs
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Update the running statistics, and measure attributions."""
    out, running = inputs.out, dict(state.running)
    # Steps since each latent fired.
    active = (out.values != 0) & (inputs.weights > 0)[:, None]
    if out.index is None:
        fired = jnp.any(active, axis=0)
    else:
        fired = jnp.zeros(len(running["silent"]), bool).at[out.index].max(active)
    running["silent"] = jnp.where(fired, 0, running["silent"] + 1)
    if inputs.grads is None:
        return running, {}
    # Attributions of a sample of the batch.
    sample = _first_weighted(inputs, _PROBED)
    weights = sample.weights / jnp.maximum(jnp.sum(sample.weights), LEAST)
    sizes = attributions(sample) * jnp.sign(sample.weights)[:, None, None]
    latents = inputs.dictionary.config.d_sae
    count, share = attribution_l0(sizes, unexplained_effect(sample), latents)
    # Their mean square, of those that are not 0.
    num_active = jnp.maximum(jnp.sum(sizes != 0), 1).astype(sizes.dtype)
    square = jnp.sum(sizes**2) / num_active
    old = running["attribution_square"]
    running["attribution_square"] = MEMORY * old + (1 - MEMORY) * square
    effects = {
        "attribution_l0": weights @ jnp.mean(count, axis=1),
        "unexplained_share": weights @ jnp.mean(share, axis=1),
    }
    return running, effects


def _first_weighted(inputs: Inputs, num: int) -> Inputs:
    """Take the first ``num`` examples of a batch that have weight."""
    num = min(num, len(inputs.weights))
    _, index = jax.lax.top_k(jnp.sign(inputs.weights), num)
    fields = ("acts", "target", "grads", "weights")
    sample = {name: getattr(inputs, name)[index] for name in fields}
    return inputs._replace(out=jax.tree.map(lambda x: x[index], inputs.out), **sample)


def _batch_metrics(inputs: Inputs) -> dict[str, Array]:
    """Codes per example, and the share of the variance that is not explained."""
    weights, target = inputs.weights, inputs.target
    split = inputs.dictionary.split
    counts = number_of(inputs.out.values != 0, split).astype(target.dtype)
    centred = target - (weights @ target)[None, :]
    variance = jnp.sum(weights * jnp.sum(centred**2, axis=1))
    error = jnp.sum(weights * jnp.sum((target - inputs.out.recon) ** 2, axis=1))
    return {"l0": weights @ counts, "fvu": error / jnp.maximum(variance, LEAST)}


def _check(recipe: Recipe, taps: Taps) -> None:
    """Check shapes of taps against the dictionary, and gradients against the terms."""
    config = recipe.dictionary.config
    if taps.acts.ndim != 2 or taps.acts.shape[1] != config.d_in:
        raise ValueError(
            f"update: wanted taps with acts [N, {config.d_in}], got {taps.acts.shape}"
        )
    num, out = len(taps.acts), config.d_in if config.d_out is None else config.d_out
    if taps.weights.shape != (num,):
        raise ValueError(f"update: wanted weights [{num}], got {taps.weights.shape}")
    if config.d_out is not None and taps.targets is None:
        raise ValueError(
            f"update: a transcoder needs taps with targets [N, {out}], got none"
        )
    if taps.targets is not None and taps.targets.shape != (num, out):
        raise ValueError(
            f"update: wanted targets [{num}, {out}], got {taps.targets.shape}"
        )
    names = [term.name for term in recipe.objective if term.needs_grads]
    if names and taps.grads is None:
        raise ValueError(f"update: {names} need taps with gradients, got none")
    # Gradients are those by what is written, the target.
    wanted = (num, recipe.readouts, out)
    if taps.grads is not None and taps.grads.shape != wanted:
        raise ValueError(
            f"update: wanted gradients {wanted}, got {taps.grads.shape}; the trainer "
            f"was made with readouts={recipe.readouts}"
        )
