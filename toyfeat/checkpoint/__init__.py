"""Save and load trees of arrays, verified by checksums.

A file is an ``.npz`` that ``numpy.load`` opens too, with one array per leaf and a
``manifest.json`` that holds the shape, the dtype and the SHA-256 of each.  It is
written under another name, flushed to the disk and renamed, so that a file of the
name is complete at any moment.
"""

from toyfeat.checkpoint.files import DamagedFileError
from toyfeat.checkpoint.series import (
    Restored,
    checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from toyfeat.checkpoint.trees import load_tree, save_tree

__all__ = [
    "DamagedFileError",
    "Restored",
    "checkpoints",
    "load_tree",
    "newest_checkpoint",
    "save_checkpoint",
    "save_tree",
]
