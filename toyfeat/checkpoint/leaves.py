"""A leaf of a tree as a NumPy array with an entry in the manifest, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_leaf(where: Any, leaf: Any, who: str) -> None:
    """Raise if a leaf cannot be kept in a file."""
    kind, at = type(leaf).__name__, jax.tree_util.keystr(where) or "the tree"
    if not (_is_number(leaf) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))):
        raise TypeError(f"{who}: {at} is a {kind}, wanted an array or a number")
    if not _is_number(leaf) and not _is_key(leaf) and not _is_numeric(leaf.dtype):
        raise TypeError(f"{who}: {at} has dtype {leaf.dtype}, wanted numbers or bools")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"{who}: {at} is spread over several processes; gather it first with "
            "jax.experimental.multihost_utils.process_allgather"
        )


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_numeric(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


def stored(leaf: Any) -> tuple[dict[str, Any], np.ndarray]:
    """What the manifest says of a leaf, and an array of NumPy's own dtypes."""
    if not _is_number(leaf) and _is_key(leaf):
        key = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        key["impl"] = str(jax.random.key_impl(leaf))
        return key, np.asarray(jax.random.key_data(leaf))
    value = np.asarray(leaf)
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    value = np.ascontiguousarray(value)
    entry = {"dtype": str(value.dtype), "shape": list(np.shape(leaf))}
    entry |= {"number": True} if _is_number(leaf) else {}
    if value.dtype.isbuiltin != 1:  # bfloat16 and its like
        value = value.view(f"u{value.dtype.itemsize}")
    return entry, value.reshape(entry["shape"])


def entry_of(leaf: Any) -> dict[str, Any]:
    """What the manifest would say of a leaf that is asked for."""
    if _is_number(leaf):
        return {"dtype": str(np.asarray(leaf).dtype), "shape": [], "number": True}
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def described(entry: dict[str, Any]) -> str:
    """As ``float32[3,4]``."""
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"


def fits(entry: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Python numbers fit scalars of their kind; arrays fit what is the same."""
    if entry["shape"] != asked["shape"]:
        return False
    names = entry["dtype"], asked["dtype"]
    if "key<" in "".join(names) or not ("number" in entry or "number" in asked):
        return names[0] == names[1]
    kinds = [np.dtype(n).kind.replace("u", "i").replace("V", "f") for n in names]
    return kinds[0] == kinds[1]


def returned(leaf: Any, entry: dict[str, Any], value: np.ndarray) -> Any:
    """A value in the form of the leaf that is asked for."""
    if _is_number(leaf):
        return type(leaf)(value.item())
    if isinstance(leaf, np.ndarray | np.generic):
        return value.astype(leaf.dtype)[() if isinstance(leaf, np.generic) else ...]
    if "impl" in entry:
        result = jax.random.wrap_key_data(jnp.array(value), impl=entry["impl"])
    else:
        result = jnp.array(value, leaf.dtype)  # a copy, which may be donated
    sharding = leaf.sharding if getattr(leaf, "committed", True) else None
    return result if sharding is None else jax.device_put(result, sharding)
