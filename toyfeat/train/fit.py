"""Run the host loop of training: chunks, checkpoints, resumption."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int
from toyfeat.data.batches import Batches
from toyfeat.meshes import check_devices
from toyfeat.processes import is_global, to_host
from toyfeat.train.chunks import check_batch, describe_batch, make_feed, run_chunk
from toyfeat.train.health import (
    catch_sigterm,
    check_first_batch,
    check_members,
    check_step,
    finite_members,
    warn_of_saturation,
)
from toyfeat.train.progress import Report, open_reports
from toyfeat.train.run import (
    OnChunk,
    Run,
    Sizes,
    check_state,
    describe_trainer,
    fingerprint,
    nothing_to_finish,
    read_step,
    restore_run,
    save_run,
)
from toyfeat.train.several import (
    agreement,
    check_alike,
    check_options,
    check_same_batch,
    hold,
    reports,
    spread_rest,
)
from toyfeat.train.types import Trainer, TrainState
from toyfeat.types import Taps


def fit(
    trainer: Trainer,
    state: TrainState,
    batches: Batches | Callable[[int], Taps],
    *,
    steps: int,
    directory: str | Path | None = None,
    chunk: int = 100,
    checkpoint_every: int = 10,
    keep: int = 2,
    progress: bool = True,
    tensorboard: bool = False,
    on_chunk: OnChunk | None = None,
    resume: bool = True,
    check_data: bool = True,
    allow_changes: bool = False,
) -> TrainState:
    """Train until ``steps`` updates are done, resuming an interrupted run.

    ``state = trainer.update(state, batches(step))[0]`` for every step from
    ``state.step`` to ``steps``, in compiled chunks.  With a ``directory`` the same
    call resumes a run that was interrupted at any moment, and ends with the same bits
    as an uninterrupted one.  On SIGTERM (main thread only) the chunk is
    finished and saved, and the process exits with status 0; inside another ``fit``
    the inner one saves, and the outer one goes back to its last checkpoint.

    A state of several processes (``jax.jit(trainer.init)`` of a dictionary that
    :func:`toyfeat.dictionaries.shard` put on a mesh of all devices) is trained by all
    of them: each calls this, the first writes metrics and shows the bar, all write
    checkpoints, and SIGTERM to one stops all.

    Args:
      trainer: from :func:`toyfeat.trainer` or :func:`toyfeat.population`.
      state: the initial state, of one member or a population; it stays usable.
      batches: :func:`toyfeat.data.array_batches` or :class:`toyfeat.data.Batches`,
        made on the device inside the compiled loop, or a function of the step on the
        host that returns arrays of the same shapes at every step; it is called for
        the next chunk while the device works on this one; of several processes it
        returns arrays of all (:func:`toyfeat.data.store_batches` with ``mesh``).  If it
        has ``state()`` and
        ``restore(state)`` with JSON values, these go into checkpoints.
      steps: the total number of updates, those before the start included.
      directory: of the run, with ``checkpoint/`` and ``metrics.jsonl``, one line per
        chunk with the mean of every metric (``null`` where it is not finite) and
        whether each member is ``finite``.  One run at a time may use it.
      chunk: updates per compiled call.
      checkpoint_every: chunks between checkpoints; the last chunk is saved too.
      keep: how many checkpoints to keep, the newest ones.
      progress: show a bar, if standard error is a terminal.
      tensorboard: write ``directory/tensorboard``.
      on_chunk: called with the step, the mean of every metric and ``finite``, after
        a chunk and its checkpoint.
      resume: go on from the newest undamaged checkpoint of ``directory``, which
        replaces ``state``.  If false, the directory must not hold a run.
      check_data: look at the first batch with
        :func:`toyfeat.metrics.outlier_dims`, before the first step of a trainer of
        :func:`toyfeat.trainer`.
      allow_changes: go on although settings of the trainer or the batches are not those
        that the run had so far; hyper-parameters are always those of the run.

    Returns:
      The state after ``steps`` updates.  Members of a population that diverged stay
      in it as they are; :func:`table` marks them.

    Raises:
      FloatingPointError: if the loss or the parameters (of all members) are not
        finite; the message has the step and the last checkpoint, which is finite.
      FileExistsError: with ``resume=False`` and a directory that holds a run.
      ValueError: if sizes, shapes, the state's tree or the settings do not fit, a
        weight of the first batch is negative, all checkpoints of the directory
        are damaged, or its run had other settings or batches; in several processes
        if they have different work.
      BlockingIOError: if another call of ``fit`` uses the directory.
      TypeError: if an argument has the wrong type.
      OSError: if the disk is full; the last checkpoint is undamaged.
      ImportError: with ``tensorboard`` and without tensorboardX; in several processes
        with a ``directory`` and without orbax.

    Warns:
      UserWarning: for a damaged checkpoint that is skipped, for a directory whose run
        began from other parameters (another key), for members of a population whose
        loss is not finite, for activations whose mean or massive dimensions impede
        training, for gradients of the first batch that are all 0 or underflowed, and
        at the end for members whose controller is saturated.

    Example:
      >>> def update(state, taps):
      ...     mean = 0.9 * state.params + 0.1 * taps.acts.mean(0)
      ...     loss = ((taps.acts - mean[None, :]) ** 2).mean()
      ...     return state._replace(step=state.step + 1, params=mean), {"loss": loss}
      >>> init = lambda key: TrainState(jnp.int32(0), jnp.zeros(3), (), (), {}, {})
      >>> ones = Taps(jnp.ones((4, 3)), None, jnp.ones(4))
      >>> batches = Batches(lambda data, step: data, ones)
      >>> trainer = Trainer(init, update)
      >>> done = fit(trainer, init(jax.random.key(0)), batches, steps=50, chunk=20)
      >>> int(done.step), round(float(done.params[0]), 4)
      (50, 0.9948)
    """
    sizes = _check_sizes(
        steps=steps, chunk=chunk, checkpoint_every=checkpoint_every, keep=keep
    )
    state = _copy_state(trainer, state)
    folder = None if directory is None else _make_folder(directory)
    several = is_global(state)
    options = {"check_data": check_data, "allow_changes": allow_changes}
    if several:
        check_options(directory=folder and str(folder), resume=resume, **options)
    run = _make_run(trainer, state, batches, folder, sizes)
    run = run._replace(on_chunk=on_chunk, **options)
    if several:
        check_alike(run)
    with hold(folder, several):
        # Go on from the newest checkpoint; a run that was complete stays as it is.
        run, state = restore_run(run, state, resume)
        first = read_step(state)
        if first >= steps:
            return state
        here, agree = reports(several), agreement(several)
        shown = {"bar": progress and here, "tensorboard": tensorboard and here}
        with (
            catch_sigterm(folder is not None, agree) as came,
            open_reports(folder if here else None, first, steps, **shown) as report,
        ):
            state = _train(run, state, lambda: agree(came()), report)
    return state


def _make_run(
    trainer: Trainer,
    state: TrainState,
    batches: Batches | Callable[[int], Taps],
    folder: Path | None,
    sizes: Sizes,
) -> Run:
    """Collect the constants of a call; what tells runs apart only if it is saved."""
    saved, several = folder is not None, is_global(state)
    return Run(
        trainer=trainer,
        feed=make_feed(batches, several=several),
        folder=folder,
        hyper={name: to_host(x).tolist() for name, x in state.hyper.items()},
        sizes=sizes,
        start=fingerprint(state) if saved else None,
        settings=describe_trainer(trainer) if saved else {},
        several=several,
    )


def _make_folder(directory: str | Path) -> Path:
    """Make the folder of a run.

    Raises:
      TypeError: if the directory is not a path.
      ValueError: if it cannot be made.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"fit: directory must be a path or None, got {directory!r}; pass a str"
        )
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"fit: directory must be a folder, got {directory} ({error.strerror}); "
            "give another one"
        ) from None
    return Path(directory)


