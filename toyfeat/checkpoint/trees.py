"""Trees of arrays to disk and back: whole and verified, or an error."""

from pathlib import Path
from typing import Any

import jax

from toyfeat.checkpoint.files import read_file, write_file
from toyfeat.checkpoint.leaves import check_leaf, described, entry_of, fits, returned


def save_tree(path: str | Path, tree: Any) -> None:
    """Write a pytree of arrays to one file.

    A file of that name is replaced in one step: whoever reads, and a process that
    is killed, finds the old one or the new one, never a part.  Values are kept bit
    by bit, in any dtype of JAX, typed PRNG keys too.

    Args:
      path: of the file, by habit ``something.npz``; folders are made.
      tree: :class:`toyfeat.Basis`, :class:`toyfeat.Moments` or any other pytree
        whose leaves are arrays or Python numbers.

    Raises:
      TypeError: if a leaf is something else.
      ValueError: if a leaf is spread over several processes.
      OSError: if the disk is full or the file cannot be written; what was there
        before is still there.

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
    """Read what :func:`save_tree` wrote.

    Args:
      path: of the file.
      like: a tree of the same structure, shapes and dtypes; its leaves may be
        ``jax.ShapeDtypeStruct``, as of ``jax.eval_shape``.

    Returns:
      The tree, with NumPy arrays where ``like`` has them, Python numbers where it
      has those and JAX arrays, sharded alike, elsewhere.

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
    return shaped_like(leaves, like, Path(path), "load_tree")


def shaped_like(leaves: dict[str, Any], like: Any, path: Path, who: str) -> Any:
    """The leaves of a file as the tree that was asked for, or what differs."""
    wanted, treedef = jax.tree_util.tree_flatten_with_path(like)
    for where, leaf in wanted:
        check_leaf(where, leaf, who)
    named = {jax.tree_util.keystr(where): leaf for where, leaf in wanted}
    wrong = [f"{p or 'it'} is not in the file" for p in named if p not in leaves]
    wrong += [f"{p or 'it'} is in the file only" for p in leaves if p not in named]
    for at in set(named) & set(leaves):
        found, asked = described(leaves[at][0]), described(entry_of(named[at]))
        if not fits(leaves[at][0], entry_of(named[at])):
            wrong.append(f"{at or 'it'} is {found} in the file, wanted {asked}")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(
            f"{who}: {path} holds another tree: {'; '.join(sorted(wrong)[:6])}{more}"
        )
    values = [returned(leaf, *leaves[at]) for at, leaf in named.items()]
    return jax.tree.unflatten(treedef, values)
