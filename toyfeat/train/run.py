"""A run of :func:`toyfeat.fit` and its checkpoints: saved, restored, compared.

Settings of a trainer are compared as JSON values, its functions by what they return.
"""

import contextlib
import json
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint import checkpoints, newest_checkpoint, save_checkpoint
from toyfeat.checkpoint.parallel import checksum
from toyfeat.processes import is_global, to_host
from toyfeat.train.chunks import ChunkBatches, Feed, describe_batch
from toyfeat.train.step import split_learned
from toyfeat.train.types import Recipe, Trainer, TrainState
from toyfeat.types import Array, Params

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

OnChunk = Callable[[int, dict[str, np.ndarray]], Any]


class Sizes(NamedTuple):
    """The integer arguments of :func:`fit`, each at least 1."""

    steps: int
    chunk: int
    checkpoint_every: int
    keep: int


class Run(NamedTuple):
    """The constants of a call of :func:`fit`.

    Attributes:
      trainer: as given.
      feed: of the batches.
      folder: of the run, or ``None``.
      hyper: the state's settings as JSON values.
      sizes: steps, chunk, checkpoint_every and keep.
      start: step and checksum of the parameters that the run began from, or ``None``
        without a folder.
      settings: of the trainer, as JSON values; empty without a folder.
      on_chunk: as given.
      check_data: as given.
      allow_changes: as given.
      next_batch: the first batch after the checkpoint, as it was when that was saved,
        or ``None``.
      several: whether the state is of several processes.
    """

    trainer: Trainer
    feed: Feed
    folder: Path | None
    hyper: dict[str, Any]
    sizes: Sizes
    start: dict[str, int] | None
    settings: dict[str, Any]
    on_chunk: OnChunk | None = None
    check_data: bool = True
    allow_changes: bool = False
    next_batch: dict[str, Any] | None = None
    several: bool = False


def nothing_to_finish() -> None:
    """Do nothing, where no checkpoint is being written."""


def save_run(
    run: Run,
    state: TrainState,
    step: int,
    batches: ChunkBatches,
    next_batches: ChunkBatches,
) -> Callable[[], None]:
    """Write a checkpoint, if the run has a folder.

    Returns:
      Function that waits until it is written.
    """
    if run.folder is None:
        return nothing_to_finish
    about = {
        "hyper": run.hyper,
        "batches": batches.resume_state,
        "start": run.start,
        "settings": run.settings,
    }
    # Batches of the host are not called for a step that this run does not need.
    if run.feed.take is not None or step < run.sizes.steps:
        about["next_batch"] = describe_batch(run.feed, next_batches.source, step)
    folder = run.folder / "checkpoint"
    return save_checkpoint(folder, step, state, about, keep=run.sizes.keep)


def restore_run(run: Run, state: TrainState, resume: bool) -> tuple[Run, TrainState]:
    """Load the newest checkpoint, if there is one, and restore the batches' state."""
    first, steps = read_step(state), run.sizes.steps
    if first > steps:
        raise ValueError(
            f"fit: state.step is {first}, past steps = {steps}; ask for more steps"
        )
    if run.folder is None:
        return run, state
    series, lines = run.folder / "checkpoint", run.folder / "metrics.jsonl"
    if not resume and (checkpoints(series) or lines.exists()):
        raise FileExistsError(
            f"fit: resume=False, but {run.folder} holds a run; choose another "
            "directory, or move that one away"
        )
    restored = newest_checkpoint(series, state)
    if restored is None:
        return run, state
    _check_hyper(restored.about["hyper"], run.hyper, run.folder)
    _check_settings(run, restored.about)
    _check_progress(run, restored.step, restored.about, first)
    # Batches that remember go on where they were, unless none is needed any more.
    if run.feed.restore is not None and restored.step < steps:
        run.feed.restore(json.loads(restored.about["batches"]))
    # A run that began from other parameters goes on, with a warning.
    start = restored.about.get("start", run.start)
    # Checksums of one process and of several are of two kinds.
    comparable = run.start is not None and start.keys() == run.start.keys()
    if comparable and start["step"] == first and start != run.start:
        warnings.warn(
            f"fit: {run.folder} holds a run that began from other parameters (another "
            "key, device or version), and that run goes on; choose another directory "
            "to begin from these",
            stacklevel=3,
        )
    next_batch = None if run.allow_changes else restored.about.get("next_batch")
    return run._replace(start=start, next_batch=next_batch), restored.state


def _check_progress(run: Run, step: int, about: dict[str, Any], first: int) -> None:
    """Raise if a checkpoint is not between the steps of this call, or its batches."""
    folder = f"{run.folder}/checkpoint"
    if not first <= step <= run.sizes.steps:
        raise ValueError(
            f"fit: the newest checkpoint in {folder} has step {step}, but this call "
            f"goes from step {first} to {run.sizes.steps}; choose another directory"
        )
    if (about["batches"] is None) != (run.feed.restore is None):
        held = "no state" if about["batches"] is None else "a state"
        raise ValueError(
            f"fit: the checkpoint of step {step} in {folder} holds {held} of batches, "
            "which does not fit the batches of this call"
        )


