"""One step of training: scale, differentiate, update, count, measure."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from toyfeat.dictionary.attributions import attribution_l0, attributions, unexplained
from toyfeat.dictionary.coding import BY_BATCH
from toyfeat.dictionary.counting import number_of, smallest_positive
from toyfeat.linalg.precise import nonzero
from toyfeat.train.revival import revived
from toyfeat.train.scales import MEMORY, gradient_scale
from toyfeat.types import (
    Array,
    Controller,
    Dictionary,
    Objective,
    Params,
    Parts,
    Taps,
    TrainState,
)

_PROBED = 64  # examples on which attributions are measured
_THRESHOLD = "topk_threshold"  # of a batch top-k: averaged, not learned


class Recipe(NamedTuple):
    """What :func:`toyfeat.trainer` was given."""

    dictionary: Dictionary
    objective: Objective
    optimizer: optax.GradientTransformation
    controller: Controller | None
    readouts: int
    normalize: bool
    center: bool
    dead_after: int
    threshold_rate: float
    schedule: Callable[[Array], Array] | None
    revive: int | None = None


class Scaled(NamedTuple):
    """A batch in scaled units; the weights sum to 1."""

    acts: Array
    target: Array
    grads: Array | None
    weights: Array


def learned(params: Params) -> tuple[Params, Params]:
    """Parameters that have a gradient, and the others."""
    rest = {name: x for name, x in params.items() if name == _THRESHOLD}
    return {name: x for name, x in params.items() if name != _THRESHOLD}, rest


def recipe_of(update: Any) -> Recipe | None:
    """What an update was made of, or ``None`` if it is another's."""
    while isinstance(update, partial) and update.args:
        update = update.args[0]
    return update if isinstance(update, Recipe) else None


