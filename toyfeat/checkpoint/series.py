"""Save the checkpoints of a training run and find the newest that is undamaged."""

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from toyfeat.checkpoint.files import (
    DamagedFileError,
    read_about,
    read_file,
    write_file,
)
from toyfeat.checkpoint.trees import unflatten_like

_NAME = re.compile(r"step_(\d+)\.npz")


class Restored(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
      step: updates done.
      state: with the structure of ``like``.
      about: the JSON values that were saved with it.
    """

    step: int
    state: Any
    about: dict[str, Any]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints of a folder, step and file, the oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = [(_NAME.fullmatch(path.name), path) for path in paths]
    steps = [(int(match[1]), path) for match, path in matches if match]
    return sorted(pair for pair in steps if pair[1].name == _file_name(pair[0]))


def _file_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step_{step:08d}.npz"


def save_checkpoint(
    folder: Path, step: int, state: Any, about: dict[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint, then remove all but the ``keep`` newest of the same run.

    Checkpoints are of one run if they have the same ``about["start"]``; others, and
    files that only have such a name, stay.
    """
    path = folder / _file_name(step)
    write_file(path, state, about, "fit")
    # Of this run the new one stays, and as many older ones as make ``keep`` with it.
    older = [old for at, old in checkpoints(folder) if at < step]
    own = [old for old in older if _is_of_run(old, about)]
    for old in own[: max(0, len(own) - keep + 1)]:
        old.unlink()
    return path


def _is_of_run(path: Path, about: dict[str, Any]) -> bool:
    """Tell whether a checkpoint has the start of a run; a damaged one has none."""
    saved = read_about(path)
    return saved is not None and saved.get("start") == about.get("start")


def newest_checkpoint(folder: Path, like: Any) -> Restored | None:
    """Load the newest undamaged checkpoint, or return ``None`` if there is none.

    Damaged ones are skipped with a warning and renamed to ``.damaged``, once an
    undamaged one is found.

    Raises:
      DamagedFileError: if there are checkpoints and all are damaged.
      ValueError: if the newest undamaged one holds another tree.
    """
    damaged: list[tuple[Path, Exception]] = []
    for step, path in reversed(checkpoints(folder)):
        # Remember a damaged file and go on to the one before it.
        try:
            leaves, about = read_file(path, "fit")
        except (DamagedFileError, OSError) as error:
            damaged.append((path, error))
            continue
        # The first undamaged one must fit; older ones would not either.
        try:
            state = unflatten_like(leaves, like, path, "fit")
        except ValueError as error:
            hint = "choose another directory, or the same settings"
            raise ValueError(f"{error}; {hint}") from None
        # Report the damaged ones and put them aside.
        for damaged_path, error in damaged:
            warnings.warn(
                f"fit: checkpoint {damaged_path} cannot be used ({error}); going back "
                f"to step {step}, {path}",
                stacklevel=4,
            )
            aside = damaged_path.with_name(damaged_path.name + ".damaged")
            if not os.path.lexists(aside):
                with contextlib.suppress(OSError):
                    damaged_path.rename(aside)
        return Restored(step=step, state=state, about=about)
    if damaged:
        reasons = "; ".join(str(error) for _, error in damaged)
        raise DamagedFileError(
            f"fit: none of the {len(damaged)} checkpoints in {folder} can be used: "
            f"{reasons}. Copy a whole one there, or move the folder away to start anew"
        )
    return None
