"""Checkpoints that every process writes its part of: orbax, with our digests on top.

A checkpoint is a folder: ``arrays/`` is orbax's, ``manifest.json`` has the SHA-256 of
every file in it.  It is written under another name and renamed when it is complete.
"""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint.files import DamagedFileError, sync_folder, writing
from toyfeat.checkpoint.leaves import leaf_entry
from toyfeat.files.atomic import open_draft
from toyfeat.files.json import read_json
from toyfeat.files.paths import inside
from toyfeat.processes import gather, num_processes, process_index, together

_FORMAT = 1  # version of the manifest
_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_AGAIN = "copy it again, or go back to an earlier checkpoint"


def check_orbax(who: str) -> None:
    """Raise an ImportError that says what to install, if orbax is missing."""
    _import_orbax(who)


def _import_orbax(who: str) -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            f"{who}: checkpoints of several processes need orbax-checkpoint: "
            'pip install "toyfeat[processes]"'
        ) from error


def start_write(
    path: Path, tree: Any, about: dict[str, Any], who: str
) -> Callable[[], None]:
    """Begin to write a tree of global arrays; every process has to do it.

    Values are copied before it returns, and written while the caller goes on.

    Args:
      path: of the checkpoint, in a folder that all processes share.
      tree: of global arrays.
      about: JSON values to save with it.
      who: the function, for messages.

    Returns:
      Function that waits until all is written, flushed and in its place; every process
      has to call it, at the same point of the program.
    """
    ocp = _import_orbax(who)
    draft = draft_of(path)
    with _all_write(path, who):
        if process_index() == 0:
            if draft.exists():
                shutil.rmtree(draft)
            draft.mkdir(parents=True)
    entries, arrays = _flatten(tree)
    if jax.default_backend() == "cpu":  # where the host's copy is no copy
        arrays = jax.tree.map(jnp.copy, arrays)
    saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    saver.save((draft / _ARRAYS).absolute(), args=ocp.args.PyTreeSave(arrays))
    body = {"leaves": entries, "about": about}
    return partial(_finish_write, saver, path, body, who)


def draft_of(path: Path) -> Path:
    """Name a checkpoint that is not complete."""
    return path.with_name(f".{path.name}.draft")


