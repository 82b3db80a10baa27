"""Save a tree of arrays to one file and load it, verified by checksums."""

from pathlib import Path
from typing import Any

import jax

from toyfeat.checkpoint.files import read_file, write_file
from toyfeat.checkpoint.leaves import (
    changes_on_load,
    check_leaf,
    decode_leaf,
    entries_match,
    format_entry,
    leaf_entry,
)

_MAX_LISTED = 6  # differences in an error message, about what a person reads
_MAX_TEXT = 400  # characters of a difference: a damaged file may have any path


def save_tree(path: str | Path, tree: Any) -> None:
    """Write a pytree of arrays to one file.

    A file of that name is replaced atomically: a reader finds the old one or the new
    one, never a part, even if the process is killed.  Values are saved bit by bit, in
    any dtype of JAX, typed PRNG keys included.

    Args:
      path: of the file, by convention ``NAME.npz``; missing folders are made.
      tree: :class:`toyfeat.Basis`, :class:`toyfeat.Moments` or any other pytree
        whose leaves are arrays or Python numbers.

    Raises:
      TypeError: if a leaf is something else.
      ValueError: if a leaf is spread over several processes, or an int has more than
        64 bits.
      OSError: if the disk is full or the file cannot be written; a file that was
        there before is untouched.

    Example:
      >>> import jax.numpy as jnp, numpy as np, tempfile
      >>> tree = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_tree(folder + "/tree.npz", tree)
      ...     print(np.load(folder + "/tree.npz")["w"])
      ...     again = load_tree(folder + "/tree.npz", tree)
      [0. 1. 2.]
      >>> bool((again["w"] == tree["w"]).all() and again["key"] == tree["key"])
      True
    """
    write_file(Path(path), tree, {}, "save_tree")


def load_tree(path: str | Path, like: Any) -> Any:
    """Load a tree that :func:`save_tree` wrote.

    Args:
      path: of the file.
      like: a tree of the same structure, shapes and dtypes; its leaves may be
        ``jax.ShapeDtypeStruct``, as of ``jax.eval_shape``.

    Returns:
      The tree, with NumPy arrays and Python numbers where ``like`` has them, and JAX
      arrays, sharded like those of ``like``, elsewhere.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, or holds another tree; the message says
        which leaves differ.
      TypeError: if a leaf of ``like`` is not an array.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_tree(folder + "/tree.npz", {"w": jnp.arange(3.0)})
      ...     load_tree(folder + "/tree.npz", {"w": jnp.zeros(4)})
      Traceback (most recent call last):
      ValueError: load_tree: ... ['w'] is float32[3] in the file, wanted float32[4]...
    """
    leaves, _ = read_file(Path(path), "load_tree")
    return unflatten_like(leaves, like, Path(path), "load_tree")


def unflatten_like(leaves: dict[str, Any], like: Any, path: Path, who: str) -> Any:
    """Build a tree with the structure of ``like``, or raise with what differs."""
    check_fits(leaves, like, path, who)
    wanted, treedef = jax.tree_util.tree_flatten_with_path(like)
    named = {jax.tree_util.keystr(leaf_path): leaf for leaf_path, leaf in wanted}
    try:
        values = [decode_leaf(leaf, *leaves[name]) for name, leaf in named.items()]
    except (TypeError, ValueError, KeyError) as error:  # shapes and dtypes are right
        raise ValueError(
            f"{who}: {path} has keys of an implementation that is not known here: "
            f"{error}"
        ) from error
    return jax.tree.unflatten(treedef, values)


def check_fits(leaves: dict[str, Any], like: Any, path: Path, who: str) -> None:
    """Raise unless a file has the leaves of a tree.

    Args:
      leaves: path of a leaf to its entry and value; the value of an array may be
        ``None``.
      like: the tree.
      path: of the file.
      who: the function, for messages.

    Raises:
      ValueError: with the leaves that differ.
      TypeError: if a leaf of the tree is not an array.
    """
    wanted, _ = jax.tree_util.tree_flatten_with_path(like)
    for leaf_path, leaf in wanted:
        check_leaf(leaf_path, leaf, who, local=False)
    named = {jax.tree_util.keystr(leaf_path): leaf for leaf_path, leaf in wanted}
    # Collect all differences before raising: missing, extra and unlike leaves.
    wrong = [f"{p or 'it'} is not in the file" for p in named if p not in leaves]
    wrong += [f"{p or 'it'} is in the file only" for p in leaves if p not in named]
    for name in set(named) & set(leaves):
        saved, like_entry = leaves[name][0], leaf_entry(named[name])
        if not entries_match(saved, like_entry):
            wrong.append(
                f"{name or 'it'} is {format_entry(saved)} in the file, wanted "
                f"{format_entry(like_entry)}"
            )
        elif changes_on_load(named[name], *leaves[name]):
            wrong.append(
                f"{name or 'it'} is {leaves[name][1].item()!r} in the file, which "
                f"{format_entry(like_entry)} does not hold"
            )
    if wrong:
        num_hidden = max(len(wrong) - _MAX_LISTED, 0)
        listed = "; ".join(text[:_MAX_TEXT] for text in sorted(wrong)[:_MAX_LISTED])
        listed += f" and {num_hidden} more" if num_hidden else ""
        raise ValueError(
            f"{who}: {path} holds another tree: {listed}; load it like that"
        )
