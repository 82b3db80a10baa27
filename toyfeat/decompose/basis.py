"""Encode, decode, truncate and describe with a basis."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_array, check_int, check_type
from toyfeat.linalg.precision import dot
from toyfeat.types import Array, Basis, Taps

_CONSTANT_SHARE = 0.5
"""Share of the second moment that centring removed where data count as constant.

Any number between 0 and 1 would do: where the rank is 0, centring removed nothing
or, to rounding, everything.
"""

_NAMED_GROUPS = 5
"""Groups of equal eigenvalues that a sentence names; a matter of length."""


def encode(basis: Basis, acts: Array) -> Array:
    """Encode activations as ``(acts - mean) @ readers``.

    Args:
      basis: from any decomposition.
      acts: ``[..., D]``.

    Returns:
      ``[..., R]``, in the dtype of the basis.

    Raises:
      ValueError: if the width of ``acts`` is not that of the basis.
      TypeError: if ``basis`` is no basis or ``acts`` no real array.
    """
    acts = _check_rows("encode", basis, "acts", acts)
    acts = acts.astype(basis.mean.dtype)
    return dot(acts - jnp.broadcast_to(basis.mean, acts.shape), basis.readers)


def decode(basis: Basis, codes: Array) -> Array:
    """Decode codes to activations ``codes @ writers + mean``.

    Args:
      basis: from any decomposition.
      codes: ``[..., R]``.

    Returns:
      ``[..., D]``, in the dtype of the basis.

    Raises:
      ValueError: if there is not one code per pair of the basis.
      TypeError: if ``basis`` is no basis or ``codes`` no real array.
    """
    codes = _check_rows("decode", basis, "codes", codes)
    acts = dot(codes.astype(basis.mean.dtype), basis.writers)
    return acts + jnp.broadcast_to(basis.mean, acts.shape)


def truncated(basis: Basis, rank: int) -> Basis:
    """Cut a basis to its first directions.

    Args:
      basis: from any decomposition.
      rank: how many directions to leave, ``1 .. R``.

    Returns:
      The basis of the first ``rank`` directions.  The diagnostics stay those of
      the decomposition, except that their rank is at most the new one.

    Raises:
      ValueError: if ``rank`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.types import Moments
      >>> from toyfeat.decompose import pca
      >>> stats = Moments(jnp.array(1.0), jnp.zeros(2), jnp.diag(jnp.array([1.0, 4.0])))
      >>> truncated(pca(stats, 2), 1).spectrum.tolist()
      [4.0]
    """
    _check_basis("truncated", basis)
    width = basis.spectrum.shape[-1]
    rank = check_int(
        "truncated", "rank", rank, most=width, about=", directions of the basis"
    )
    diagnostics = basis.diagnostics
    return basis._replace(
        readers=basis.readers[:, :rank],
        writers=basis.writers[:rank],
        spectrum=basis.spectrum[:rank],
        diagnostics=diagnostics._replace(rank=jnp.minimum(diagnostics.rank, rank)),
    )


def describe(basis: Basis) -> str:
    """Describe the rank of a basis in a sentence, and why it is low if it is.

    Directions that share an eigenvalue are named (see :func:`eigengaps`).

    Args:
      basis: with concrete values (outside of jit).

    Returns:
      One sentence.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> w = jnp.ones(2)
      >>> stats = ft.Moments(jnp.array(1.0), w, jnp.eye(2), w, jnp.ones((2, 2)))
      >>> print(ft.describe(ft.gradient_pca(stats, 2, center=True)))
      rank 0: centring removed everything, the data are constant to rounding
    """
    _check_basis("describe", basis)
    if isinstance(basis.spectrum, Tracer):
        raise TypeError(
            "describe: basis must have known values, got a traced one; call it outside "
            "of jax.jit"
        )
    sentence = _describe_rank(basis)
    shared = _describe_shared_values(basis)
    return f"{sentence}; {shared}" if shared else sentence


def _describe_rank(basis: Basis) -> str:
    """Describe the rank, and why it is low."""
    # Reasons in order: broken, constant, zero, and too few directions.
    rank, total, cut, removed = (float(d) for d in basis.diagnostics)
    width = len(basis.spectrum)
    if not all(map(bool, jnp.isfinite(basis.spectrum))):
        return "rank unknown: the statistics are not finite, see check_taps"
    if rank == 0 and removed > _CONSTANT_SHARE:
        return "rank 0: centring removed everything, the data are constant to rounding"
    if rank == 0:
        return "rank 0: the second moment is zero"
    if rank < width:
        return f"rank {rank:.0f} of {width}: the rest is below {cut:.1e}"
    share = float(jnp.sum(basis.spectrum)) / total if total > 0 else 1.0
    return f"rank {rank:.0f}: {100 * share:.1f} % of the total is kept"


def eigengaps(
    basis: Basis, *, tolerance: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    r"""Compute relative eigengaps, and group the directions that share a value.

    The gap of direction ``i`` is :math:`(\lambda_i - \lambda_{i+1}) / \lambda_i`; the
    last one's is to 0.  Directions with gaps below the tolerance between them are
    determined as a subspace only: any rotation inside it is as good.

    Args:
      basis: with concrete values (outside of jit).
      tolerance: gaps below it count as 0.

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
    _check_basis("eigengaps", basis)
    values = np.asarray(basis.spectrum, float)
    following = np.append(values[1:], 0.0)
    gaps = (values - following) / np.where(values > 0, values, 1.0)
    # A group starts at the first direction and behind every gap.
    starts = np.append(True, gaps[:-1] >= tolerance)[: len(values)]
    return gaps, np.where(values > 0, np.cumsum(starts) - 1, -1)


def _describe_shared_values(basis: Basis) -> str:
    """Name the directions that share an eigenvalue; empty if there are none."""
    # Only groups of two or more directions leave a choice.
    _, groups = eigengaps(basis)
    sets = [np.flatnonzero(groups == g) for g in range(groups.max(initial=-1) + 1)]
    names = [f"{s[0] + 1}-{s[-1] + 1}" for s in sets if len(s) > 1]
    if not names:
        return ""
    hidden = len(names) - _NAMED_GROUPS
    others = f" and {hidden} more groups" if hidden > 0 else ""
    return (
        f"directions {', '.join(names[:_NAMED_GROUPS])}{others} share an eigenvalue: "
        "only the space they span is determined"
    )


def _check_basis(who: str, basis: Any) -> None:
    """Check that a basis is one, of one site."""
    hint = "toyfeat.pca and its like return one"
    if isinstance(basis, Mapping):
        hint = "pass that of one site, bases[site]"
    check_type(who, "basis", basis, Basis, hint=hint)


def _check_rows(who: str, basis: Any, name: str, array: Any) -> Array:
    """Check the basis, and the type and the last axis of what it is applied to."""
    _check_basis(who, basis)
    # A real array ...
    hint = "convert it with jnp.asarray"
    if isinstance(array, Taps | Mapping):
        hint = "pass the activations, taps.acts (of one site)"
    array = check_array(who, name, array, hint=hint)
    # ... of the width of the basis.
    width = basis.readers.shape[0] if name == "acts" else basis.writers.shape[0]
    if array.shape[-1:] != (width,):
        raise ValueError(
            f"{who}: wanted {name} [..., {width}], got shape {array.shape}; the basis "
            f"is of {basis.readers.shape[0]} units and {len(basis.writers)} directions"
        )
    return array
