"""Write files atomically, and create folders for results."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old content or all of the new.

    Raises:
      OSError: if it cannot be written; names it.  The old content stays.
    """
    try:
        with open_draft(path, mark=str(os.getpid())) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise _not_written("write_whole", path, error) from error


@contextlib.contextmanager
def open_draft(path: Path, *, mark: str = "", sync: bool = True) -> Iterator[BinaryIO]:
    """Open a draft that replaces a file once it is written, and is deleted otherwise.

    The draft is a new file, ``.NAME.draft``: a link of that name is removed, not
    followed, and so is the draft of a process that was killed.

    Args:
      path: of the file that is replaced; a link is replaced, not followed.
      mark: part of the name of the draft, where processes without a lock may write
        the same file.
      sync: whether to wait until the draft is on the disk before it replaces the file.

    Yields:
      The draft, open for writing bytes.
    """
    draft = path.with_name(f".{path.name}.{mark}{'.' * bool(mark)}draft")
    draft.unlink(missing_ok=True)
    try:
        with draft.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def replace_files(
    who: str,
    folder: Path,
    writers: dict[str, Callable[[Path], object]],
    obsolete: tuple[str, ...] = (),
) -> None:
    """Replace files of a folder when all of the new ones are written.

    Args:
      who: the function, for messages.
      folder: made if it does not exist.
      writers: file name to what writes that file at a path; the order of the
        names is the order in which the files appear.
      obsolete: names of files that are removed.

    Raises:
      OSError: if a file cannot be written; names it.  The old files stay.
    """
    parts = {name: folder / f".{name}.part" for name in writers}
    old = {name: folder / f".{name}.old" for name in (*obsolete, *writers)}
    moved: list[str] = []
    placed: list[str] = []
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Write and flush all drafts before anything old is touched.
        for name, write in writers.items():
            path = folder / name
            write(parts[name])
            _flush(parts[name])
        # Set the old files aside, the last one first: without it the others are not
        # read, so that a kill never leaves old files that pass for new ones.
        for name in reversed(old):
            path = folder / name
            if path.exists():
                os.rename(path, old[name])
                moved.append(name)
        # The new files, in the order of the names.
        for name, part in parts.items():
            path = folder / name
            os.replace(part, path)
            placed.append(name)
        for path in old.values():
            path.unlink(missing_ok=True)
    except BaseException as error:
        _undo(folder, old, moved, placed)
        # safetensors has an error of its own for a full disk.
        if not isinstance(error, OSError) and "I/O error" not in str(error):
            raise
        raise _not_written(who, path, error) from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _undo(
    folder: Path, old: dict[str, Path], moved: list[str], placed: list[str]
) -> None:
    """Put all old files back, and delete new ones where there was none."""
    for name in placed:
        if name not in moved:
            (folder / name).unlink()
    for name in reversed(moved):
        os.rename(old[name], folder / name)


def _flush(path: Path) -> None:
    """Wait until a file is on the disk, where a late error may still come."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _not_written(who: str, path: Path, error: BaseException) -> OSError:
    """Make the error of a file that cannot be written."""
    return OSError(
        getattr(error, "errno", None) or errno.EIO,
        f"{who}: could not write {path}: {getattr(error, 'strerror', None) or error}; "
        "make room, or give another folder, and run the same again",
    )


def output_folder(path: Path) -> Path:
    """Create a folder for results and check that files can be written to it.

    Call it before the work, so that hours of computing do not end in a failed write.

    Returns:
      ``path``.

    Raises:
      ValueError: if the path is taken by a file or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"output_folder: cannot write to {path}: {error}; give another folder"
        ) from None
    return path
