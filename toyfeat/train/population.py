"""Train a population: many settings or seeds in one compiled step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int, check_type
from toyfeat.dictionary.types import MEMBERS
from toyfeat.train.placement import run_update
from toyfeat.train.types import Trainer, TrainState
from toyfeat.types import Array, Taps


def population(trainer: Trainer, *, group: int | None = None) -> Trainer:
    """Make a trainer of a population, all members on the same batches.

    ``init(keys [P], **hyper)`` takes one key per member, and for every
    hyper-parameter one value or ``[P]`` of them; ``update`` gives every member the
    same batch.  A member's result is that of training it alone, but
    for terms of all members together (:func:`toyfeat.losses.shared_kl`).

    Args:
      trainer: of one member.
      group: how many members are trained at once, group after group; ``None`` for
        all at once.  On a CPU groups of about 4 stay in the cache.

    Returns:
      :class:`Trainer` whose state and metrics have a leading axis ``P``.

    Raises:
      ValueError: if a hyper-parameter has another number of values than there are
        keys, or ``group`` does not divide ``P``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat import losses, trainer
      >>> from toyfeat.dictionary import standard
      >>> sae = standard(8, 32)
      >>> many = population(trainer(sae, losses.default(sae)))
      >>> state = many.init(
      ...     jax.random.split(jax.random.key(0), 3), sparsity=jnp.array([1., 3., 9.])
      ... )
      >>> state.params["W_dec"].shape
      (3, 32, 8)
    """
    hint = "make one by toyfeat.trainer"
    check_type("population", "trainer", trainer, Trainer, hint=hint)
    if group is not None:
        group = check_int("population", "group", group, about=", or None")

    def init(keys: Array, **hyper: Any) -> TrainState:
        num = _number_of(keys)
        values = {name: _as_numbers(name, value) for name, value in hyper.items()}
        # One value for all members, or one for each.
        for name, value in values.items():
            if value.shape not in ((), (num,)):
                raise ValueError(
                    f"population: {name} must be one value or one per key ({num}), "
                    f"got shape {value.shape}; give as many as there are keys"
                )
        # The trainer checks values only where they are concrete, not inside vmap, so
        # it is given the smallest and the largest of each first.
        for extreme in (jnp.min, jnp.max):
            extremes = {name: extreme(value) for name, value in values.items()}
            jax.eval_shape(partial(trainer.init, **extremes), keys[0])
        per_member = {n: jnp.broadcast_to(v, (num,)) for n, v in values.items()}
        return jax.vmap(lambda key, hyper: trainer.init(key, **hyper))(keys, per_member)

    update: Any = partial(_update_members, trainer.update, group)
    # A dictionary that knows its mesh lays out by itself what belongs to a latent.
    knows_mesh = trainer.recipe is not None and trainer.recipe.dictionary.split
    if not knows_mesh:
        update = partial(run_update, update)
    return Trainer(init, update, trainer.recipe, trainer.settings)


def _as_numbers(name: str, value: Any) -> Array:
    """Convert a hyper-parameter to an array.

    Raises:
      TypeError: if it is not of numbers.
    """
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(
            f"population: {name} must be numbers, got {value!r:.80}; pass floats"
        )
    return jnp.asarray(value)


def _number_of(keys: Any) -> int:
    """Return the number of keys, typed ``[P]`` or raw ``[P, 2]``.

    Raises:
      TypeError: if they are no vector of keys.
      ValueError: if there is none.
    """
    dtype, shape = getattr(keys, "dtype", None), np.shape(keys)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not ((typed and len(shape) == 1) or (dtype == jnp.uint32 and len(shape) == 2)):
        kind = f"shape {shape}" if typed else type(keys).__name__
        raise TypeError(
            f"population: keys must be one key for each member, got {kind}; pass "
            "jax.random.split(key, members)"
        )
    if not shape[0]:
        raise ValueError(
            "population: keys must be at least one, got none; pass "
            "jax.random.split(key, members)"
        )
    return shape[0]


def _update_members(
    update: Callable[..., Any], group: int | None, state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Array]]:
    """Update every member, all at once or group by group."""
    update_all: Callable[..., Any] = jax.vmap(
        update, in_axes=(0, None), axis_name=MEMBERS
    )
    if group is None:
        return update_all(state, taps)
    num = len(state.step)
    if num % group:
        raise ValueError(
            f"population: group must divide the number of members, got group {group} "
            f"of {num} members; choose another group"
        )
    # Members [P, ...] as groups [P / group, group, ...], one group after another.
    split = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), state)
    updated = jax.lax.map(lambda part: update_all(part, taps), split)
    return jax.tree.map(lambda x: x.reshape(num, *x.shape[2:]), updated)
