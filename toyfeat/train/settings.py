"""Settings and batches of a run, as its checkpoints keep them to be compared."""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.train.chunks import Feed
from toyfeat.train.step import split_learned
from toyfeat.train.types import Recipe, Trainer, TrainState
from toyfeat.types import Array, Taps

PLAIN = (
    "readouts",
    "normalize",
    "center",
    "dead_after",
    "threshold_rate",
    "revive",
)
"""Settings of a trainer that are values."""

_PROBED_STEPS = [0, *(base << shift for shift in range(20) for base in (2, 3))]
"""Steps up to 1.5 million at which schedules are compared: two for each octave."""

_RTOL = 1e-3
"""Functions that differ less are the same: rounding of another device or version."""

_BATCH_TOLERANCE = 0.02
"""Share of the largest value by which batches may differ: those that a model computes
in bfloat16, of 8 bits, differ between devices; other rows differ by about 1."""


def describe_trainer(trainer: Trainer) -> dict[str, Any]:
    """Describe a trainer's settings by JSON values.

    Functions are described by what they return: a schedule at steps, a controller and
    an optimizer for two updates.  A trainer that is not of :func:`toyfeat.trainer` has
    no settings that are known.
    """
    recipe = trainer.recipe
    if recipe is None:
        return {}
    settings = {name: getattr(recipe, name) for name in PLAIN}
    settings |= recipe.dictionary.config._asdict()
    # Functions have no values to compare but those that they return.
    settings["terms"] = [term.name for term in recipe.objective]
    controller = recipe.controller
    if controller is not None:
        settings["controller"] = [controller.term, controller.measures]
    for name, probe in _probes(recipe).items():
        # What cannot be called like that is not compared.
        settings[f"values of the {name}"] = None
        with contextlib.suppress(Exception):
            settings[f"values of the {name}"] = np.asarray(jax.jit(probe)()).tolist()
    return json.loads(json.dumps(settings))


def _probes(recipe: Recipe) -> dict[str, Callable[[], Array]]:
    """Functions that compute what describes the functions of a trainer."""
    probes: dict[str, Callable[[], Array]] = {
        "optimizer": partial(_probe_optimizer, recipe)
    }
    if recipe.schedule is not None:
        probes["schedule"] = partial(_probe_schedule, recipe.schedule)
    if recipe.controller is not None:
        probes["controller"] = partial(_probe_controller, recipe.controller)
    return probes


def _probe_schedule(schedule: Callable[[Array], Array]) -> Array:
    """Values of a schedule, ``[S]``."""
    steps = jnp.asarray(_PROBED_STEPS, jnp.int32)
    return jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(steps)


def _probe_controller(controller: Any) -> Array:
    """Factors after a metric of twice and then half the target, ``[2]``."""
    target = jnp.float32(controller.target)
    state, first, _ = controller.update(controller.init(), 2 * target, target)
    return jnp.stack([first, controller.update(state, target / 2, target)[1]])