def _check_settings(run: Run, about: dict[str, Any]) -> None:
    """Raise if the trainer's settings are not those of the checkpoint."""
    # Checkpoints of earlier versions have no settings.
    if run.allow_changes or "settings" not in about:
        return
    if changes := changed_settings(about["settings"], run.settings):
        raise ValueError(
            f"fit: {run.folder} holds a run with other settings: {'; '.join(changes)}; "
            "choose another directory, give the same settings, or go on with these by "
            "allow_changes=True"
        )


def fingerprint(state: TrainState) -> dict[str, int]:
    """Compute the step and a checksum of the parameters of a state."""
    if is_global(state):
        return {"step": read_step(state), "sum": checksum(state.params)}
    # One checksum goes on over the bytes of all leaves, in the order of the tree.
    total = 0
    for leaf in jax.tree.leaves(state.params):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values = np.ascontiguousarray(leaf).reshape(-1)  # bfloat16 has no buffer
        total = zlib.crc32(values.view(np.uint8).data, total)
    return {"step": read_step(state), "crc32": total}


def _check_hyper(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise if the settings of a run differ from those of its checkpoint."""
    wrong = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(before | now)
        if repr(before.get(name)) != repr(now.get(name))
    ]
    if wrong:
        raise ValueError(
            f"fit: {folder} holds a run with other settings: {'; '.join(wrong)}; "
            "choose another directory, or the same settings"
        )


def read_step(state: TrainState) -> int:
    """Return the step of a state, which all members share."""
    return int(to_host(state.step).flat[0])


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


def describe_trainer(trainer: Trainer) -> dict[str, Any]:
    """Describe a trainer's settings by JSON values.

    Functions are described by what they return: a schedule at steps, a controller and
    an optimizer for two updates.  A trainer of your own has those of its ``settings``.
    """
    recipe = trainer.recipe
    if recipe is None:
        own = {} if trainer.settings is None else trainer.settings()
        return json.loads(json.dumps(own))
    settings = {name: getattr(recipe, name) for name in PLAIN}
    settings |= recipe.dictionary.config._asdict()
    settings["terms"] = [term.name for term in recipe.objective]
    settings |= describe_functions(recipe, partial(_small_params, recipe))
    return json.loads(json.dumps(settings))


def describe_functions(
    recipe: Any, make_params: Callable[[], Params]
) -> dict[str, Any]:
    """Describe the optimizer, schedule and controller of a recipe by what they return.

    Args:
      recipe: with these as attributes, the last two of which may be ``None``.
      make_params: returns small parameters for two updates of the optimizer.

    Returns:
      JSON values, ``None`` of what fails.
    """
    probes = {"optimizer": partial(_probe_optimizer, recipe.optimizer, make_params)}
    values: dict[str, Any] = {}
    if recipe.schedule is not None:
        probes["schedule"] = partial(_probe_schedule, recipe.schedule)
    if recipe.controller is not None:
        values["controller"] = [recipe.controller.term, recipe.controller.measures]
        probes["controller"] = partial(_probe_controller, recipe.controller)
    for name, probe in probes.items():
        # What cannot be called like that is not compared.
        values[f"values of the {name}"] = None
        with contextlib.suppress(Exception):
            values[f"values of the {name}"] = np.asarray(jax.jit(probe)()).tolist()
    return values


def _small_params(recipe: Recipe) -> Params:
    """Make small parameters of the dictionary's names."""
    shapes = jax.eval_shape(recipe.dictionary.init, jax.random.key(0))
    params = {name: jnp.ones((2,) * len(x.shape)) for name, x in shapes.items()}
    return split_learned(recipe.dictionary.architecture, params)[0]


def _probe_schedule(schedule: Callable[[Array], Array]) -> Array:
    """Values of a schedule, ``[S]``."""
    steps = jnp.asarray(_PROBED_STEPS, jnp.int32)
    return jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(steps)


def _probe_controller(controller: Any) -> Array:
    """Factors after a metric of twice and then half the target, ``[2]``."""
    target = jnp.float32(controller.target)
    state, first, _ = controller.update(controller.init(), 2 * target, target)
    return jnp.stack([first, controller.update(state, target / 2, target)[1]])


def _probe_optimizer(optimizer: Any, make_params: Callable[[], Params]) -> Array:
    """Sums of two updates of small parameters, ``[2]``."""
    params = make_params()
    state, sums = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        # Two updates of another size and sign tell momentum and scaling apart.
        for size in (0.5, -0.25):
            grads = jax.tree.map(partial(jnp.full_like, fill_value=size), params)
            changes, state = optimizer.update(grads, state, params)
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