def _train(
    run: Run, state: TrainState, should_stop: Callable[[], bool], report: Report
) -> TrainState:
    """Train chunk by chunk; the next batches are fetched while the device works."""
    step, steps = read_step(state), run.sizes.steps
    warned = np.zeros(np.size(state.step), bool)
    finish_save = nothing_to_finish
    means: dict[str, np.ndarray] = {}
    began = time.perf_counter()
    next_batches = run.feed.fetch(step, _chunk_end(run, step) - step)
    _check_batches(run, state, next_batches.source, step)
    check_first_batch(run, next_batches.source, step)
    while step < steps:
        # Start the chunk.
        end = _chunk_end(run, step)
        batches = next_batches
        state, metrics, finite = _start_chunk(run, state, batches.source, step, end)
        # Fetch the next batches meanwhile.
        if end < steps:
            next_batches = run.feed.fetch(end, _chunk_end(run, end) - end)
        # Wait for the metrics, average and report them.
        metrics = {name: to_host(x) for name, x in metrics.items()}
        finite, now = to_host(finite), time.perf_counter()
        # What several processes save is written while they go on.
        finish_save()
        means = {name: _mean(x) for name, x in metrics.items()}
        means["finite"] = finite_members(metrics["loss"], finite)
        report(end, now - began, batches.num_examples / (now - began), means)
        began = now
        # Raise if nothing is left to train, before a bad state is saved.
        check_step(state, end)
        warned |= check_members(run.folder, metrics["loss"], finite, step, warned)
        # Save, call back, and stop if SIGTERM came.
        step, stop = end, should_stop()
        if stop or _is_checkpoint_due(run, step):
            finish_save = save_run(run, state, step, batches, next_batches)
        if stop or step == steps or run.on_chunk is not None:
            finish_save()
        if run.on_chunk is not None:
            run.on_chunk(step, means)
        if stop:
            return state
    warn_of_saturation(means)
    return state


