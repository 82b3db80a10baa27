"""Run the host loop of training: chunks, checkpoints, resumption."""

import json
import operator
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint import checkpoints, newest_checkpoint, save_checkpoint
from toyfeat.data.batches import Batches
from toyfeat.tap.checks import warn_of_lost_grads
from toyfeat.train.chunks import Feed, make_feed, run_chunk
from toyfeat.train.health import (
    catch_sigterm,
    check_members,
    finite_members,
    warn_of_saturation,
)
from toyfeat.train.outliers import warn_of_outliers
from toyfeat.train.progress import Report, open_reports
from toyfeat.train.types import Trainer, TrainState
from toyfeat.types import Taps

OnChunk = Callable[[int, dict[str, np.ndarray]], Any]


class _Sizes(NamedTuple):
    """The integer arguments of :func:`fit`, each at least 1."""

    steps: int
    chunk: int
    checkpoint_every: int
    keep: int


class _Run(NamedTuple):
    """The constants of a call of :func:`fit`.

    Attributes:
      trainer: as given.
      feed: of the batches.
      folder: of the run, or ``None``.
      hyper: the state's settings as JSON values.
      sizes: steps, chunk, checkpoint_every and keep.
      on_chunk: as given.
      check_data: as given.
      start: step and checksum of the parameters that the run began from, or ``None``
        without a folder.
    """

    trainer: Trainer
    feed: Feed
    folder: Path | None
    hyper: dict[str, Any]
    sizes: _Sizes
    on_chunk: OnChunk | None
    check_data: bool
    start: dict[str, int] | None


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
) -> TrainState:
    """Train until ``steps`` updates are done, resuming an interrupted run.

    ``state = trainer.update(state, batches(step))[0]`` for every step from
    ``state.step`` to ``steps``, in compiled chunks.  With a ``directory`` the same
    call resumes a run that was interrupted at any moment, and ends with the same bits
    as an uninterrupted one.  On SIGTERM (main thread only) the chunk is
    finished and saved, and the process exits with status 0; inside another ``fit``
    the inner one saves, and the outer one goes back to its last checkpoint.

    Args:
      trainer: from :func:`toyfeat.trainer` or :func:`toyfeat.population`.
      state: the initial state, of one member or a population; it stays usable.
      batches: :func:`toyfeat.data.array_batches` or :class:`toyfeat.data.Batches`,
        made on the device inside the compiled loop, or a function of the step on the
        host that returns arrays of the same shapes at every step; it is called for
        the next chunk while the device works on this one.  If it has ``state()`` and
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
        replaces ``state``; whether the batches are the same is not checked.  If
        false, the directory must not hold a run.
      check_data: look at the first batch with
        :func:`toyfeat.metrics.outlier_dims`, before the first step of a trainer of
        :func:`toyfeat.trainer`.

    Returns:
      The state after ``steps`` updates.  Members of a population that diverged stay
      in it as they are; :func:`table` marks them.

    Raises:
      FloatingPointError: if the loss or the parameters (of all members) are not
        finite; the message has the step and the last checkpoint, which is finite.
      FileExistsError: with ``resume=False`` and a directory that holds a run.
      ValueError: if sizes, shapes, the state's tree or the settings do not fit, a
        weight of the first batch is negative, or all checkpoints of the directory
        are damaged.
      TypeError: if an argument has the wrong type.
      OSError: if the disk is full; the last checkpoint is undamaged.
      ImportError: with ``tensorboard`` and without tensorboardX.

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
    folder = None if directory is None else Path(directory)
    run = _Run(
        trainer=trainer,
        feed=make_feed(batches),
        folder=folder,
        hyper={name: np.asarray(x).tolist() for name, x in state.hyper.items()},
        sizes=sizes,
        on_chunk=on_chunk,
        check_data=check_data,
        start=None if folder is None else _fingerprint(state),
    )
    run, state = _restore(run, state, resume)
    first = _read_step(state)
    if first >= steps:
        return state
    reports = {"bar": progress, "tensorboard": tensorboard}
    with (
        catch_sigterm(folder is not None) as should_stop,
        open_reports(folder, first, steps, **reports) as report,
    ):
        return _train(run, state, should_stop, report)


def _train(
    run: _Run, state: TrainState, should_stop: Callable[[], bool], report: Report
) -> TrainState:
    """Train chunk by chunk; the next batches are fetched while the device works."""
    step, steps = _read_step(state), run.sizes.steps
    warned = np.zeros(np.size(state.step), bool)
    means: dict[str, np.ndarray] = {}
    began = time.perf_counter()
    next_batches = run.feed.fetch(step, _chunk_end(run, step) - step)
    _check_first_batch(run, next_batches.source, step)
    while step < steps:
        # Start the chunk; the call returns before the device has finished.
        end = _chunk_end(run, step)
        batches = next_batches
        state, metrics, finite = run_chunk(
            run.trainer.update,
            run.feed.take,
            end - step,
            state,
            batches.source,
            jnp.asarray(step, jnp.int32),
        )
        # Fetch the next batches meanwhile.
        if end < steps:
            next_batches = run.feed.fetch(end, _chunk_end(run, end) - end)
        # Wait for the metrics, average and report them.
        metrics = {name: np.asarray(x) for name, x in metrics.items()}
        finite, now = np.asarray(finite), time.perf_counter()
        means = {name: _mean(x) for name, x in metrics.items()}
        means["finite"] = finite_members(metrics["loss"], finite)
        report(end, now - began, batches.num_examples / (now - began), means)
        began = now
        # Raise if nothing is left to train, before a bad state is saved.
        _check_step(state, end)
        warned |= check_members(run.folder, metrics["loss"], finite, step, warned)
        # Save, call back, and stop if SIGTERM came.
        step, stop = end, should_stop()
        if stop or _is_checkpoint_due(run, step):
            _save(run, state, step, batches.resume_state)
        if run.on_chunk is not None:
            run.on_chunk(step, means)
        if stop:
            return state
    warn_of_saturation(means)
    return state


def _check_first_batch(run: _Run, source: Any, step: int) -> None:
    """Check the weights of the first batch and warn of its outlier dimensions."""
    recipe = run.trainer.recipe
    if step or recipe is None or not run.check_data:
        return
    if run.feed.take is None:
        taps = jax.tree.map(lambda x: x[0], source)
    else:
        taps = jax.jit(run.feed.take)(source, jnp.asarray(step, jnp.int32))
    weights = np.asarray(taps.weights)
    if not np.all(weights >= 0):
        raise ValueError(
            f"fit: weights must not be negative or NaN, got {weights.min()} in the "
            f"batch of step {step}"
        )
    warn_of_outliers(taps, recipe.dictionary.config, recipe.center)
    reads_grads = recipe.dictionary.architecture.reads_gradients
    if reads_grads or any(term.needs_grads for term in recipe.objective):
        warn_of_lost_grads("fit: the first batch", taps, stacklevel=4)


def _chunk_end(run: _Run, step: int) -> int:
    """Return the step after the chunk of ``step``, a multiple of the chunk or the last.

    Chunks do not depend on the step that a run starts from, so that a resumed run has
    the same ones.
    """
    chunk = run.sizes.chunk
    return min(run.sizes.steps, (step // chunk + 1) * chunk)


def _is_checkpoint_due(run: _Run, step: int) -> bool:
    """Return whether the state after ``step`` updates is to be saved."""
    period = run.sizes.chunk * run.sizes.checkpoint_every
    return step == run.sizes.steps or step % period == 0


def _save(run: _Run, state: TrainState, step: int, batches_state: str | None) -> None:
    """Write a checkpoint, if the run has a folder."""
    if run.folder is not None:
        about = {"hyper": run.hyper, "batches": batches_state, "start": run.start}
        folder = run.folder / "checkpoint"
        save_checkpoint(folder, step, state, about, keep=run.sizes.keep)


def _restore(run: _Run, state: TrainState, resume: bool) -> tuple[_Run, TrainState]:
    """Load the newest checkpoint, if there is one, and restore the batches' state."""
    first, steps = _read_step(state), run.sizes.steps
    if first > steps:
        raise ValueError(f"fit: state.step is {first}, past steps = {steps}")
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
    # The checkpoint must belong to a run with these settings, steps and batches.
    _check_hyper(restored.about["hyper"], run.hyper, run.folder)
    if restored.step > steps or restored.step < first:
        raise ValueError(
            f"fit: the newest checkpoint in {series} has step {restored.step}, but "
            f"this call goes from step {first} to {steps}; choose another directory"
        )
    batches_state = restored.about["batches"]
    if (batches_state is None) != (run.feed.restore is None):
        held = "no state" if batches_state is None else "a state"
        raise ValueError(
            f"fit: the checkpoint of step {restored.step} in {series} holds {held} of "
            "batches, which does not fit the batches of this call"
        )
    if run.feed.restore is not None and restored.step < steps:
        run.feed.restore(json.loads(batches_state))
    # A run that began from other parameters goes on, with a warning.
    start = restored.about.get("start", run.start)
    if start["step"] == first and start != run.start:
        warnings.warn(
            f"fit: {run.folder} holds a run that began from other parameters (another "
            "key, device or version), and that run goes on; choose another directory "
            "to begin from these",
            stacklevel=3,
        )
    return run._replace(start=start), restored.state


