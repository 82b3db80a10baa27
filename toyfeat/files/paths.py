"""Paths of files whose names come from elsewhere, and locks of folders."""

import contextlib
import importlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def inside(folder: Path, name: Any, who: str, *, links: bool = False) -> Path:
    """Return the path of a name that a file gave, if it lies inside of a folder.

    Args:
      folder: that the name is relative to.
      name: read from a file.
      who: the function, for messages.
      links: whether a symbolic link may lead out of the folder, as those of the cache
        of Hugging Face do.

    Returns:
      ``folder / name``, which may not exist.

    Raises:
      ValueError: if the name is not a string, is empty, absolute or has ``..`` in it,
        or, without ``links``, if it leads out of the folder by a symbolic link.

    Example:
      >>> inside(Path("model"), "a/b.bin", "load").as_posix()
      'model/a/b.bin'
      >>> inside(Path("model"), "../b.bin", "load")
      Traceback (most recent call last):
      ValueError: load: names of files must lie inside of model, got '../b.bin'; ...
    """
    wanted = f"{who}: names of files must lie inside of {folder}, got {name!r:.80}"
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{wanted}; correct the file that names it")
    # Names are checked by the rules of both systems, whichever wrote them.
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts or not path.parts:
            raise ValueError(f"{wanted}; correct the file that names it")
    if not links:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{wanted}, a link to {target}; put the file itself into the folder"
            )
    return folder / name


def lock_folder(path: Path, holder: object, who: str) -> "weakref.finalize[Any, Any]":
    """Lock a folder against other processes and other calls of this one.

    Args:
      path: of a folder that exists.
      holder: the lock is released when this is deleted.
      who: the function, for messages.

    Returns:
      A function that releases the lock, as often as it is called.

    Raises:
      BlockingIOError: if the folder is locked.
    """
    return weakref.finalize(holder, os.close, _open_locked(path, who))


@contextlib.contextmanager
def locked(path: Path, who: str) -> Iterator[None]:
    """Hold the lock of a folder, as :func:`lock_folder` does.

    Raises:
      BlockingIOError: if the folder is locked.
    """
    folder = _open_locked(path, who)
    try:
        yield
    finally:
        os.close(folder)


def _open_locked(path: Path, who: str) -> int:
    """Open a folder and lock it; the descriptor holds the lock as long as it is open.

    Where there are no locks, as on other systems than POSIX, there is none.
    """
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        return os.open(os.devnull, os.O_RDONLY)
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise BlockingIOError(
            f"{who}: only one at a time may use {path}, which another has open; wait "
            "for it to end, or give another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    return folder
