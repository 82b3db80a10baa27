"""Many updates in one compiled call, on batches that are made inside or stacked."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.types import Array, ArrayBatches, Taps, TrainState

RESERVED = ("step", "seconds", "examples_per_s", "finite")
"""Names of a line of metrics that are not the trainer's."""


class Chunk(NamedTuple):
    """The batches of some updates.

    Attributes:
      source: stacked :class:`Taps`, or the data they are taken from.
      examples: how many there are in all.
      memory: state of the batches after the last of them, as JSON, or ``None``.
    """

    source: Any
    examples: int
    memory: str | None


class Feed(NamedTuple):
    """Where batches come from.

    Attributes:
      take: ``(data, step) -> Taps`` if batches are made inside, or ``None``.
      fetch: ``(first, length) -> Chunk``.
      restore: puts batches back to a state, or ``None`` if they have none.
    """

    take: Callable[[Any, Array], Taps] | None
    fetch: Callable[[int, int], Chunk]
    restore: Callable[[Any], Any] | None


def _called(batches: Callable[[Array], Taps], step: Array) -> Taps:
    return batches(step)


def feed_of(batches: ArrayBatches | Callable[[int], Taps]) -> Feed:
    """Batches of either kind as one.

    Raises:
      TypeError: if they are not batches.
    """
    if isinstance(batches, jax.tree_util.Partial):  # of toyfeat.data.array_batches
        batches = ArrayBatches(_called, batches)
    if isinstance(batches, ArrayBatches):
        data = jax.device_put(batches.data)  # once, not with every chunk
        shapes = jax.eval_shape(batches.take, data, jax.ShapeDtypeStruct((), jnp.int32))
        size = _checked(shapes, "take(data, step)").acts.shape[0]
        return Feed(
            batches.take, lambda first, length: Chunk(data, size * length, None), None
        )
    if not callable(batches):
        raise TypeError(
            "fit: batches must be ArrayBatches or a function of the step that returns "
            f"Taps, got {type(batches).__name__}"
        )
    save, restore = (getattr(batches, name, None) for name in ("state", "restore"))
    if callable(save) != callable(restore):
        raise TypeError(
            "fit: batches that remember need both state() and restore(state), got "
            f"only {'state' if callable(save) else 'restore'}"
        )
    return Feed(
        None,
        partial(_fetched, batches, save if callable(save) else None),
        restore if callable(restore) else None,
    )


def _fetched(batches: Any, save: Any, first: int, length: int) -> Chunk:
    fetched = []
    for step in range(first, first + length):
        try:
            taps = batches(step)
        except Exception as error:
            error.add_note(f"fit: raised by batches({step})")
            raise
        fetched.append(_checked(taps, f"batches({step})"))
        _check_same(fetched[0], taps, first, step)
    stacked = jax.tree.map(_stacked, *fetched)
    memory = None if save is None else _as_json(save())
    return Chunk(stacked, fetched[0].acts.shape[0] * length, memory)


def _stacked(*leaves: Any) -> Any:
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)


def _checked(taps: Any, who: str) -> Taps:
    if not isinstance(taps, Taps):
        raise TypeError(f"fit: {who} must return Taps, got {type(taps).__name__}")
    for name, value in taps._asdict().items():
        optional = name in ("grads", "targets") and value is None
        if not hasattr(value, "dtype") and not optional:
            kind = type(value).__name__
            raise TypeError(f"fit: {who} must hold arrays, got {name} = a {kind}")
    shapes = [None if x is None else tuple(x.shape) for x in taps]
    acts, grads, weights, targets = shapes
    written = acts if targets is None else targets
    fits = acts is not None and len(acts) == 2 and weights == acts[:1]
    fits = fits and written is not None and written[:1] == weights
    if grads is not None and fits:
        fits = len(grads) == 3 and (grads[0], grads[2]) == written
    if not fits:
        more = "" if targets is None else f" and targets {targets}"
        raise ValueError(
            f"fit: {who} must return acts [N, D], grads [N, K, D] or None and weights "
            f"[N], got shapes {acts}, {grads}, {weights}{more}"
        )
    return taps


def _check_same(before: Taps, taps: Taps, first: int, step: int) -> None:
    kinds = [
        [None if x is None else (tuple(x.shape), str(x.dtype)) for x in each]
        for each in (before, taps)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"fit: batches must keep their shapes and dtypes, got {kinds[0]} at step "
            f"{first} and {kinds[1]} at step {step}; fill a short batch up with "
            "examples of weight 0"
        )


def _as_json(memory: Any) -> str:
    try:
        text = json.dumps(memory)
        same = json.loads(text) == memory
    except (TypeError, ValueError):
        text, same = "", False
    if not same:
        raise TypeError(
            "fit: batches.state() must return JSON values (dicts with string keys, "
            f"lists, strings, numbers, bools, None), got {memory!r}"
        )
    return text


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def run_chunk(
    update: Callable[..., Any],
    take: Callable[[Any, Array], Taps] | None,
    length: int,
    state: TrainState,
    source: Any,
    first: Array,
) -> tuple[TrainState, dict[str, Array], Array]:
    """State, metrics of every update, and whether parameters are finite at the end."""

    def one(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        taps = batch if take is None else take(source, batch)
        after, metrics = update(state, taps)
        _check_update(state, after, metrics)
        strong = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), after)
        return strong, metrics

    steps = first + jnp.arange(length, dtype=jnp.int32)
    state, metrics = jax.lax.scan(one, state, source if take is None else steps)
    return state, metrics, _finite(state)


def _finite(state: TrainState) -> Array:
    """Whether the parameters (of each member) hold no NaN or inf."""
    finite = jnp.ones(state.step.shape, bool)
    for leaf in jax.tree.leaves(state.params):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            axes = tuple(range(state.step.ndim, leaf.ndim))
            finite = finite & jnp.isfinite(leaf).all(axes)
    return finite


def _check_update(before: TrainState, after: Any, metrics: Any) -> None:
    kinds = [
        {
            jax.tree_util.keystr(path): f"{x.dtype}{list(jnp.shape(x))}"
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (before, after)
    ]
    wrong = [p for p in kinds[0] | kinds[1] if kinds[0].get(p) != kinds[1].get(p)]
    if wrong:
        raise ValueError(
            f"fit: trainer.update must return a state like the one it got, but "
            f"{wrong[0]} went from {kinds[0].get(wrong[0])} to {kinds[1].get(wrong[0])}"
        )
    loss = metrics.get("loss") if isinstance(metrics, dict) else None
    if loss is None or jnp.shape(loss) != before.step.shape:
        got = sorted(metrics) if isinstance(metrics, dict) else type(metrics).__name__
        raise ValueError(
            f"fit: trainer.update must return metrics with a 'loss' of shape "
            f"{before.step.shape}, got {got if loss is None else jnp.shape(loss)}"
        )
    taken = [name for name in RESERVED if name in metrics]
    if taken:
        raise ValueError(f"fit: a metric cannot be named {taken[0]!r}: rename it")
