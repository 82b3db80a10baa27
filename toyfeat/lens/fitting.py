"""Fit a lens over many prompts, with progress, and go on where a run was stopped."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from toyfeat.checkpoint import newest_checkpoint, save_checkpoint
from toyfeat.checks import check_function, check_int, check_type
from toyfeat.lens.fits import JacobianState
from toyfeat.lens.model import LensModel, check_model
from toyfeat.meshes import check_devices, copy_everywhere, device_mesh, everywhere
from toyfeat.processes import to_host
from toyfeat.types import Accumulator, Inputs, Params

_KEEP = 2  # checkpoints: the newest, and the one before in case that is damaged


class FitProgress(NamedTuple):
    """Progress of a fit.

    Attributes:
      step: batches that are done.
      steps: batches in all.
      prompts: prompts so far.
      state: so far; ``accumulator.finish(state)`` is the estimate up to here.  ``None``
        of a lens that is trained.
    """

    step: int
    steps: int
    prompts: int
    state: JacobianState | None = None


def fit(
    model: LensModel,
    accumulator: Accumulator,
    params: Params,
    batches: Sequence[tuple[Inputs, Any]],
    *,
    directory: str | Path | None = None,
    checkpoint_every: int = 10,
    on_progress: Callable[[FitProgress], Any] = lambda progress: None,
) -> JacobianState:
    """Accumulate batches of prompts; the same call goes on where it was stopped.

    Args:
      model: the model that the accumulator was made for; it is checked first
        (:func:`check_model`).
      accumulator: of :func:`mean_jacobian` or :func:`second_moment`.
      params: parameters of the model.
      batches: ``(inputs, mask)`` by index, ``mask [B, T]`` or ``None``; batches of one
        shape share one compiled program.  Prompts may be split over a mesh of devices,
        also of several processes, all of which then call this.
      directory: for checkpoints, or ``None``.  A fit of another model or of other
        batches needs another directory.
      checkpoint_every: batches between checkpoints; the last batch is saved too.
      on_progress: called with :class:`FitProgress` as often and after the last batch,
        also without a directory.

    Returns:
      The state; ``accumulator.finish`` makes the estimate of it, ``accumulator.merge``
      joins it with that of other shards.

    Raises:
      ValueError: if there are no batches, the model cannot have a lens, a prompt is
        not longer than what is skipped, parameters and prompts lie on different
        devices, or the directory has another fit.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> def double(params, x, tap):
      ...     return tap("b", 2 * tap("a", x))
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(double), sites=["a", "b"], unembed=lambda p, h: h
      ... )
      >>> acc = ft.lenses.mean_jacobian(model, 1, skip_first=0, skip_last=0)
      >>> state = fit(model, acc, {}, [(jnp.ones((2, 3, 1)), None)] * 4)
      >>> int(state.prompts), acc.finish(state).matrices["a"].tolist()
      (8, [[2.0]])
    """
    who = "lenses.fit"
    check_type(who, "accumulator", accumulator, Accumulator, hint="of mean_jacobian")
    check_function(who, "on_progress", on_progress, "of FitProgress")
    checkpoint_every = check_int(who, "checkpoint_every", checkpoint_every)
    steps = len(batches)
    if not steps:
        raise ValueError(
            f"{who}: batches must be one (inputs, mask) or more, got none; give prompts"
        )
    check_devices(who, (params, batches))
    check_model(model, params, batches[0][0])
    mesh = device_mesh((params, batches[0]))
    state, done = _start_or_go_on(accumulator, mesh, directory)
    where = None if mesh is None else everywhere(mesh)
    update = jax.jit(accumulator.update, out_shardings=where)
    expected = int(state.prompts)
    for step in range(done, steps):
        inputs, mask = batches[step]
        state = update(state, params, inputs, mask)
        expected += _count_prompts(inputs, mask)
        # Wait for the device only where it tells or saves.
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            _check_counted(who, int(state.prompts), expected)
            if directory is not None:
                about = {"start": "lens"}
                save_checkpoint(Path(directory), step + 1, state, about, keep=_KEEP)()
            on_progress(FitProgress(step + 1, steps, int(state.prompts), state))
    return state


def _start_or_go_on(
    accumulator: Accumulator, mesh: Any, directory: str | Path | None
) -> tuple[JacobianState, int]:
    """Make a state, or read the newest checkpoint; on a mesh it is on every device."""
    state = accumulator.init()
    if mesh is not None:
        state = copy_everywhere(state, mesh)
    if directory is not None:
        restored = newest_checkpoint(Path(directory), state)
        if restored is not None:
            return restored.state, restored.step
    return state, 0


def _count_prompts(inputs: Inputs, mask: Any) -> int:
    """Count the prompts of a batch that have a token."""
    if mask is None:
        return jax.tree.leaves(inputs)[0].shape[0]
    return int(np.any(to_host(mask) != 0, axis=1).sum())


def _check_counted(who: str, counted: int, expected: int) -> None:
    """Raise if prompts had no position that counts."""
    if counted < expected:
        raise ValueError(
            f"{who}: every prompt must be longer than the positions that are skipped, "
            f"got {expected - counted} of {expected} that are not; leave them out, or "
            "skip less with skip_first and skip_last"
        )
