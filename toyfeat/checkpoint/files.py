"""One file of arrays: an archive that NumPy opens too, with a manifest of digests."""

import contextlib
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from toyfeat.checkpoint.leaves import check_leaf, stored

_FORMAT = 1
_MANIFEST = "manifest.json"


class DamagedFileError(ValueError):
    """A file does not hold what was written to it."""


def write_file(path: Path, tree: Any, about: dict[str, Any], who: str) -> None:
    """Write a file that is whole or not there; ``about`` are JSON values."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    for where, leaf in leaves:
        check_leaf(where, leaf, who)
    half = path.with_name(f".{path.name}.half")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(half, "wb") as file:
            _write_members(file, leaves, about)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            error.errno,
            f"{who}: could not write {path}: {error.strerror or error}; what was "
            "saved before is whole. Make room and run the same again",
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader never sees half of it."""
    draft = path.with_name(path.name + ".partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _write_members(file: Any, leaves: list[Any], about: dict[str, Any]) -> None:
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    if len(set(names)) < len(names) or _MANIFEST in names:
        names = [f"{i}/{name}" for i, name in enumerate(names)]
    entries = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as members:
        for name, (where, leaf) in zip(names, leaves, strict=True):
            entry, value = stored(leaf)
            member = f"{name or 'tree'}.npy"
            with members.open(member, "w", force_zip64=True) as part:
                np.lib.format.write_array(part, value, allow_pickle=False)
            at = {"path": jax.tree_util.keystr(where), "member": member}
            entries.append({**at, **entry, "sha256": _digest(value)})
        text = json.dumps({"format": _FORMAT, "leaves": entries, "about": about})
        members.writestr(_MANIFEST, text)


def _sync_folder(folder: Path) -> None:
    """So that a new name outlives a loss of power, where the system can do it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(value: np.ndarray) -> str:
    flat: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return hashlib.sha256(flat).hexdigest()


def read_file(path: Path, who: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Path of a leaf to its entry and verified value; and what else was saved."""
    if not path.exists():
        raise FileNotFoundError(f"{who}: there is no {path}")
    with open(path, "rb") as file:
        try:
            return _read_members(file)
        except Exception as error:  # a damaged archive fails in a dozen ways
            reason = f"{type(error).__name__}: {error}"
            raise DamagedFileError(f"{who}: {path} is damaged ({reason})") from error


def _read_members(file: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    with zipfile.ZipFile(file) as members:
        manifest = json.loads(members.read(_MANIFEST))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']} is not known here")
        leaves = {
            entry["path"]: (entry, _verified(members, entry))
            for entry in manifest["leaves"]
        }
        return leaves, manifest["about"]


def _verified(members: zipfile.ZipFile, entry: dict[str, Any]) -> np.ndarray:
    data = io.BytesIO(members.read(entry["member"]))
    value = np.lib.format.read_array(data, allow_pickle=False)
    if _digest(value) != entry["sha256"]:
        raise ValueError(f"{entry['path']} does not have the SHA-256 it was saved with")
    if "impl" not in entry:
        value = value.view(np.dtype(entry["dtype"])).reshape(entry["shape"])
    return value