def _flatten(tree: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Number the leaves: an entry of each for the manifest, and its array."""
    entries, arrays = [], {}
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    for number, (path, leaf) in enumerate(leaves):
        entry = {"path": jax.tree_util.keystr(path), "name": str(number)}
        entry |= leaf_entry(leaf)
        if _is_key(leaf):
            entry["impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        entries.append(entry)
        arrays[str(number)] = leaf
    return entries, arrays


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _finish_write(saver: Any, path: Path, body: dict[str, Any], who: str) -> None:
    """Wait for the files, write their digests, and put the checkpoint in its place."""
    draft, own = draft_of(path), {}
    with _all_write(path, who):
        saver.wait_until_finished()
        saver.close()
    # Each process flushes and hashes a share of the files of all.
    with _all_write(path, who):
        files = _list_files(draft / _ARRAYS)
        own = {name: _digest(draft / _ARRAYS / name) for name in _share(files)}
    digests: dict[str, str] = {}
    for part in gather(own):
        digests |= part
    with _all_write(path, who):
        if process_index() == 0:
            _write_manifest(draft, body | {"files": digests})
            sync_folder(draft)
            os.rename(draft, path)
            sync_folder(path.parent)


@contextlib.contextmanager
def _all_write(path: Path, who: str) -> Iterator[None]:
    """Run a block in all processes; an error says that earlier checkpoints stay."""
    with together(who), writing(path, who):
        yield


def _list_files(folder: Path) -> list[str]:
    """List the files below a folder, by their paths in it, in order."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _share(files: list[str], several: bool = True) -> list[str]:
    """Choose the files that this process reads."""
    return files[process_index() :: num_processes()] if several else files


def _digest(path: Path) -> str:
    """Flush a file to the disk and compute its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write the manifest with a digest of itself."""
    text = json.dumps(body, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with open_draft(folder / _MANIFEST) as file:
        whole = {"format": _FORMAT, "sha256": digest, "body": body}
        file.write(json.dumps(whole, sort_keys=True).encode())


def read_manifest(path: Path, who: str) -> dict[str, Any]:
    """Read leaves, files and what was saved with them.

    Raises:
      DamagedFileError: if it is not what was written.
    """
    try:
        whole = read_json(path / _MANIFEST, who, advice=_AGAIN)
        if whole.get("format") != _FORMAT:
            raise ValueError(f"format {whole.get('format')!r:.40} is not known here")
        text = json.dumps(whole.get("body"), sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != whole.get("sha256"):
            raise ValueError("its manifest does not have its SHA-256")
    except (ValueError, OSError) as error:
        raise DamagedFileError(f"{who}: {path} is damaged ({error})") from error
    return whole["body"]


def verify_files(path: Path, body: dict[str, Any], who: str, several: bool) -> None:
    """Compare the files of a checkpoint with their digests.

    Args:
      path: of the checkpoint.
      body: of its manifest.
      who: the function, for messages.
      several: whether all processes do this, each with a share.

    Raises:
      DamagedFileError: if a file is missing or not what was written.
    """
    fault, digests = None, body["files"]
    try:
        for name in _share(sorted(digests), several):
            if _digest(inside(path / _ARRAYS, name, who)) != digests[name]:
                fault = f"{_ARRAYS}/{name} does not have the SHA-256 it was saved with"
    except OSError as error:
        fault = f"{type(error).__name__}: {error}"
    faults = gather(fault) if several else [fault]
    for fault in faults:
        if fault is not None:
            raise DamagedFileError(f"{who}: {path} is damaged ({fault})")


def read_arrays(
    path: Path, body: dict[str, Any], like: Any, who: str, several: bool
) -> Any:
    """Read a tree from verified files, laid out like another.

    Args:
      path: of the checkpoint.
      body: of its manifest.
      like: tree of arrays of the shapes and dtypes that were saved, on any devices.
      who: the function, for messages.
      several: whether all processes do this.

    Returns:
      The tree.

    Raises:
      DamagedFileError: if orbax cannot read what was written.
    """
    ocp = _import_orbax(who)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = {entry["path"]: entry["name"] for entry in body["leaves"]}
    wanted = {}
    for leaf_path, leaf in leaves:
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        wanted[names[jax.tree_util.keystr(leaf_path)]] = data
    options = {
        name: ocp.ArrayRestoreArgs(
            sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
        )
        for name, x in wanted.items()
    }
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in wanted.items()}
    args = ocp.args.PyTreeRestore(item=shapes, restore_args=options)
    arrays: dict[str, Any] = {}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore((path / _ARRAYS).absolute(), args=args)
    except Exception as error:  # files are whole, so that this is a fault of versions
        raise DamagedFileError(f"{who}: {path} cannot be read ({error})") from error
    values = []
    for leaf_path, leaf in leaves:
        value = arrays[names[jax.tree_util.keystr(leaf_path)]]
        if not getattr(leaf, "committed", True):
            value = jnp.array(np.asarray(value))  # on no device in particular
        if _is_key(leaf):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        values.append(value)
    return jax.tree.unflatten(treedef, values)


def remove(path: Path) -> None:
    """Remove a checkpoint, so that a kill leaves no part of it under its name."""
    draft = draft_of(path)
    if draft.exists():
        shutil.rmtree(draft)
    os.rename(path, draft)
    shutil.rmtree(draft)


def checksum(tree: Any) -> int:
    """Compute a checksum of arrays of several processes, wherever they lie."""
    total = sum(_leaf_checksum(leaf) for leaf in jax.tree.leaves(tree))
    return int(np.asarray(total)) % 2**32


@jax.jit
def _leaf_checksum(leaf: Any) -> Any:
    """Sum the words of an array, each times an odd number of its place."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    bits = min(8 * leaf.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(leaf, f"uint{bits}").astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(size) + index
    return jnp.sum(words * (place * jnp.uint32(2) + jnp.uint32(1)))
