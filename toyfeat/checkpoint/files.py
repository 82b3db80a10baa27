"""Write and read one file of arrays: an ``.npz`` with a manifest of checksums."""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from toyfeat.checkpoint.leaves import check_leaf, encode_leaf
from toyfeat.files.archives import array_from_npy, open_archive
from toyfeat.files.atomic import open_draft

_FORMAT = 1  # version of the manifest
_MANIFEST = "manifest.json"
_ENTRY = {"path": str, "member": str, "dtype": str, "sha256": str, "shape": list}
_MAX_REASON = 400  # characters of what is said about a damaged file: a few lines


class DamagedFileError(ValueError):
    """Raised when a file does not hold what was written to it."""


def write_file(path: Path, tree: Any, about: dict[str, Any], who: str) -> None:
    """Write a tree to a file atomically, with the JSON values ``about``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    for leaf_path, leaf in leaves:
        check_leaf(leaf_path, leaf, who)
    # Write and flush a draft, then rename it: readers never see a part of a file.
    with writing(path, who):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_draft(path) as file:
            _write_members(file, leaves, about)
        sync_folder(path.parent)


@contextlib.contextmanager
def writing(path: Path, who: str) -> Iterator[None]:
    """Say of an OSError of the block that earlier files stay whole."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{who}: could not write {path}: {error.strerror or error}; what was "
            "saved before is whole. Make room and run the same again",
        ) from error


def _write_members(file: Any, leaves: list[Any], about: dict[str, Any]) -> None:
    """Write an array per leaf and the manifest to an open archive."""
    # Paths make readable member names; they are numbered where two would be alike.
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    if len(set(names)) < len(names) or _MANIFEST in names:
        names = [f"{i}/{name}" for i, name in enumerate(names)]
    entries = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as members:
        for name, (leaf_path, leaf) in zip(names, leaves, strict=True):
            entry, value = encode_leaf(leaf)
            member = f"{name or 'tree'}.npy"
            with members.open(member, "w", force_zip64=True) as part:
                np.lib.format.write_array(part, value, allow_pickle=False)
            place = {"path": jax.tree_util.keystr(leaf_path), "member": member}
            entries.append({**place, **entry, "sha256": _digest(value)})
        text = json.dumps({"format": _FORMAT, "leaves": entries, "about": about})
        members.writestr(_MANIFEST, text)


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a new name survives a loss of power, where possible."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(value: np.ndarray) -> str:
    """Return the SHA-256 of the bytes of an array."""
    flat: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return hashlib.sha256(flat).hexdigest()


def read_file(path: Path, who: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and verify a file.

    Returns:
      Path of every leaf to its entry and value, and the JSON values saved with them.

    Raises:
      FileNotFoundError: if there is no such file.
      DamagedFileError: if it is not what was written.
    """
    if not path.exists():
        raise FileNotFoundError(f"{who}: there is no {path}; give another path")
    with open(path, "rb") as file:
        try:
            return _read_members(file)
        except Exception as error:  # a damaged archive fails in a dozen ways
            reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
            raise DamagedFileError(f"{who}: {path} is damaged ({reason})") from error


def read_about(path: Path) -> dict[str, Any] | None:
    """Read the JSON values that a file was saved with, and no array.

    Returns:
      The values, or ``None`` if it is not a file of :func:`write_file`.
    """
    try:
        with path.open("rb") as file, open_archive(file) as members:
            manifest = json.loads(members.read(_MANIFEST))
        return manifest["about"] if manifest["format"] == _FORMAT else None
    except Exception:  # a file of another kind fails in a dozen ways
        return None


def _read_members(file: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the manifest and every array that it lists."""
    with open_archive(file) as members:
        manifest = json.loads(members.read(_MANIFEST))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']} is not known here")
        for entry in manifest["leaves"]:
            _check_entry(entry)
        # Leaves of one member would make much of a small file.
        if len({x["member"] for x in manifest["leaves"]}) < len(manifest["leaves"]):
            raise ValueError("two leaves are in one member of the archive")
        leaves = {
            entry["path"]: (entry, _read_verified(members, entry))
            for entry in manifest["leaves"]
        }
        return leaves, manifest["about"]


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise if an entry of the manifest is not one that was written."""
    wrong = [name for name, kind in _ENTRY.items() if type(entry.get(name)) is not kind]
    if wrong or not all(type(size) is int for size in entry["shape"]):
        raise ValueError(f"a leaf of its manifest has no sound {wrong or 'shape'}")
    # Typed keys, and nothing else, have an implementation.
    if ("impl" in entry) != entry["dtype"].startswith("key<"):
        raise ValueError("a leaf of its manifest is a key without its implementation")


def _read_verified(members: zipfile.ZipFile, entry: dict[str, Any]) -> np.ndarray:
    """Read an array, compare its checksum and restore its dtype."""
    value = array_from_npy(members.read(entry["member"]))
    if _digest(value) != entry["sha256"]:
        raise ValueError(f"{entry['path']} does not have the SHA-256 it was saved with")
    # The manifest tells dtype and shape, the header of the array its byte order, which
    # the checksum does not cover: bytes are those of this machine.
    if "impl" not in entry:
        return value.view(np.dtype(entry["dtype"])).reshape(entry["shape"])
    value = value.view(value.dtype.newbyteorder("="))
    if list(value.shape[:-1]) != entry["shape"]:  # a key has a few words
        raise ValueError(f"{entry['path']} has keys of the shape {value.shape[:-1]}")
    return value