def update(
    recipe: Recipe, state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Array]]:
    """``(state, taps) -> (state, metrics)`` of a recipe."""
    _check(recipe, taps)
    state, batch = _scaled(recipe, state, taps)
    (total, (parts, values)), slopes = _slopes(recipe, state, batch)
    norm = optax.tree.norm(slopes)
    slopes = jax.tree.map(partial(_clipped, state.hyper["clip"]), slopes)
    mine, rest = learned(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        changes, opt_state = recipe.optimizer.update(slopes, state.opt_state, mine)
    if recipe.schedule is not None:
        pace = jnp.asarray(recipe.schedule(state.step), norm.dtype)
        changes = jax.tree.map(lambda x: pace * x, changes)
    params: Params = optax.apply_updates(mine, changes)
    params = _allowed(params) | _averaged(recipe, parts, rest)
    metrics = {"loss": total, **values, **_measured(parts), "grad_norm": norm}
    running, effects = _counted(state, parts)
    metrics |= effects | {"dead": jnp.sum(running["silent"] >= recipe.dead_after)}
    control, running, told = _steered(recipe, state, running, metrics)
    step = state.step + 1
    next_state = TrainState(step, params, opt_state, control, running, state.hyper)
    if recipe.revive is not None:
        often = {"every": recipe.revive, "dead_after": recipe.dead_after}
        next_state, more = revived(parts, next_state, **often)
        metrics |= more
    return next_state, metrics | told


def _slopes(recipe: Recipe, state: TrainState, batch: Scaled) -> Any:
    """Loss, what it was made of, and its gradient."""
    mine, rest = learned(state.params)
    coefficients = _coefficients(recipe, state)
    dead = state.running["silent"] >= recipe.dead_after
    by_batch = recipe.dictionary.config.architecture in BY_BATCH
    more = {"weights": batch.weights} if by_batch else {}
    seen = 1 - MEMORY ** state.step.astype(batch.weights.dtype)
    square = state.running["attribution_square"]
    known = (seen > 0) & (square > 0)
    scale = jnp.sqrt(jnp.where(known, square / jnp.where(known, seen, 1), 1))

    def loss(mine: dict[str, Array]) -> tuple[Array, tuple[Parts, dict[str, Array]]]:
        params = {**mine, **rest}
        out = recipe.dictionary.forward(
            params, batch.acts, grads=batch.grads, k=state.hyper.get("k"), **more
        )
        parts = Parts(
            recipe.dictionary,
            params,
            batch.acts,
            batch.target,
            out,
            batch.grads,
            batch.weights,
            dead,
            scale,
            coefficients,
        )
        values = {term.name: term.loss(parts) for term in recipe.objective}
        total = sum(coefficients[name] * value for name, value in values.items())
        return jnp.asarray(total), (parts, values)

    return jax.value_and_grad(loss, has_aux=True)(mine)


def _coefficients(recipe: Recipe, state: TrainState) -> dict[str, Array]:
    """Of every term, with the warm-up and the controller in them."""
    steps = state.hyper["warm_up"]
    warm = jnp.minimum(state.step.astype(steps.dtype) / jnp.maximum(steps, 1), 1)
    warm = jnp.where(steps > 0, warm, jnp.ones_like(warm))
    steered = "" if recipe.controller is None else recipe.controller.term
    values = {}
    for term in recipe.objective:
        value = state.hyper[term.name]
        value = value * warm if term.warm_up else value
        if term.name == steered:
            value = value * state.running["factor"]
        values[term.name] = value
    return values


def _steered(
    recipe: Recipe,
    state: TrainState,
    running: dict[str, Array],
    metrics: dict[str, Array],
) -> tuple[Any, dict[str, Array], dict[str, Array]]:
    """The controller's next state, after the warm-up, and what it says."""
    controller = recipe.controller
    if controller is None:
        return state.controller, running, {}
    measured = metrics[controller.measures]
    after, factor, saturated = controller.update(
        state.controller, measured, state.hyper["target"]
    )
    begun = state.step >= state.hyper["warm_up"].astype(state.step.dtype)
    kept = jax.tree.map(partial(jnp.where, begun), after, state.controller)
    factor = jnp.where(begun, factor, running["factor"])
    told = {"factor": factor, "saturated": (saturated & begun).astype(factor.dtype)}
    return kept, {**running, "factor": factor}, told


def _scaled(recipe: Recipe, state: TrainState, taps: Taps) -> tuple[TrainState, Scaled]:
    """The batch in units of its own size, which are recorded."""
    acts, grads = taps.acts, taps.grads
    target = acts if taps.targets is None else taps.targets
    weights = taps.weights / jnp.maximum(jnp.sum(taps.weights), 1e-30)
    acts, target = _counting(acts, weights), _counting(target, weights)
    running, params = dict(state.running), dict(state.params)
    first = ~running["begun"]  # up to the first batch that varies
    running["begun"] = running["begun"] | _varies(acts, weights)
    if recipe.normalize:
        scale = jnp.where(first, _size(acts, weights), running["acts_scale"])
        other = scale  # where one b_dec is in the units of both
        if recipe.dictionary.config.d_out is not None:
            other = jnp.where(first, _size(target, weights), running["target_scale"])
        running["acts_scale"], running["target_scale"] = scale, other
        acts, target = acts / scale, target / other
    if recipe.center:
        params["b_dec"] = jnp.where(first, weights @ target, params["b_dec"])
    if grads is not None:
        grads = _counting(jax.lax.stop_gradient(grads), weights)
        if recipe.normalize:
            most, unit = jnp.max(jnp.abs(grads), axis=(0, 2)), running["grads_unit"]
            unit = jnp.where(unit > 0, unit, most)  # of the first that is not 0
            relative = grads / nonzero(unit)[None, :, None]
            square = jnp.einsum("n,nkd->k", weights, relative**2) / grads.shape[2]
            square = MEMORY * running["grads_square"] + (1 - MEMORY) * square
            running |= {"grads_unit": unit, "grads_square": square}
            size = gradient_scale(square, jnp.ones_like(unit), state.step + 1)
            grads = relative / size[None, :, None]
    state = state._replace(running=running, params=params)
    return state, Scaled(acts, target, grads, weights)


def _counting(values: Array, weights: Array) -> Array:
    """0 in place of what has no weight, which may be anything."""
    there = (weights > 0).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(there, values, jnp.zeros_like(values))


def _varies(values: Array, weights: Array) -> Array:
    """Whether examples that have weight differ."""
    first = values[jnp.argmax(weights > 0)]
    return jnp.any((values != first[None, :]) & (weights > 0)[:, None])


def _size(values: Array, weights: Array) -> Array:
    """Root mean square entry after centring; 1 if that is 0."""
    centred = values - (weights @ values)[None, :]
    there = jnp.where(weights[:, None] > 0, jnp.abs(centred), 0)
    most = jnp.max(there)  # squares of what is small or large are not finite
    most = jnp.where(most > 0, most, jnp.ones_like(most))
    square = weights @ jnp.mean((there / most) ** 2, axis=1)
    return most * jnp.sqrt(jnp.where(square > 0, square, jnp.ones_like(square)))


def _clipped(most: Array, slope: Array) -> Array:
    norm = jnp.linalg.norm(slope)
    return slope * jnp.minimum(1, most / jnp.maximum(norm, 1e-30))


def _allowed(params: Params) -> Params:
    """A threshold below 0 would count codes that are 0."""
    if "threshold" not in params:
        return params
    return {**params, "threshold": jnp.maximum(params["threshold"], 0)}


def _averaged(recipe: Recipe, parts: Parts, rest: Params) -> Params:
    """A batch top-k's threshold follows the smallest code that was kept."""
    if recipe.dictionary.config.architecture not in BY_BATCH:
        return rest
    old = rest[_THRESHOLD]
    low = smallest_positive(parts.out.codes * jnp.sign(parts.weights)[:, None])
    new = old + recipe.threshold_rate * (low - old)
    return {_THRESHOLD: jnp.where(jnp.isfinite(low), new, old)}


def _counted(
    state: TrainState, parts: Parts
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Running statistics, and what they say about attributions."""
    out, running = parts.out, dict(state.running)
    there = (out.values != 0) & (parts.weights > 0)[:, None]
    if out.index is None:
        fired = jnp.any(there, axis=0)
    else:
        fired = jnp.zeros(len(running["silent"]), bool).at[out.index].max(there)
    running["silent"] = jnp.where(fired, 0, running["silent"] + 1)
    if parts.grads is None:
        return running, {}
    few = _first(parts)
    weights = few.weights / jnp.maximum(jnp.sum(few.weights), 1e-30)
    sizes = attributions(few) * jnp.sign(few.weights)[:, None, None]
    latents = parts.dictionary.config.d_sae
    count, share = attribution_l0(sizes, unexplained(few), latents)
    active = jnp.maximum(jnp.sum(sizes != 0), 1).astype(sizes.dtype)
    square = jnp.sum(sizes**2) / active
    old = running["attribution_square"]
    running["attribution_square"] = MEMORY * old + (1 - MEMORY) * square
    effects = {
        "attribution_l0": weights @ jnp.mean(count, axis=1),
        "unexplained_share": weights @ jnp.mean(share, axis=1),
    }
    return running, effects


def _first(parts: Parts) -> Parts:
    """The first few examples of a batch that count."""
    few = min(_PROBED, len(parts.weights))
    _, here = jax.lax.top_k(jnp.sign(parts.weights), few)
    rows = {"acts", "target", "grads", "weights"}
    kept = {name: getattr(parts, name)[here] for name in rows}
    return parts._replace(out=jax.tree.map(lambda x: x[here], parts.out), **kept)


def _measured(parts: Parts) -> dict[str, Array]:
    """Codes per example and the share of the variance that is left."""
    weights, target = parts.weights, parts.target
    there = number_of(parts.out.values != 0).astype(target.dtype)
    centred = target - (weights @ target)[None, :]
    whole = jnp.sum(weights * jnp.sum(centred**2, axis=1))
    rest = jnp.sum(weights * jnp.sum((target - parts.out.recon) ** 2, axis=1))
    return {"l0": weights @ there, "fvu": rest / jnp.maximum(whole, 1e-30)}


def _check(recipe: Recipe, taps: Taps) -> None:
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
    wanted = (num, recipe.readouts, out)
    if taps.grads is not None and taps.grads.shape != wanted:
        raise ValueError(
            f"update: wanted gradients {wanted}, got {taps.grads.shape}; the trainer "
            f"was made with readouts={recipe.readouts}"
        )