def _fingerprint(state: TrainState) -> dict[str, int]:
    """Compute the step and a checksum of the parameters of a state."""
    checksum = 0
    for leaf in jax.tree.leaves(state.params):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values = np.ascontiguousarray(leaf).reshape(-1)  # bfloat16 has no buffer
        checksum = zlib.crc32(values.view(np.uint8).data, checksum)
    return {"step": _read_step(state), "crc32": checksum}


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


def _check_sizes(**sizes: Any) -> _Sizes:
    """Return the sizes as integers, or raise if one is not an int of at least 1."""
    for name, size in sizes.items():
        try:
            wrong = isinstance(size, bool) or operator.index(size) < 1
        except TypeError:
            wrong = True
        if wrong:
            raise ValueError(f"fit: {name} must be an int of at least 1, got {size!r}")
    return _Sizes(**{name: operator.index(size) for name, size in sizes.items()})


def _copy_state(trainer: Any, state: Any) -> TrainState:
    """Copy a state, so that it can be donated, to the types that a file gives back."""
    for value, kind in ((trainer, Trainer), (state, TrainState)):
        if not isinstance(value, kind):
            got = type(value).__name__
            raise TypeError(f"fit: wanted a {kind.__name__}, got a {got}")
    copy = jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype, copy=True), state)
    if (
        copy.step.ndim > 1
        or copy.step.size == 0
        or not (copy.step == _read_step(copy)).all()
    ):
        raise ValueError(
            "fit: state.step must be [], or [P] with the same step for all members, "
            f"got {np.asarray(copy.step)}"
        )
    return copy


def _read_step(state: TrainState) -> int:
    """Return the step of a state, which all members share."""
    return int(np.asarray(state.step).flat[0])


def _mean(values: np.ndarray) -> np.ndarray:
    """Average a metric over the updates of a chunk, in double precision."""
    with np.errstate(all="ignore"):
        return np.asarray(values.astype(np.float64).mean(0))


def _check_step(state: TrainState, end: int) -> None:
    """Raise if the updates of a chunk did not count themselves."""
    if _read_step(state) != end:
        raise ValueError(
            f"fit: trainer.update must add 1 to state.step; wanted {end} after the "
            f"chunk, got {_read_step(state)}"
        )
