"""Whether a training is still worth going on with."""

import warnings
from pathlib import Path

import numpy as np

from toyfeat.checkpoint import checkpoints


def finite_members(loss: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Which members ``[]`` or ``[P]`` are whole at the end of a chunk.

    Args:
      loss: of every update, ``[steps]`` or ``[steps, P]``.
      finite: whether the parameters are, at its end.
    """
    return np.asarray(np.isfinite(loss.astype(np.float64)).all(0) & finite)


def members_lost(
    folder: Path | None,
    loss: np.ndarray,
    finite: np.ndarray,
    first: int,
    warned: np.ndarray,
) -> np.ndarray:
    """Which members are lost in a chunk; new ones are reported.

    The others go on: members share nothing but the batch.  A member that is lost is
    trained on with them, at the same cost, and whatever it holds is saved.

    Raises:
      FloatingPointError: if all of them are.
    """
    good = np.isfinite(loss.astype(np.float64)).reshape(len(loss), -1)
    whole = np.asarray(good.all(0))
    when = first + np.where(whole, len(loss) - 1, np.argmin(good, axis=0))
    bad = ~whole | ~finite.reshape(-1)
    if bad.all():
        which = int(np.argmin(when))
        what = "parameters are" if whole[which] else "loss is"
        saved = [] if folder is None else checkpoints(folder / "checkpoint")
        last = f"the last checkpoint is {saved[-1][1]}" if saved else "none was saved"
        members = f" for all {bad.size} members" if bad.size > 1 else ""
        raise FloatingPointError(
            f"fit: the {what} not finite{members}, first in the update of step "
            f"{when[which]} (chunk {first} .. {first + len(loss) - 1}); {last}. Look "
            "at that batch with check_taps, and start in another directory with a "
            "lower learning rate or clipped gradients (optax.clip_by_global_norm)"
        )
    new = bad & ~warned
    if new.any():
        said = ", ".join(f"{i} (step {when[i]})" for i in np.flatnonzero(new))
        warnings.warn(
            f"fit: the loss is no longer finite for members {said} of {bad.size}; the "
            "others go on",
            stacklevel=4,
        )
    return bad


def check_saturated(means: dict[str, np.ndarray]) -> None:
    """Warn of controllers at their bounds in the last chunk."""
    share = np.atleast_1d(means.get("saturated", np.zeros(())))
    members = np.flatnonzero(share > 0.5)
    if members.size:
        of = f" of members {members.tolist()}" if share.size > 1 else ""
        warnings.warn(
            f"fit: the controller{of} was saturated in more than half of the last "
            "chunk, so its target was not reached; widen its bounds or move the target",
            stacklevel=4,
        )
