"""Many settings in one compiled step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.types import Array, Taps, Trainer, TrainState


def population(trainer: Trainer, *, group: int | None = None) -> Trainer:
    """The same training for every member of a population.

    ``init(keys [P], **hyper)`` takes one key per member, and for every
    hyper-parameter one value or ``[P]`` of them; ``update`` shows every member the
    same batch.  A member's result is that of training it alone.

    Args:
      trainer: of one member.
      group: members that are trained side by side, the groups one after another;
        ``None`` for all at once.  On a CPU groups of about 4 stay in the cache.

    Returns:
      :class:`Trainer` whose state and metrics have a leading axis ``P``.

    Raises:
      ValueError: if a hyper-parameter has another number of values than there are
        keys, or ``group`` does not divide ``P``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat import dictionary_objective, standard, trainer
      >>> sae = standard(8, 32)
      >>> many = population(trainer(sae, dictionary_objective(sae)))
      >>> state = many.init(
      ...     jax.random.split(jax.random.key(0), 3), sparsity=jnp.array([1., 3., 9.])
      ... )
      >>> state.params["W_dec"].shape
      (3, 32, 8)
    """

    def init(keys: Array, **hyper: Any) -> TrainState:
        num = len(keys)
        whole = {name: jnp.asarray(value) for name, value in hyper.items()}
        for name, value in whole.items():
            if value.shape not in ((), (num,)):
                raise ValueError(
                    f"population: {name} must be one value or one per key ({num}), "
                    f"got shape {value.shape}"
                )
        for end in (jnp.min, jnp.max):  # values are checked where they are concrete
            ends = {name: end(value) for name, value in whole.items()}
            jax.eval_shape(partial(trainer.init, **ends), keys[0])
        spread = {n: jnp.broadcast_to(v, (num,)) for n, v in whole.items()}
        return jax.vmap(lambda key, values: trainer.init(key, **values))(keys, spread)

    return Trainer(init, partial(_together, trainer.update, group))


def _together(
    update: Callable[..., Any], group: int | None, state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Array]]:
    """An update of every member, all at once or group by group."""
    every: Callable[..., Any] = jax.vmap(update, in_axes=(0, None))
    if group is None:
        return every(state, taps)
    num = len(state.step)
    if num % group:
        raise ValueError(f"population: group {group} does not divide {num} members")
    split = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), state)
    done = jax.lax.map(lambda part: every(part, taps), split)
    return jax.tree.map(lambda x: x.reshape(num, *x.shape[2:]), done)
