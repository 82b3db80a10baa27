"""Loops of an optimizer over fresh batches, for small networks and warm-ups."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from toyfeat.checks import check_int
from toyfeat.types import Array, Params

Batch = Any
"""A pytree: whatever the loss of the network takes."""

State = TypeVar("State")


class Trained(NamedTuple):
    """A network after some steps of training.

    Attributes:
      params: its parameters.
      opt_state: state of the optimizer, with which training can go on.
      losses: ``[steps]``, before each step.
    """

    params: Params
    opt_state: optax.OptState
    losses: Array


def train(
    loss: Callable[[Params, Batch], Array],
    params: Params,
    sample: Callable[[Array], Batch],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    first: Array | int = 0,
    opt_state: optax.OptState | None = None,
) -> Trained:
    """Minimise a loss on fresh batches, in one ``lax.scan``.

    Pure, so it can be compiled, differentiated and mapped over random keys.  Wrap it in
    ``jax.jit``.  :func:`train_in_chunks` calls it again and again, for progress.

    Args:
      loss: ``(params, batch) -> []``.
      params: to start from.
      sample: ``(step) -> batch``, where ``step`` is an int array.  Take a random key
        for each step with ``jax.random.fold_in(key, step)``.  What depends on the
        step, such as an annealed coefficient, can be a part of the batch.
      steps: optimizer steps; static.
      optimizer: any transformation of optax; the rate and its schedule are its own.
      first: number of the first step, for training that goes on.
      opt_state: of the optimizer, for training that goes on; a fresh one by default.

    Returns:
      Parameters, optimizer state and losses.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(params, x):
      ...     return jnp.mean((params["w"] * x - 2 * x) ** 2)
      >>> def sample(step):
      ...     key = jax.random.fold_in(jax.random.key(0), step)
      ...     return jax.random.normal(key, (8,))
      >>> trained = train(
      ...     loss, {"w": jnp.zeros(())}, sample, steps=200, optimizer=optax.adam(0.1)
      ... )
      >>> round(float(trained.params["w"]), 2)
      2.0
    """

    def step(carry: tuple[Params, Any], index: Array) -> tuple[Any, Array]:
        # Loss before the update, then the optimizer's change of the parameters.
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params, sample(index))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    start = params, optimizer.init(params) if opt_state is None else opt_state
    end, losses = jax.lax.scan(step, start, first + jnp.arange(steps))
    return Trained(params=end[0], opt_state=end[1], losses=losses)


def train_chunk(
    loss: Callable[[Params, Batch], Array],
    state: tuple[Params, optax.OptState],
    sample: Callable[[Array], Batch],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    first: Array | int,
) -> tuple[tuple[Params, optax.OptState], Array]:
    """Go on with training: the ``run`` that :func:`train_in_chunks` calls.

    Args:
      loss: as in :func:`train`.
      state: parameters and the state of the optimizer.
      sample: as in :func:`train`.
      steps: optimizer steps; static.
      optimizer: as in :func:`train`.
      first: number of the first step.

    Returns:
      The next state, and the mean loss of the steps.
    """
    params, opt_state = state
    trained = train(
        loss,
        params,
        sample,
        steps=steps,
        optimizer=optimizer,
        first=first,
        opt_state=opt_state,
    )
    return (trained.params, trained.opt_state), jnp.mean(trained.losses)


def train_in_chunks(
    run: Callable[[State, Array], tuple[State, Array]],
    state: State,
    *,
    steps: int,
    chunk: int,
    on_chunk: Callable[[int, Array], None] | None = None,
) -> tuple[State, Array]:
    """Call a compiled piece of training until all steps are done.

    Args:
      run: ``(state, first) -> (state, loss)`` trains for ``chunk`` steps from step
        ``first`` on; compiled, and most often :func:`train` inside.
      state: to start from, such as parameters and the state of the optimizer.
      steps: in all; rounded up to whole chunks.
      chunk: steps of a call.
      on_chunk: called with the steps done and the loss of the chunk.

    Returns:
      The last state, and the loss of the last chunk.

    Raises:
      ValueError: if a count is not positive.
      FloatingPointError: if a loss is not finite.
    """
    for name, count in (("steps", steps), ("chunk", chunk)):
        check_int("train", name, count)
    # A loss that is not finite ends it: no later step can mend parameters of NaN.
    loss = jnp.zeros(())
    for first in range(0, steps, chunk):
        state, loss = run(state, jnp.asarray(first))
        if not bool(jnp.all(jnp.isfinite(loss))):
            raise FloatingPointError(
                f"train: the loss is not finite by step {first + chunk}; lower "
                "learning_rate"
            )
        if on_chunk is not None:
            on_chunk(first + chunk, loss)
    return state, loss
