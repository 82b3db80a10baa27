"""Encode a leaf of a tree as a NumPy array and an entry of the manifest, and back."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.processes import is_global


def check_leaf(path: Any, leaf: Any, who: str, *, local: bool = True) -> None:
    """Raise if a leaf cannot be saved to a file, one that is ``local`` to a process."""
    kind, name = type(leaf).__name__, jax.tree_util.keystr(path) or "the tree"
    if not (_is_number(leaf) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))):
        raise TypeError(
            f"{who}: {name} is a {kind}, wanted an array or a number; convert it"
        )
    if not _is_number(leaf) and not _is_key(leaf) and not _is_numeric(leaf.dtype):
        raise TypeError(
            f"{who}: {name} has dtype {leaf.dtype}, wanted numbers or bools; convert it"
        )
    if _is_number(leaf) and np.asarray(leaf).dtype == object:
        raise ValueError(
            f"{who}: {name} must be an int of at most 64 bits, got {leaf:.3e}; save it "
            "as a float, or as several numbers"
        )
    if local and is_global(leaf):
        raise ValueError(
            f"{who}: {name} is spread over several processes; gather it first with "
            "jax.experimental.multihost_utils.process_allgather"
        )


def _is_number(leaf: Any) -> bool:
    """Return whether a leaf is a Python number."""
    return isinstance(leaf, bool | int | float | complex)


def _is_key(leaf: Any) -> bool:
    """Return whether a leaf is a typed PRNG key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_numeric(dtype: Any) -> bool:
    """Return whether a dtype holds numbers or bools."""
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


def encode_leaf(leaf: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Return the manifest's entry of a leaf, and its bits in a dtype of NumPy."""
    # Keys are saved as their data, with the implementation in the entry.
    if not _is_number(leaf) and _is_key(leaf):
        key = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        key["impl"] = str(jax.random.key_impl(leaf))
        return key, np.asarray(jax.random.key_data(leaf))
    # Numbers and arrays are saved in the byte order of this machine.
    value = np.asarray(leaf)
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    value = np.ascontiguousarray(value)
    entry = {"dtype": str(value.dtype), "shape": list(np.shape(leaf))}
    entry |= {"number": True} if _is_number(leaf) else {}
    # NumPy's format does not know bfloat16 and the like: save unsigned integers.
    if value.dtype.isbuiltin != 1:
        value = value.view(f"u{value.dtype.itemsize}")
    return entry, value.reshape(entry["shape"])


def leaf_entry(leaf: Any) -> dict[str, Any]:
    """Return the dtype and shape of a leaf, as the manifest would hold them."""
    dtype = getattr(leaf, "dtype", None)
    if isinstance(dtype, np.dtype):
        dtype = dtype.newbyteorder("=")
    if _is_number(leaf):
        return {"dtype": str(np.asarray(leaf).dtype), "shape": [], "number": True}
    return {"dtype": str(dtype), "shape": list(leaf.shape)}


def format_entry(entry: dict[str, Any]) -> str:
    """Format dtype and shape, such as ``float32[3,4]``."""
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"


def entries_match(entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Return whether a saved leaf can be loaded as the wanted one.

    Arrays need the same shape and dtype; a Python number matches a scalar of its kind
    (bool, int, float or complex).
    """
    if entry["shape"] != wanted["shape"]:
        return False
    names = entry["dtype"], wanted["dtype"]
    if "key<" in "".join(names) or not ("number" in entry or "number" in wanted):
        return names[0] == names[1]
    # Unsigned integers count as integers, bfloat16 (kind "V") as a float.
    kinds = [np.dtype(n).kind.replace("u", "i").replace("V", "f") for n in names]
    return kinds[0] == kinds[1]


def changes_on_load(leaf: Any, entry: dict[str, Any], value: np.ndarray) -> bool:
    """Return whether a saved number has no place in the dtype of ``leaf``.

    Whole numbers must stay as they are; a fraction is rounded, but neither to 0 nor to
    infinity.  Arrays have the same dtype and do not change.
    """
    if "number" not in entry or "impl" in entry or _is_number(leaf):
        return False
    with np.errstate(all="ignore"):
        loaded = value.astype(leaf.dtype).astype(value.dtype)
    if value.dtype.kind not in "fc":
        return loaded.item() != value.item()
    old, new = complex(value.item()), complex(loaded.item())
    return _is_lost(old.real, new.real) or _is_lost(old.imag, new.imag)


def _is_lost(old: float, new: float) -> bool:
    """Return whether a float is more than rounded."""
    if old == new or math.isnan(old):
        return False
    return old.is_integer() or new == 0 or not math.isfinite(new)


def decode_leaf(leaf: Any, entry: dict[str, Any], value: np.ndarray) -> Any:
    """Convert a saved value to the type, dtype and sharding of ``leaf``."""
    # Python numbers and NumPy arrays stay on the host.
    if _is_number(leaf):
        return type(leaf)(value.item())
    if isinstance(leaf, np.ndarray | np.generic):
        return value.astype(leaf.dtype)[() if isinstance(leaf, np.generic) else ...]
    # JAX arrays and keys; then put them where the leaf is.
    if is_global(leaf):
        is_key = "impl" in entry
        data = jax.random.key_data(leaf) if is_key else leaf
        value = value.astype(data.dtype)
        result = jax.make_array_from_callback(
            data.shape, data.sharding, lambda index: value[index]
        )
        impl = entry.get("impl")
        return jax.random.wrap_key_data(result, impl=impl) if is_key else result
    if "impl" in entry:
        result = jax.random.wrap_key_data(jnp.array(value), impl=entry["impl"])
    else:
        result = jnp.array(value, leaf.dtype)  # a copy that may be donated
    sharding = leaf.sharding if getattr(leaf, "committed", True) else None
    return result if sharding is None else jax.device_put(result, sharding)
