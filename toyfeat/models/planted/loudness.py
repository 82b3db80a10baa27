"""A task whose features are small where the activations are large."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.models.planted import heads
from toyfeat.models.planted.heads import dot, dual, unit
from toyfeat.models.planted.task import Task, Truth
from toyfeat.types import Array


def quiet_and_loud(
    key: Array,
    *,
    dim: int = 32,
    quiet: int = 12,
    loud: int = 24,
    probability: float = 0.08,
    quietness: float = 0.1,
    idleness: float = 0.02,
    threshold: float = 0.1,
) -> Task:
    """Plant features of small activation and large effect among the opposite.

    Args:
      key: random key of the task.
      dim: width ``D``.
      quiet: how many features matter, fewer than ``dim``.
      loud: how many large ones hardly do; with the quiet ones they may exceed ``dim``.
      probability: of any feature to be active.
      quietness: length of a quiet feature's writer, in 1e-4 .. 1e4; a loud one's is 1.
      idleness: effect of a loud feature, at most 1e4; of a quiet one it is 1.
      threshold: under which a reader is silent, in 0 .. 0.5; codes are .5 at least.

    Returns:
      :class:`toyfeat.models.planted.Task` whose truth is the quiet features.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    _check_loudness(dim, quiet, loud, probability, quietness, idleness)
    heads.check_threshold("quiet_and_loud", threshold)
    axes_key, loud_key, quiet_key = jax.random.split(key, 3)
    axes = heads.rotation(axes_key, dim)
    # Quiet features have dimensions of their own, half as many again as they are.
    own = min(dim - 1, 3 * quiet // 2 + 1)
    loud_rows = unit(dot(jax.random.normal(loud_key, (loud, dim - own)), axes[own:]))
    quiet_rows = unit(dot(jax.random.normal(quiet_key, (quiet, own)), axes[:own]))
    writers = quietness * quiet_rows
    readers = dual(writers)
    # The model reads all of them, the loud ones with a small gain.
    params = heads.head(
        jax.random.fold_in(quiet_key, 1),
        jnp.concatenate([readers, loud_rows]),
        threshold,
        jnp.concatenate([jnp.ones(quiet), jnp.full(loud, idleness)]),
    )
    params |= {"writers": jnp.concatenate([writers, loud_rows])}
    times = f"with {1 / idleness:g} times their effect" if idleness else ""
    return heads.make_task(
        "quiet but strong",
        heads.write_codes,
        params,
        partial(_independent, quiet + loud, probability),
        Truth(readers=readers, writers=writers, frequency=jnp.full(quiet, probability)),
        ignored=axes[own:],
        about=f"{quiet} features {1 / quietness:g} times smaller than {loud} others, "
        f"{times or 'which have no effect'}.",
        limits="Nothing is hidden: readers and writers are known up to their lengths.",
    )


def _check_loudness(
    dim: int,
    quiet: int,
    loud: int,
    probability: float,
    quietness: float,
    idleness: float,
) -> None:
    heads.check_ints("quiet_and_loud", dim=dim, quiet=quiet, loud=loud)
    sizes = 1 <= quiet < dim and loud >= 1
    if not (sizes and 0 < probability <= 1 and quietness > 0):
        raise ValueError(
            "quiet_and_loud: wanted quiet in 1 .. dim - 1, loud >= 1, probability in "
            f"(0, 1] and quietness > 0, got dim {dim}, quiet {quiet}, loud {loud}, "
            f"probability {probability}, quietness {quietness}"
        )
    if not (1e-4 <= quietness <= 1e4 and abs(idleness) <= 1e4):
        raise ValueError(
            "quiet_and_loud: wanted quietness in 1e-4 .. 1e4, where single precision "
            "tells quiet from loud, and idleness up to 1e4, got quietness "
            f"{quietness}, idleness {idleness}"
        )


def _independent(features: int, probability: float, key: Array, num: int) -> Array:
    return heads.sparse_codes(key, (num, features), probability)
