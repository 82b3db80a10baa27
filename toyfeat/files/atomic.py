"""Write text files atomically, and create folders for results."""

import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old content or all of the new."""
    draft = path.with_name(path.name + ".partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


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
