"""The checkpoints of a training: the newest whole one, and a few before it."""

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from toyfeat.checkpoint.files import DamagedFileError, read_file, write_file
from toyfeat.checkpoint.trees import shaped_like

_NAME = re.compile(r"step_(\d+)\.npz")


class Restored(NamedTuple):
    """A training as it was at a checkpoint.

    Attributes:
      step: updates done.
      state: shaped as what was asked for.
      about: the JSON values that were saved with it.
    """

    step: int
    state: Any
    about: dict[str, Any]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and files of the checkpoints of a folder, the oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    named = [(_NAME.fullmatch(path.name), path) for path in found]
    return sorted((int(match[1]), path) for match, path in named if match)


def save_checkpoint(
    folder: Path, step: int, state: Any, about: dict[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint, then remove all but the ``keep`` last."""
    for half in folder.glob(".step_*.half"):  # of a process that was killed
        half.unlink()
    path = folder / f"step_{step:08d}.npz"
    write_file(path, state, about, "fit")
    for _, old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path, like: Any) -> Restored | None:
    """The newest checkpoint that is whole, or ``None`` if there is none at all.

    Damaged ones are reported by a warning and, once a whole one is found, put aside
    under the name ``.damaged``.

    Raises:
      DamagedFileError: if there are checkpoints and none is whole.
      ValueError: if the newest whole one holds another tree.
    """
    damaged: list[tuple[Path, Exception]] = []
    for step, path in reversed(checkpoints(folder)):
        try:
            leaves, about = read_file(path, "fit")
        except (DamagedFileError, OSError) as error:
            damaged.append((path, error))
            continue
        try:
            state = shaped_like(leaves, like, path, "fit")
        except ValueError as error:
            hint = "choose another directory, or the same settings"
            raise ValueError(f"{error}; {hint}") from None
        for bad, error in damaged:
            warnings.warn(
                f"fit: checkpoint {bad} cannot be used ({error}); going back to step "
                f"{step}, {path}",
                stacklevel=4,
            )
            with contextlib.suppress(OSError):
                bad.rename(bad.with_name(bad.name + ".damaged"))
        return Restored(step, state, about)
    if damaged:
        reasons = "; ".join(str(error) for _, error in damaged)
        raise DamagedFileError(
            f"fit: none of the {len(damaged)} checkpoints in {folder} can be used: "
            f"{reasons}. Copy a whole one there, or move the folder away to start anew"
        )
    return None
