r"""Attention heads, which read a residual stream by subspaces.

A head adds :math:`\sum_s A_{ts}\, x_s V O` at position :math:`t`, with
:math:`A = \mathrm{softmax}_s(x_t Q K^\top x_s^\top / \sqrt{d})`.

What can be known of a head: three subspaces of ``d`` dimensions, the column spans of
:math:`Q`, :math:`K` and :math:`V`, and no basis of any.  The model does not change
under :math:`Q B, K B^{-\top}` nor under :math:`V B, B^{-1} O` for invertible :math:`B`,
so no direction inside of a span means anything.  Each span is known where the others
are used: gradients at :math:`x_t` lie in that of :math:`Q` as far as the keys it is
compared with differ and their values do, and heads whose attention is the same for all
inputs are known as a sum of :math:`V O` only.

References:
  Elhage et al. (2021), "A mathematical framework for transformer circuits".
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.models.planted.heads import (
    SITE,
    check_ints,
    dot,
    dual,
    rotation,
    unit,
)
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_function
from toyfeat.types import Array, Params

# Parts of a head, in the order of rows: what it reads as query, as key, and as value.
_PARTS = 3


def attention_reads(
    key: Array,
    *,
    heads: int = 2,
    head_dim: int = 2,
    dim: int = 24,
    positions: int = 4,
    probability: float = 0.3,
    sharpness: float = 2.0,
) -> Task:
    """Plant the query, key and value subspaces of attention heads.

    The site is the residual at the first of ``positions`` positions, which attend to
    each other in both directions, so that it is query, key and value at once.  At every
    position each subspace is filled by normal numbers with a probability, and is 0
    otherwise.  With ``3 * heads * head_dim <= dim`` every subspace sees its own source
    alone; with more the reads are random, in superposition.

    Args:
      key: random key of the task.
      heads: ``H``.
      head_dim: dimensions ``d`` of a head.
      dim: width ``D``, at least ``head_dim``.
      positions: ``T``, at least 2.
      probability: of the source of a subspace to be active at a position.
      sharpness: factor of the attention scores.

    Returns:
      :class:`toyfeat.models.planted.Task` with ``3 H d`` rows and ``3 H`` groups: of
      every head its query, key and value.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.

    Example:
      >>> import jax
      >>> task = attention_reads(jax.random.key(0), heads=1)
      >>> task.truth.readers.shape, task.truth.group.tolist()
      ((6, 24), [0, 0, 1, 1, 2, 2])
    """
    _check(heads, head_dim, dim, positions, probability, sharpness)
    num = _PARTS * heads * head_dim
    params = _draw_heads(key, heads, head_dim, dim, sharpness)
    place = "in superposition in" if num > dim else "in"
    return Task(
        probed=_PROBED,
        params=params,
        sample=partial(_sources, heads, head_dim, positions, probability),
        site=SITE,
        truth=Truth(
            readers=params["readers"].reshape(num, dim),
            writers=params["writers"],
            frequency=jnp.full(num, probability),
            group=jnp.repeat(jnp.arange(_PARTS * heads), head_dim),
        ),
        side="mechanisms",
        name="attention reads",
        features=_at_the_site,
        fit=0.0,
        ignored=None,
        about=f"{heads} heads that read {head_dim} dimensions each as query, key and "
        f"value, {place} {dim} dimensions, at the first of {positions} positions.",
        limits="No direction inside of a query, key or value subspace is preferred: "
        "only the subspace is scored.",
    )


def _check(
    heads: int,
    head_dim: int,
    dim: int,
    positions: int,
    probability: float,
    sharpness: float,
) -> None:
    """Raise for knobs that do not fit."""
    sizes = {"heads": heads, "head_dim": head_dim, "dim": dim, "positions": positions}
    check_ints("attention_reads", **sizes)
    if not (heads >= 1 and 1 <= head_dim <= dim and positions >= 2):
        raise ValueError(
            "attention_reads: wanted heads >= 1, head_dim in 1 .. dim and positions >= "
            f"2, got heads {heads}, head_dim {head_dim}, dim {dim}, positions "
            f"{positions}"
        )
    if not (0 < probability <= 1 and 0 < sharpness <= 100):
        raise ValueError(
            "attention_reads: wanted probability in (0, 1] and sharpness in (0, 100], "
            f"got {probability} and {sharpness}"
        )


def _draw_heads(
    key: Array, heads: int, head_dim: int, dim: int, sharpness: float
) -> dict[str, Array]:
    """Draw rows of all subspaces; duals see their own source alone, if there are."""
    num = _PARTS * heads * head_dim
    rows_key, mix_key = jax.random.split(key)
    rows = unit(jax.random.normal(rows_key, (num, dim)))
    readers = rows if num > dim else dual(rows)
    return {
        "writers": rows,
        "readers": readers.reshape(heads, _PARTS, head_dim, dim),
        "mix": rotation(mix_key, heads * head_dim),
        "sharpness": jnp.asarray(sharpness, readers.dtype),
    }


def _sources(
    heads: int,
    head_dim: int,
    positions: int,
    probability: float,
    key: Array,
    num: int,
) -> Array:
    """Draw sources ``[num, T, F]``, normal in the subspaces that are active."""
    active_key, size_key = jax.random.split(key)
    shape = (num, positions, _PARTS * heads)
    active = jax.random.bernoulli(active_key, probability, shape)
    sizes = jax.random.normal(size_key, (*shape, head_dim))
    return jnp.where(active[..., None], sizes, 0.0).reshape(num, positions, -1)


def _at_the_site(params: Params, sources: Array) -> Array:
    del params
    return jnp.abs(sources[:, 0])


def _attend(
    params: Params, sources: Array, tap: Callable[[str, Array], Array]
) -> Array:
    """Run the heads, ``[B, T H d]``; the site is the first position."""
    stream = dot(sources, params["writers"])
    first = tap(SITE, stream[:, 0])
    stream = jnp.concatenate([first[:, None], stream[:, 1:]], axis=1)
    # Reads [B, T, H, 3, d] of all heads in one product.
    rows = params["readers"]
    reads = dot(stream, rows.reshape(-1, rows.shape[-1]).T)
    query, keys, value = jnp.moveaxis(
        reads.reshape(*reads.shape[:2], *rows.shape[:3]), 3, 0
    )
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bthd,bshd->bhts", query, keys, precision=highest)
    scale = params["sharpness"] / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(scores * scale, axis=-1)
    moved = jnp.einsum("bhts,bshd->bthd", weights, value, precision=highest)
    mixed = dot(moved.reshape(*moved.shape[:2], -1), params["mix"])
    return mixed.reshape(len(mixed), -1)


_PROBED = from_function(_attend)
