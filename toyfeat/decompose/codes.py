"""Coordinates in a basis, and what can be said of it in words."""

import jax.numpy as jnp
import numpy as np

from toyfeat.linalg.precise import dot
from toyfeat.types import Array, Basis


def encode(basis: Basis, acts: Array) -> Array:
    """Coordinates ``(acts - mean) @ readers`` of activations.

    Args:
      basis: from any decomposition.
      acts: ``[..., D]``.

    Returns:
      ``[..., R]``, in the dtype of the basis.

    Raises:
      ValueError: if the width of ``acts`` is not that of the basis.
    """
    _check_width("encode", "acts", acts, basis.readers.shape[0])
    acts = acts.astype(basis.mean.dtype)
    return dot(acts - jnp.broadcast_to(basis.mean, acts.shape), basis.readers)


def decode(basis: Basis, codes: Array) -> Array:
    """Activations ``codes @ writers + mean`` of coordinates.

    Args:
      basis: from any decomposition.
      codes: ``[..., R]``.

    Returns:
      ``[..., D]``, in the dtype of the basis.

    Raises:
      ValueError: if there is not one code per pair of the basis.
    """
    _check_width("decode", "codes", codes, basis.writers.shape[0])
    acts = dot(codes.astype(basis.mean.dtype), basis.writers)
    return acts + jnp.broadcast_to(basis.mean, acts.shape)


def explanation(basis: Basis) -> str:
    """Say in a sentence what rank a basis has, and why if it is low.

    Directions that share an eigenvalue are named (see :func:`eigengaps`).

    Args:
      basis: with concrete values (outside of jit).

    Returns:
      One sentence.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as tf
      >>> w = jnp.ones(2)
      >>> stats = tf.Moments(jnp.array(1.0), w, jnp.eye(2), w, jnp.ones((2, 2)))
      >>> print(tf.explanation(tf.gradient_pca(stats, 2, center=True)))
      rank 0: centring removed everything, the data are constant to rounding
    """
    sentence = _on_rank(basis)
    shared = _shared_values(basis)
    return f"{sentence}; {shared}" if shared else sentence


def _on_rank(basis: Basis) -> str:
    rank, total, cut, removed = (float(d) for d in basis.diagnostics)
    width = len(basis.spectrum)
    if not all(map(bool, jnp.isfinite(basis.spectrum))):
        return "rank unknown: the statistics are not finite, see check_taps"
    if rank == 0 and removed > 0.5:
        return "rank 0: centring removed everything, the data are constant to rounding"
    if rank == 0:
        return "rank 0: the second moment is zero"
    if rank < width:
        return f"rank {rank:.0f} of {width}: the rest is below {cut:.1e}"
    kept = float(jnp.sum(basis.spectrum)) / total if total > 0 else 1.0
    return f"rank {rank:.0f}: {100 * kept:.1f} % of the total is kept"


def eigengaps(
    basis: Basis, *, tolerance: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    r"""Relative gaps of a spectrum, and the groups of directions that share a value.

    The gap of direction ``i`` is :math:`(\lambda_i - \lambda_{i+1}) / \lambda_i`,
    that of the last one is to 0.  Directions with smaller gaps than the tolerance
    between them are determined as a subspace only: any rotation inside it is as
    good.

    Args:
      basis: with concrete values (outside of jit).
      tolerance: gaps below it count as none.

    Returns:
      ``gaps [R]``, and ``groups [R]`` int: directions of one group share a
      number; directions past the rank have -1.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Basis, Diagnostics
      >>> eye, spectrum = jnp.eye(3), jnp.array([2.0, 1.0, 1.0])
      >>> diagnostics = Diagnostics(jnp.array(3), jnp.array(4.0), *jnp.zeros(2))
      >>> gaps, groups = eigengaps(Basis(jnp.zeros(3), eye, eye, spectrum, diagnostics))
      >>> gaps.tolist(), groups.tolist()
      ([0.5, 0.0, 1.0], [0, 1, 1])
    """
    values = np.asarray(basis.spectrum, float)
    after = np.append(values[1:], 0.0)
    gaps = (values - after) / np.where(values > 0, values, 1.0)
    starts = np.append(True, gaps[:-1] >= tolerance)[: len(values)]
    return gaps, np.where(values > 0, np.cumsum(starts) - 1, -1)


def _shared_values(basis: Basis) -> str:
    _, groups = eigengaps(basis)
    sets = [np.flatnonzero(groups == g) for g in range(groups.max(initial=-1) + 1)]
    names = [f"{s[0] + 1}-{s[-1] + 1}" for s in sets if len(s) > 1]
    if not names:
        return ""
    more = f" and {len(names) - 5} more groups" if len(names) > 5 else ""
    return (
        f"directions {', '.join(names[:5])}{more} share an eigenvalue: only the space "
        "they span is determined"
    )


def _check_width(who: str, name: str, array: Array, width: int) -> None:
    if array.shape[-1:] != (width,):
        raise ValueError(
            f"{who}: wanted {name} [..., {width}], got shape {array.shape}"
        )