def _probe_optimizer(recipe: Recipe) -> Array:
    """Sums of two updates of small parameters of the dictionary's names, ``[2]``."""
    shapes = jax.eval_shape(recipe.dictionary.init, jax.random.key(0))
    params = {name: jnp.ones((2,) * len(x.shape)) for name, x in shapes.items()}
    params, _ = split_learned(recipe.dictionary.architecture, params)
    state, sums = recipe.optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        # Two updates of another size and sign tell momentum and scaling apart.
        for size in (0.5, -0.25):
            grads = jax.tree.map(partial(jnp.full_like, fill_value=size), params)
            changes, state = recipe.optimizer.update(grads, state, params)
            sums.append(sum(jnp.sum(x) for x in jax.tree.leaves(changes)))
    return jnp.stack(sums)


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings that differ, with both values."""
    return [
        _format_change(name, before.get(name), now.get(name))
        for name in sorted(before | now)
        if not _same(before.get(name), now.get(name))
    ]


def _same(before: Any, now: Any) -> bool:
    """Compare JSON values; lists of floats up to rounding."""
    if not (_is_floats(before) and _is_floats(now) and len(before) == len(now)):
        return before == now
    return bool(np.allclose(before, now, rtol=_RTOL, atol=0, equal_nan=True))


def _is_floats(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, float) for x in value)


def _format_change(name: str, before: Any, now: Any) -> str:
    """Format a change; of lists the first entry that differs."""
    if _is_floats(before) and _is_floats(now) and len(before) == len(now):
        pairs = zip(before, now, strict=True)
        index = next(i for i, (x, y) in enumerate(pairs) if not _same([x], [y]))
        before, now = before[index], now[index]
        name += f" (such as number {index})"
    name = name.replace("d_in", "dim").replace("d_sae", "latents")
    return f"{name} was {before!r} and is {now!r}"


def describe_batch(feed: Feed, source: Any, step: int) -> dict[str, Any]:
    """Describe the batch of a step: its shape, and some of its values.

    Args:
      feed: of the batches.
      source: what the feed fetched for a chunk that begins at the step.
      step: of the batch.

    Returns:
      JSON values.
    """
    if feed.take is None:
        shape = source.acts.shape[1:]
        sample = _sample(jax.tree.map(lambda x: x[0], source))
    else:
        at = jnp.asarray(step, jnp.int32)
        shape = jax.eval_shape(feed.take, source, at).acts.shape
        sample = _sample_on_device(feed.take, source, at)
    values = np.asarray(sample, np.float32).tolist()
    return {"step": step, "shape": list(shape), "values": values}


@partial(jax.jit, static_argnums=0)
def _sample_on_device(take: Any, source: Any, step: Array) -> Array:
    """Take values of a batch that is made on the device."""
    return _sample(take(source, step))


def _sample(taps: Taps) -> Array:
    """Take the leading values and the weights of four examples."""
    # Spread over the batch, so that a batch in another order shows.
    num = len(taps.weights)
    rows = np.array([0, num // 3, 2 * num // 3, num - 1])
    acts = jnp.asarray(taps.acts[rows][:, :4], jnp.float32)
    weights = jnp.asarray(taps.weights[rows], jnp.float32)
    return jnp.concatenate([acts.ravel(), weights])


def check_batch(before: dict[str, Any] | None, now: dict[str, Any], where: str) -> None:
    """Raise if a batch is another one than when the checkpoint was saved.

    Raises:
      ValueError: if it has another shape or other values.
    """
    if before is None or before["step"] != now["step"]:
        return
    # Rounding of bfloat16 is relative to the largest value; another batch is farther.
    old, new = np.asarray(before["values"]), np.asarray(now["values"])
    fault = None
    if before["shape"] != now["shape"]:
        fault = f"activations {now['shape']}, not {before['shape']}"
    elif old.shape == new.shape:
        finite = old[np.isfinite(old)]
        atol = _BATCH_TOLERANCE * float(np.max(np.abs(finite), initial=0.0))
        if not np.allclose(old, new, rtol=0, atol=atol, equal_nan=True):
            fault = f"an example that begins {new[0]:.6g}, not {old[0]:.6g}"
    if fault is not None:
        raise ValueError(
            f"fit: {where} holds a run with other batches: that of step {now['step']} "
            f"has {fault}; choose another directory, give the same batches (data, seed "
            "and size), or go on with these by allow_changes=True"
        )


def check_state(trainer: Trainer, state: TrainState) -> None:
    """Raise if a state is not one of the trainer's dictionary.

    Raises:
      ValueError: if a parameter is missing or has another shape.
    """
    if trainer.recipe is None:
        return
    shapes = jax.eval_shape(trainer.recipe.dictionary.init, jax.random.key(0))
    wanted = {name: x.shape for name, x in shapes.items()}
    # A population has an axis of members in front of every shape.
    members = np.shape(state.step)
    got = {name: x.shape[len(members) :] for name, x in state.params.items()}
    for name in sorted(wanted | got):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"fit: state must be of the trainer's dictionary, with {name} "
                f"{wanted.get(name)}, got {got.get(name)}; start it with trainer.init"
            )
