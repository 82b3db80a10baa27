"""Choosing the largest codes where latents are split over devices."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.dictionary.gather import scatter
from toyfeat.dictionary.selection import bits_of, first_of, largest_bits
from toyfeat.dictionary.shards import Split, over_shards, split_axes
from toyfeat.types import Array

MOST_SCORES = 512
"""Scores of an example, of all shards together, that are exchanged; beyond it some
forty counts take their place, whatever ``k`` and the number of shards
(docs/decisions/dictionary.md, "Latents are split by a mesh that the dictionary knows").
"""


def best_of_shards(score: Array, k: int, fewer: Array | None, split: Split) -> Array:
    """Mark the ``k`` largest finite scores of each row, shard by shard.

    Among equal scores the first latents are marked, as by :func:`best_of_each`.  What
    is exchanged does not grow with the latents: ``k`` scores of each example and shard,
    or some forty counts, where there are many shards or one has no room for ``k``.

    Args:
      score: ``[N, M]``.
      k: number of scores.
      fewer: in place of ``k``, may be traced, or ``None``.
      split: how rows and columns are split.

    Returns:
      ``[N, M]`` bool.
    """
    axes = split_axes(split, len(score))
    shards = 1 if split.latents is None else split.mesh.shape[split.latents]
    axis = split.latents if shards > 1 else None
    few = axis is None or (k <= score.shape[1] // shards and k * shards <= MOST_SCORES)
    mark = partial(_mark_by_scores if few else _mark_by_counts, k, axis)
    mark = over_shards(split, mark, (axes, ()), axes)
    wanted = jnp.minimum(jnp.asarray(k if fewer is None else fewer, jnp.int32), k)
    return mark(jax.lax.stop_gradient(score), wanted)


def _mark_by_scores(k: int, axis: str | None, score: Array, wanted: Array) -> Array:
    """Mark the largest scores of a shard after a look at the ``k`` largest of each."""
    top, index = _top_of_shard(score, k)
    kept = first_of(k, wanted)
    if axis is not None:
        # The cut over all shards: their lists one after another are in the order of
        # the latents, so that equal scores are cut as in a single list.
        lists = jax.lax.all_gather(top, axis, axis=1, tiled=True)
        _, place = _top_of_shard(lists, k)
        # A shard keeps the first of its list, as many as come before the cut.
        own = kept & (place // k == jax.lax.axis_index(axis))
        kept = first_of(k, jnp.sum(own, axis=1)[:, None])
    return scatter(kept & jnp.isfinite(top), index, score.shape[1])


def _mark_by_counts(k: int, axis: str | None, score: Array, wanted: Array) -> Array:
    """Mark the largest scores of a shard by counts of those that reach a level."""
    bits = _ordered_bits(score)

    def reach(level: Array) -> Array:
        return _total(jnp.sum(bits >= level[:, None], axis=1, dtype=jnp.int32), axis)

    # The score of the last one that is wanted, as bits.
    zeros = jnp.zeros(len(score), bits.dtype)
    size = jnp.iinfo(bits.dtype).bits
    level = largest_bits(lambda level: reach(level) >= wanted, zeros, size)[:, None]
    # Of the scores that equal it the first are kept, those of earlier shards before.
    larger, equal = bits > level, bits == level
    num_larger = _total(jnp.sum(larger, axis=1, dtype=jnp.int32), axis)
    place = jnp.cumsum(equal, axis=1, dtype=jnp.int32)
    if axis is not None:
        counts = jax.lax.all_gather(place[:, -1], axis)
        earlier = jnp.arange(len(counts)) < jax.lax.axis_index(axis)
        earlier = jnp.where(earlier[:, None], counts, jnp.zeros_like(counts))
        place = place + jnp.sum(earlier, axis=0)[:, None]
    kept = larger | (equal & (place <= (wanted - num_larger)[:, None]))
    return kept & (wanted > 0) & jnp.isfinite(score)


def _total(count: Array, axis: str | None) -> Array:
    return count if axis is None else jax.lax.psum(count, axis)


def _ordered_bits(score: Array) -> Array:
    """Bits as integers in the order of the floats, negative ones included."""
    bits = bits_of(score)
    sign = jnp.asarray(1, bits.dtype) << (jnp.iinfo(bits.dtype).bits - 1)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _top_of_shard(score: Array, k: int) -> tuple[Array, Array]:
    """``top_k`` behind two barriers: one for both ends the process (jaxlib 0.10.2)."""
    top, index = jax.lax.top_k(score, k)
    return jax.lax.optimization_barrier(top), jax.lax.optimization_barrier(index)
