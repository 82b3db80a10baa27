"""Training on arrays of several processes: one of them reports, and all agree."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from toyfeat.checkpoint.parallel import check_orbax
from toyfeat.files.paths import locked
from toyfeat.meshes import copy_everywhere
from toyfeat.processes import (
    check_same,
    gather,
    is_global,
    process_index,
    together,
    versions,
)
from toyfeat.train.chunks import describe_batch
from toyfeat.train.run import Run, changed_settings, describe_trainer
from toyfeat.train.types import TrainState

_ADVICE = "give all of them the same job and the same versions"
_RTOL = 1e-3  # of batches, as other machines round differently


def spread_rest(state: TrainState) -> TrainState:
    """Lay out what is of one process alone as what is of all, if there is any.

    Such leaves must have the same values in every process.
    """
    if not is_global(state):
        return state
    meshes = {
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(state)
        if is_global(leaf) and isinstance(leaf.sharding, NamedSharding)
    }
    if len(meshes) != 1:
        raise ValueError(
            f"fit: arrays of several processes must be on one mesh, got {len(meshes)}; "
            "start the state by jax.jit(trainer.init) of a dictionary that knows its "
            "mesh (toyfeat.dictionaries.shard)"
        )
    return copy_everywhere(state, meshes.pop())


@contextlib.contextmanager
def hold(folder: Path | None, several: bool) -> Iterator[None]:
    """Hold the lock of a folder of a run, in the first of several processes.

    Warnings of the others are not shown, as they are the same.

    Raises:
      BlockingIOError: if another run uses it; in the other processes a ProcessError.
    """
    with contextlib.ExitStack() as stack:
        with together("fit") if several else contextlib.nullcontext():
            if folder is not None and reports(several):
                stack.enter_context(locked(folder, "fit"))
        if not reports(several):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)
        yield


def reports(several: bool) -> bool:
    """Tell whether this process writes metrics and shows the bar."""
    return not several or process_index() == 0


def agreement(several: bool) -> Callable[[bool], bool]:
    """Make a function that all processes call: whether something is true for any."""
    return (lambda here: any(gather(here))) if several else bool


def check_options(**options: Any) -> None:
    """Raise in all processes if they call ``fit`` with other options.

    Before anything else that they do together: what one of them leaves out, the others
    would wait for.
    """
    check_same("fit", options, _ADVICE)


def check_alike(run: Run) -> None:
    """Raise in all processes if they were started with different work.

    Raises:
      ValueError: with what differs.
      ImportError: if checkpoints are wanted and orbax is missing.
    """
    with together("fit"):
        if run.folder is not None:
            check_orbax("fit")
    kind = "of the host" if run.feed.take is None else "of the device"
    values = {"versions": versions(), "hyper-parameters": run.hyper}
    values |= {"kind of batches": kind} | run.sizes._asdict()
    check_same("fit", values, _ADVICE)
    every = gather(describe_trainer(run.trainer))
    for index, settings in enumerate(every):
        if changes := changed_settings(every[0], settings):
            raise ValueError(
                f"fit: all processes must have the same settings, but from process 0 "
                f"to process {index} {'; '.join(changes)}; {_ADVICE}"
            )


def check_same_batch(run: Run, source: Any, step: int) -> None:
    """Raise in all processes if batches of the device are not the same in each.

    Those of the host are global arrays and cannot differ.

    Raises:
      ValueError: if shape or values differ.
    """
    if not run.several or run.feed.take is None:
        return
    every = gather(describe_batch(run.feed, source, step))
    for index, batch in enumerate(every):
        same = batch["shape"] == every[0]["shape"]
        pair = batch["values"], every[0]["values"]
        if not same or not np.allclose(*pair, rtol=_RTOL, equal_nan=True):
            raise ValueError(
                f"fit: batches must be the same in all processes, but that of step "
                f"{step} differs between process 0 and process {index}; give all the "
                "same data and seed"
            )
