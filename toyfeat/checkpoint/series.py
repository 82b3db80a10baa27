"""Save the checkpoints of a training run and find the newest that is undamaged."""

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from toyfeat.checkpoint import parallel
from toyfeat.checkpoint.files import (
    DamagedFileError,
    read_about,
    read_file,
    write_file,
)
from toyfeat.checkpoint.trees import check_fits, unflatten_like
from toyfeat.processes import call_in_first, gather, is_global, process_index

_NAME = re.compile(r"step_(\d+)(\.npz)?")


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
    """List the checkpoints of a folder, step and path, the oldest first.

    Those of one process are files, those of several processes are folders.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = [(_NAME.fullmatch(path.name), path) for path in paths]
    steps = [(int(match[1]), path) for match, path in matches if match]
    return sorted(pair for pair in steps if pair[1].stem == _name(pair[0]))


def _name(step: int) -> str:
    """Return the name of the checkpoint of a step, without its suffix."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, step: int, state: Any, about: dict[str, Any], *, keep: int
) -> Callable[[], None]:
    """Write a checkpoint, then remove all but the ``keep`` newest of the same run.

    Checkpoints are of one run if they have the same ``about["start"]``; others, and
    files that only have such a name, stay.  A state of several processes is written by
    all of them, while they go on.

    Returns:
      Function that waits for the end of all this, for every process to call; more
      calls of it do nothing.
    """
    if not is_global(state):
        write_file(folder / f"{_name(step)}.npz", state, about, "fit")
        _remove_older(folder, step, about, keep)
        return _nothing
    wait = parallel.start_write(folder / _name(step), state, about, "fit")

    @cache
    def finish() -> None:
        wait()
        call_in_first("fit", _remove_older, folder, step, about, keep)

    return finish


def _nothing() -> None:
    """Do nothing, as what is to be waited for is done."""


def _remove_older(folder: Path, step: int, about: dict[str, Any], keep: int) -> None:
    """Keep the new checkpoint of a run, and as many older ones as make ``keep``."""
    older = [old for at, old in checkpoints(folder) if at < step]
    own = [old for old in older if _is_of_run(old, about)]
    for old in own[: max(0, len(own) - keep + 1)]:
        if old.suffix:
            old.unlink()
        else:
            parallel.remove(old)


def _is_of_run(path: Path, about: dict[str, Any]) -> bool:
    """Tell whether a checkpoint has the start of a run; a damaged one has none."""
    saved = None
    if path.suffix:
        saved = read_about(path)
    else:
        with contextlib.suppress(DamagedFileError):
            saved = parallel.read_manifest(path, "fit")["about"]
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
    several = is_global(like)
    found = [(step, path.name) for step, path in checkpoints(folder)]
    if several:  # as process 0 sees the folder, which they share
        found = gather(found)[0]
    for step, name in reversed(found):
        path = folder / name
        # Remember a damaged file and go on to the one before it.
        try:
            state, about = _load(path, like, several)
        except (DamagedFileError, OSError) as error:
            damaged.append((path, error))
            continue
        # The first undamaged one must fit; older ones would not either.
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
            if not several or process_index() == 0:
                with contextlib.suppress(OSError):
                    damaged_path.rename(_free_name(damaged_path))
        return Restored(step=step, state=state, about=about)
    if damaged:
        reasons = "; ".join(str(error) for _, error in damaged)
        raise DamagedFileError(
            f"fit: none of the {len(damaged)} checkpoints in {folder} can be used: "
            f"{reasons}. Copy a whole one there, or move the folder away to start anew"
        )
    return None


def _free_name(path: Path) -> Path:
    """Name a damaged checkpoint, so that another one can take its place."""
    names = (path.with_name(f"{path.name}.damaged{i or ''}") for i in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def _load(path: Path, like: Any, several: bool) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint of either kind, in this process or in all of them.

    Raises:
      DamagedFileError: if it is damaged, for any of the processes.
      ValueError: if it holds another tree.
    """
    body: dict[str, Any] = {}
    leaves: dict[str, Any] = {}
    fault = None
    try:
        if path.suffix:
            leaves, body["about"] = read_file(path, "fit")
        else:
            body = parallel.read_manifest(path, "fit")
            leaves = {entry["path"]: (entry, None) for entry in body["leaves"]}
    except (DamagedFileError, OSError) as error:
        fault = str(error)
    for other in gather(fault) if several else [fault]:
        if other is not None:
            raise DamagedFileError(other)
    if path.suffix:
        return unflatten_like(leaves, like, path, "fit"), body["about"]
    check_fits(leaves, like, path, "fit")
    parallel.verify_files(path, body, "fit", several)
    return parallel.read_arrays(path, body, like, "fit", several), body["about"]