def _check_batches(run: Run, state: TrainState, source: Any, step: int) -> None:
    """Raise for first batches that a state, processes or a resumed run do not share."""
    check_devices("fit", (state, source))
    check_same_batch(run, source, step)
    _check_resumed_batch(run, source, step)


def _start_chunk(
    run: Run, state: TrainState, source: Any, step: int, end: int
) -> tuple[TrainState, dict[str, Any], Any]:
    """Start the updates from ``step`` to ``end``, before the device has finished."""
    return run_chunk(
        run.trainer.update,
        run.feed.take,
        end - step,
        state,
        source,
        jnp.asarray(step, jnp.int32),
    )


def _check_resumed_batch(run: Run, source: Any, step: int) -> None:
    """Check that a resumed run gets the batch that was next when it was saved."""
    if run.next_batch is not None:
        batch = describe_batch(run.feed, source, step)
        check_batch(run.next_batch, batch, str(run.folder))


def _chunk_end(run: Run, step: int) -> int:
    """Return the step after the chunk of ``step``, a multiple of the chunk or the last.

    Chunks do not depend on the step that a run starts from, so that a resumed run has
    the same ones.
    """
    chunk = run.sizes.chunk
    return min(run.sizes.steps, (step // chunk + 1) * chunk)


def _is_checkpoint_due(run: Run, step: int) -> bool:
    """Return whether the state after ``step`` updates is to be saved."""
    period = run.sizes.chunk * run.sizes.checkpoint_every
    return step == run.sizes.steps or step % period == 0


def _check_sizes(**sizes: Any) -> Sizes:
    """Return the sizes as integers, or raise if one is not an int of at least 1."""
    ints = {n: check_int("fit", n, x, error=ValueError) for n, x in sizes.items()}
    return Sizes(**ints)


def _copy_state(trainer: Any, state: Any) -> TrainState:
    """Copy a state, so that it can be donated, to the types that a file gives back."""
    for value, kind in ((trainer, Trainer), (state, TrainState)):
        if not isinstance(value, kind):
            got = type(value).__name__
            raise TypeError(
                f"fit: wanted a {kind.__name__}, got a {got}; make it with "
                "trainer(...) and its init(key)"
            )
    # Arrays of strong types: a donated state must keep its own when a file is read.
    copy = jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype, copy=True), state)
    copy = spread_rest(copy)
    # Members count their steps together, so that one number tells where a run is.
    if (
        copy.step.ndim > 1
        or copy.step.size == 0
        or not (to_host(copy.step) == read_step(copy)).all()
    ):
        raise ValueError(
            "fit: state.step must be [], or [P] with the same step for all members, "
            f"got {to_host(copy.step)}; start it with trainer.init"
        )
    check_state(trainer, copy)
    return copy


def _mean(values: np.ndarray) -> np.ndarray:
    """Average a metric over the updates of a chunk, in double precision."""
    with np.errstate(all="ignore"):
        return np.asarray(values.astype(np.float64).mean(0))
