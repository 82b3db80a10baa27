"""Check the health of a training run: non-finite losses, saturation, SIGTERM."""

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint import checkpoints
from toyfeat.processes import is_global, to_host
from toyfeat.tap.checks import warn_of_lost_grads
from toyfeat.train.outliers import warn_of_outliers
from toyfeat.train.run import Run, read_step
from toyfeat.train.types import TrainState

SATURATED_SHARE = 0.5
"""Share of the updates of a chunk above which a controller counts as saturated."""


def finite_members(loss: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Return which members are finite in a chunk, ``[]`` or ``[P]`` bool.

    Args:
      loss: of every update, ``[steps]`` or ``[steps, P]``.
      finite: ``[]`` or ``[P]``, whether the parameters are finite at its end.
    """
    return np.asarray(np.isfinite(loss.astype(np.float64)).all(0) & finite)


def check_members(
    folder: Path | None,
    loss: np.ndarray,
    finite: np.ndarray,
    first: int,
    warned: np.ndarray,
) -> np.ndarray:
    """Find the members that diverged in a chunk, and warn of new ones.

    The others go on: members share nothing but the batch.  A diverged member is
    trained on with them, at the same cost, and saved as it is.

    Args:
      folder: of the run, or ``None``.
      loss: of every update, ``[steps]`` or ``[steps, P]``.
      finite: ``[]`` or ``[P]``, whether the parameters are finite at the end.
      first: step of the first update.
      warned: ``[P]`` bool, the members that were reported before.

    Returns:
      ``[P]`` bool, which members diverged.

    Raises:
      FloatingPointError: if all of them did.
    """
    # The step of a member's first bad loss; the last one if only parameters are bad.
    finite_loss = np.isfinite(loss.astype(np.float64)).reshape(len(loss), -1)
    all_finite = np.asarray(finite_loss.all(0))
    bad_step = first + np.where(
        all_finite, len(loss) - 1, np.argmin(finite_loss, axis=0)
    )
    bad = ~all_finite | ~finite.reshape(-1)
    # Nothing is left to train: raise with the earliest step and the last checkpoint.
    if bad.all():
        earliest = int(np.argmin(bad_step))
        what = "parameters are" if all_finite[earliest] else "loss is"
        saved = [] if folder is None else checkpoints(folder / "checkpoint")
        last = f"the last checkpoint is {saved[-1][1]}" if saved else "none was saved"
        members = f" for all {bad.size} members" if bad.size > 1 else ""
        raise FloatingPointError(
            f"fit: the {what} not finite{members}, first in the update of step "
            f"{bad_step[earliest]} (chunk {first} .. {first + len(loss) - 1}); {last}. "
            "Look at that batch with check_taps, and start in another directory with a "
            "lower learning rate or clipped gradients (optax.clip_by_global_norm)"
        )
    # Report each member once.
    new = bad & ~warned
    if new.any():
        listed = ", ".join(f"{i} (step {bad_step[i]})" for i in np.flatnonzero(new))
        warnings.warn(
            f"fit: the loss is no longer finite for members {listed} of {bad.size}; "
            "the others go on",
            stacklevel=4,
        )
    return bad


def warn_of_saturation(means: dict[str, np.ndarray]) -> None:
    """Warn if a controller was at its bounds in the last chunk.

    Args:
      means: of the metrics of the last chunk.
    """
    share = np.atleast_1d(means.get("saturated", np.zeros(())))
    members = np.flatnonzero(share > SATURATED_SHARE)
    if members.size:
        of = f" of members {members.tolist()}" if share.size > 1 else ""
        warnings.warn(
            f"fit: the controller{of} was saturated in more than half of the last "
            "chunk, so its target was not reached; widen its bounds or move the target",
            stacklevel=4,
        )


@contextlib.contextmanager
def catch_sigterm(
    enabled: bool, agree: Callable[[bool], bool] = bool
) -> Iterator[Callable[[], bool]]:
    """Postpone SIGTERM to the end of the block, which then raises ``SystemExit(0)``.

    The previous handler is put back.  Outside of the main thread nothing is caught,
    because Python cannot set handlers there.

    Args:
      enabled: whether to catch the signal at all.
      agree: from whether it came to this process to whether it came to any.

    Yields:
      A function that returns whether SIGTERM came.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signals: list[int] = []
    previous = signal.signal(
        signal.SIGTERM, lambda number, frame: signals.append(number)
    )
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
    if agree(bool(signals)):
        raise SystemExit(0)


def check_first_batch(run: Run, source: Any, step: int) -> None:
    """Check the weights of the first batch and warn of its outlier dimensions."""
    recipe = run.trainer.recipe
    if step or recipe is None or not run.check_data:
        return
    # Stacked batches of the host, or data that the first batch is taken from.
    if run.feed.take is None:
        taps = jax.tree.map(lambda x: x[0], source)
    else:
        taps = jax.jit(run.feed.take)(source, jnp.asarray(step, jnp.int32))
    taps = jax.tree.map(to_host, taps) if is_global(taps) else taps
    weights = np.asarray(taps.weights)
    if not np.all(weights >= 0):
        raise ValueError(
            f"fit: weights must not be negative or NaN, got {weights.min()} in the "
            f"batch of step {step}"
        )
    # Gradients matter only where a term or the architecture reads them.
    warn_of_outliers(taps, recipe.dictionary.config, recipe.center)
    reads_grads = recipe.dictionary.architecture.reads_gradients
    if reads_grads or any(term.needs_grads for term in recipe.objective):
        warn_of_lost_grads("fit: the first batch", taps, stacklevel=4)


def check_step(state: TrainState, end: int) -> None:
    """Raise if the updates of a chunk did not count themselves."""
    if read_step(state) != end:
        raise ValueError(
            f"fit: trainer.update must add 1 to state.step; wanted {end} after the "
            f"chunk, got {read_step(state)}"
        )
