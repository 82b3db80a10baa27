"""The host loop of a training: chunks, checkpoints, resumption."""

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
from toyfeat.train.chunks import Feed, feed_of, run_chunk
from toyfeat.train.health import check_saturated, finite_members, members_lost
from toyfeat.train.outliers import warn_of_outliers
from toyfeat.train.progress import Report, reporting
from toyfeat.train.step import recipe_of
from toyfeat.train.termination import terminated
from toyfeat.types import ArrayBatches, Taps, Trainer, TrainState

OnChunk = Callable[[int, dict[str, np.ndarray]], Any]


class _Run(NamedTuple):
    """What stays the same during a call of :func:`fit`."""

    trainer: Trainer
    feed: Feed
    folder: Path | None
    hyper: dict[str, Any]
    sizes: dict[str, int]
    on_chunk: OnChunk | None
    check_data: bool
    start: dict[str, int] | None


def fit(
    trainer: Trainer,
    state: TrainState,
    batches: ArrayBatches | Callable[[int], Taps],
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
    """Train until ``steps`` updates are done, the first time or after a break.

    ``state = trainer.update(state, batches(step))[0]`` for every step from
    ``state.step`` to ``steps``, in compiled chunks.  With a ``directory`` the same
    call goes on where the last one was cut off, at whatever moment, and ends with
    the very bits of a run that was not.  On SIGTERM (main thread only) the chunk is
    finished and saved, and the process exits with status 0; inside another ``fit``
    the inner one saves, and the outer one goes back to its last checkpoint.

    Args:
      trainer: as of :func:`toyfeat.trainer`.
      state: where to start, one member or a population; it stays usable.
      batches: :func:`toyfeat.data.array_batches` or :class:`toyfeat.ArrayBatches`,
        made on the device inside the compiled loop, or a function of the step on the
        host, called for the next chunk while the device works on this one, whose
        arrays keep their shapes.  If it has
        ``state()`` and ``restore(state)``, JSON values, these go into checkpoints.
      steps: updates in all, those before the start included.
      directory: gets ``checkpoint/`` and ``metrics.jsonl``, one line per chunk with
        the mean of every metric (``null`` where it is not finite) and whether each
        member is ``finite``.  One run at a time may use it.
      chunk: updates per compiled call.
      checkpoint_every: chunks between checkpoints; one is written at the end too.
      keep: how many of the last checkpoints are kept.
      progress: show a bar, if standard error is a terminal.
      tensorboard: write ``directory/tensorboard``.
      on_chunk: called with the step, the mean of every metric and ``finite``, after
        a chunk and its checkpoint.
      resume: go on from the newest whole checkpoint of ``directory``, which takes
        the place of ``state``; that the batches are those of before is not checked.
        If false, the directory must not hold a run.
      check_data: look at the first batch with :func:`check_outliers`, before the
        first step of a trainer of :func:`toyfeat.trainer`.

    Returns:
      The state after ``steps`` updates.  Members of a population that diverged stay
      in it as they are; :func:`sweep_table` marks them.

    Raises:
      FloatingPointError: if the loss or the parameters (of all members) are not
        finite; the message has the step and the last checkpoint, which is good.
      FileExistsError: with ``resume=False`` and a directory that holds a run.
      ValueError: if sizes, shapes, the state's tree or the settings do not fit, a
        weight of the first batch is negative, or no checkpoint of the directory is
        whole.
      TypeError: if an argument is of another kind.
      OSError: if the disk is full; the last checkpoint is good.
      ImportError: with ``tensorboard`` and without tensorboardX.

    Warns:
      UserWarning: for a checkpoint that is damaged and passed over, for a directory
        whose run began from other parameters (another key), for members of a
        population whose loss is not finite, for activations whose mean or whose
        massive dimensions will spoil the training, and at the end for members whose
        controller is saturated.

    Example:
      >>> def update(state, taps):
      ...     mean = 0.9 * state.params + 0.1 * taps.acts.mean(0)
      ...     loss = ((taps.acts - mean[None, :]) ** 2).mean()
      ...     return state._replace(step=state.step + 1, params=mean), {"loss": loss}
      >>> init = lambda key: TrainState(jnp.int32(0), jnp.zeros(3), (), (), {}, {})
      >>> ones = Taps(jnp.ones((4, 3)), None, jnp.ones(4))
      >>> batches = ArrayBatches(lambda data, step: data, ones)
      >>> trainer = Trainer(init, update)
      >>> done = fit(trainer, init(jax.random.key(0)), batches, steps=50, chunk=20)
      >>> int(done.step), round(float(done.params[0]), 4)
      (50, 0.9948)
    """
    sizes = {"steps": steps, "chunk": chunk, "keep": keep}
    sizes = _checked_sizes(sizes | {"checkpoint_every": checkpoint_every})
    state, folder = _own(trainer, state), None if directory is None else Path(directory)
    hyper = {name: np.asarray(x).tolist() for name, x in state.hyper.items()}
    start = None if folder is None else _start_of(state)
    feed = feed_of(batches)
    run = _Run(trainer, feed, folder, hyper, sizes, on_chunk, check_data, start)
    run, state = _begun(run, state, resume)
    first = _step_of(state)
    if first >= steps:
        return state
    look = {"bar": progress, "tensorboard": tensorboard}
    with (
        terminated(folder is not None) as asked,
        reporting(folder, first, steps, **look) as report,
    ):
        return _trained(run, state, asked, report)


def _trained(
    run: _Run, state: TrainState, asked: Callable[[], bool], report: Report
) -> TrainState:
    """From border to border; the next batches are fetched while the device works."""
    step, steps = _step_of(state), run.sizes["steps"]
    warned = np.zeros(np.size(state.step), bool)
    means: dict[str, np.ndarray] = {}
    began = time.perf_counter()
    ready = run.feed.fetch(step, _border(run, step) - step)
    _look_at(run, ready.source, step)
    while step < steps:
        end = _border(run, step)
        state, metrics, finite = run_chunk(
            run.trainer.update,
            run.feed.take,
            end - step,
            state,
            ready.source,
            jnp.asarray(step, jnp.int32),
        )
        done = ready
        if end < steps:
            ready = run.feed.fetch(end, _border(run, end) - end)
        metrics = {name: np.asarray(x) for name, x in metrics.items()}
        finite, now = np.asarray(finite), time.perf_counter()
        means = {name: _mean(x) for name, x in metrics.items()}
        means["finite"] = finite_members(metrics["loss"], finite)
        report(end, now - began, done.examples / (now - began), means)
        began = now
        _check_step(state, end)
        warned |= members_lost(run.folder, metrics["loss"], finite, step, warned)
        step, stop = end, asked()
        if stop or _is_due(run, step):
            _save(run, state, step, done.memory)
        if run.on_chunk is not None:
            run.on_chunk(step, means)
        if stop:
            return state
    check_saturated(means)
    return state


def _look_at(run: _Run, source: Any, step: int) -> None:
    """The first batch, before the first update."""
    recipe = recipe_of(run.trainer.update)
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


def _border(run: _Run, step: int) -> int:
    """Borders are multiples of the chunk, wherever a run began."""
    chunk = run.sizes["chunk"]
    return min(run.sizes["steps"], (step // chunk + 1) * chunk)


def _is_due(run: _Run, step: int) -> bool:
    period = run.sizes["chunk"] * run.sizes["checkpoint_every"]
    return step == run.sizes["steps"] or step % period == 0


def _save(run: _Run, state: TrainState, step: int, memory: str | None) -> None:
    if run.folder is not None:
        about = {"hyper": run.hyper, "batches": memory, "start": run.start}
        folder = run.folder / "checkpoint"
        save_checkpoint(folder, step, state, about, keep=run.sizes["keep"])


def _begun(run: _Run, state: TrainState, resume: bool) -> tuple[_Run, TrainState]:
    """The run and the state to start from, batches put back to where they were."""
    first, steps = _step_of(state), run.sizes["steps"]
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
    found = newest_checkpoint(series, state)
    if found is None:
        return run, state
    _check_hyper(found.about["hyper"], run.hyper, run.folder)
    if found.step > steps or found.step < first:
        raise ValueError(
            f"fit: the newest checkpoint in {series} has step {found.step}, but this "
            f"call goes from step {first} to {steps}; choose another directory"
        )
    memory = found.about["batches"]
    if (memory is None) != (run.feed.restore is None):
        there = "no state" if memory is None else "a state"
        raise ValueError(
            f"fit: the checkpoint of step {found.step} in {series} holds {there} of "
            "batches, which does not fit the batches of this call"
        )
    if run.feed.restore is not None and found.step < steps:
        run.feed.restore(json.loads(memory))
    start = found.about.get("start", run.start)
    if start["step"] == first and start != run.start:
        warnings.warn(
            f"fit: {run.folder} holds a run that began from other parameters (another "
            "key, device or version), and that run goes on; choose another directory "
            "to begin from these",
            stacklevel=3,
        )
    return run._replace(start=start), found.state


def _start_of(state: TrainState) -> dict[str, int]:
    """Step and checksum of the parameters that a run began from."""
    checksum = 0
    for leaf in jax.tree.leaves(state.params):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values = np.ascontiguousarray(leaf).reshape(-1)  # bfloat16 has no buffer
        checksum = zlib.crc32(values.view(np.uint8).data, checksum)
    return {"step": _step_of(state), "crc32": checksum}


def _check_hyper(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
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


def _checked_sizes(sizes: dict[str, Any]) -> dict[str, int]:
    for name, size in sizes.items():
        try:
            wrong = isinstance(size, bool) or operator.index(size) < 1
        except TypeError:
            wrong = True
        if wrong:
            raise ValueError(f"fit: {name} must be an int of at least 1, got {size!r}")
    return {name: operator.index(size) for name, size in sizes.items()}


def _own(trainer: Any, state: Any) -> TrainState:
    """A copy that may be donated, of the types that a file gives back."""
    for value, kind in ((trainer, Trainer), (state, TrainState)):
        if not isinstance(value, kind):
            got = type(value).__name__
            raise TypeError(f"fit: wanted a {kind.__name__}, got a {got}")
    copy = jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype, copy=True), state)
    if (
        copy.step.ndim > 1
        or copy.step.size == 0
        or not (copy.step == _step_of(copy)).all()
    ):
        raise ValueError(
            "fit: state.step must be [], or [P] with the same step for all members, "
            f"got {np.asarray(copy.step)}"
        )
    return copy


def _step_of(state: TrainState) -> int:
    return int(np.asarray(state.step).flat[0])


def _mean(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(values.astype(np.float64).mean(0))


def _check_step(state: TrainState, end: int) -> None:
    if _step_of(state) != end:
        raise ValueError(
            f"fit: trainer.update must add 1 to state.step; wanted {end} after the "
            f"chunk, got {_step_of(state)}"
        )
