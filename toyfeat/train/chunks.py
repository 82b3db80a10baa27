"""Compile many updates into one call, on batches made inside it or stacked before.

A checkpoint describes the next batch, so that a run does not go on with others.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_function
from toyfeat.data.batches import Batches
from toyfeat.processes import is_global, to_host
from toyfeat.train.types import TrainState
from toyfeat.types import Array, Taps

RESERVED = ("step", "seconds", "examples_per_s", "finite")
"""Names in ``metrics.jsonl`` that ``fit`` writes, so that no metric may have them."""

_BATCH_TOLERANCE = 0.02
"""Share of the largest value by which batches may differ: those that a model computes
in bfloat16, of 8 bits, differ between devices; other rows differ by about 1."""


class ChunkBatches(NamedTuple):
    """The batches of one compiled call.

    Attributes:
      source: stacked :class:`Taps`, or the data that batches are taken from.
      num_examples: of all the batches together.
      resume_state: ``batches.state()`` after the last batch, as JSON, or ``None``.
    """

    source: Any
    num_examples: int
    resume_state: str | None


class Feed(NamedTuple):
    """The source of batches, on the device or on the host.

    Attributes:
      take: ``(data, step) -> Taps`` if batches are made inside the compiled call, or
        ``None``.
      fetch: ``(first, length) -> ChunkBatches``.
      restore: puts the batches back to a saved state, or ``None`` if they have none.
    """

    take: Callable[[Any, Array], Taps] | None
    fetch: Callable[[int, int], ChunkBatches]
    restore: Callable[[Any], Any] | None


def _call_batches(batches: Callable[[Array], Taps], step: Array) -> Taps:
    """Take a batch from a traceable function, as ``Batches.take`` does."""
    return batches(step)


def make_feed(
    batches: Batches | Callable[[int], Taps], *, several: bool = False
) -> Feed:
    """Make the feed of batches of either kind.

    Args:
      batches: as of :func:`toyfeat.fit`.
      several: whether those of the host must be arrays of several processes.

    Raises:
      TypeError: if they are not batches.
    """
    # Batches on the device are made inside the compiled call.
    if isinstance(batches, jax.tree_util.Partial):  # of toyfeat.data.array_batches
        batches = Batches(_call_batches, batches)
    if isinstance(batches, Batches):
        data = jax.device_put(batches.data)  # once, not with every chunk
        shapes = jax.eval_shape(batches.take, data, jax.ShapeDtypeStruct((), jnp.int32))
        size = _check_taps(shapes, "take(data, step)").acts.shape[0]
        return Feed(
            take=batches.take,
            fetch=lambda first, length: ChunkBatches(data, size * length, None),
            restore=None,
        )
    # Batches of the host are fetched and stacked, and may have a state to save.
    hint = "Batches of toyfeat.data are one"
    check_function("fit", "batches", batches, "of the step to Taps", hint=hint)
    save, restore = (getattr(batches, name, None) for name in ("state", "restore"))
    if callable(save) != callable(restore):
        raise TypeError(
            "fit: batches that remember need both state() and restore(state), got "
            f"only {'state' if callable(save) else 'restore'}"
        )
    return Feed(
        take=None,
        fetch=partial(_fetch_chunk, batches, save if callable(save) else None, several),
        restore=restore if callable(restore) else None,
    )


def _fetch_chunk(
    batches: Any, save: Any, several: bool, first: int, length: int
) -> ChunkBatches:
    """Call host batches for every step of a chunk and stack them."""
    fetched = []
    for step in range(first, first + length):
        try:
            taps = batches(step)
        except Exception as error:
            error.add_note(f"fit: raised by batches({step})")
            raise
        fetched.append(_check_taps(taps, f"batches({step})"))
        if several and not is_global(taps):
            raise ValueError(
                f"fit: batches({step}) must be arrays of all processes, as the state "
                "is, got arrays of one; store_batches(..., mesh=mesh) makes them, and "
                "jax.make_array_from_process_local_data does"
            )
        _check_same_shapes(fetched[0], taps, first, step)
    return ChunkBatches(
        source=jax.tree.map(_stack, *fetched),
        num_examples=fetched[0].acts.shape[0] * length,
        resume_state=None if save is None else _dump_state(save()),
    )


def _stack(*leaves: Any) -> Any:
    """Stack NumPy arrays on the host and others on the device."""
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)


def _check_taps(taps: Any, who: str) -> Taps:
    """Return taps with the right fields and shapes, or raise."""
    if not isinstance(taps, Taps):
        raise TypeError(
            f"fit: {who} must return Taps, got {type(taps).__name__}; wrap activations "
            "[N, D] as Taps(acts, None, jnp.ones(len(acts)))"
        )
    fields = taps._asdict()
    del fields["context"]  # whatever the terms of the loss read
    for name, value in fields.items():
        optional = name in ("grads", "targets") and value is None
        if not hasattr(value, "dtype") and not optional:
            kind = type(value).__name__
            raise TypeError(
                f"fit: {who} must hold arrays, got {name} = a {kind}; "
                "convert it with jnp.asarray"
            )
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"fit: {who} must hold real floats, got {name} of {value.dtype}; "
                "convert them with astype(jnp.float32)"
            )
    # Gradients belong to the targets if there are any, else to the activations.
    shapes = [None if x is None else tuple(x.shape) for x in fields.values()]
    acts, grads, weights, targets = shapes
    written = acts if targets is None else targets
    valid = acts is not None and len(acts) == 2 and weights == acts[:1]
    valid = valid and written is not None and written[:1] == weights
    if grads is not None and valid:
        valid = len(grads) == 3 and (grads[0], grads[2]) == written
    if not valid:
        got_targets = "" if targets is None else f" and targets {targets}"
        raise ValueError(
            f"fit: {who} must return acts [N, D], grads [N, K, D] or None and weights "
            f"[N], got shapes {acts}, {grads}, {weights}{got_targets}; reshape them"
        )
    return taps


def _check_same_shapes(before: Taps, taps: Taps, first: int, step: int) -> None:
    """Raise if the shapes or dtypes of batches change within a chunk."""
    kinds = [
        [
            None if x is None else (tuple(x.shape), str(x.dtype))
            for x in (*batch[:-1], *jax.tree.leaves(batch.context))
        ]
        for batch in (before, taps)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"fit: batches must keep their shapes and dtypes, got {kinds[0]} at step "
            f"{first} and {kinds[1]} at step {step}; fill a short batch up with "
            "examples of weight 0"
        )


def _dump_state(state: Any) -> str:
    """Convert the state of batches to JSON, or raise if that would change it."""
    try:
        text = json.dumps(state)
        same = json.loads(text) == state
    except (TypeError, ValueError):
        text, same = "", False
    if not same:
        raise TypeError(
            "fit: batches.state() must return JSON values (dicts with string keys, "
            f"lists, strings, numbers, bools, None), got {state!r}"
        )
    return text


def describe_batch(feed: Feed, source: Any, step: int) -> dict[str, Any]:
    """Describe the batch of a step: its shape, and some of its values.

    Args:
      feed: of the batches.
      source: what the feed fetched for a chunk that begins at the step.
      step: of the batch.

    Returns:
      JSON values.
    """
    if feed.take is None:
        shape = source.acts.shape[1:]
        sample = _sample(jax.tree.map(lambda x: x[0], source))
    else:
        at = jnp.asarray(step, jnp.int32)
        shape = jax.eval_shape(feed.take, source, at).acts.shape
        sample = _sample_on_device(feed.take, source, at)
    values = to_host(sample).astype(np.float32).tolist()
    return {"step": step, "shape": list(shape), "values": values}


@partial(jax.jit, static_argnums=0)
def _sample_on_device(take: Any, source: Any, step: Array) -> Array:
    """Take values of a batch that is made on the device."""
    return _sample(take(source, step))


def _sample(taps: Taps) -> Array:
    """Take the leading values and the weights of four examples."""
    # Spread over the batch, so that a batch in another order shows.
    num = len(taps.weights)
    rows = np.array([0, num // 3, 2 * num // 3, num - 1])
    acts = jnp.asarray(taps.acts[rows][:, :4], jnp.float32)
    weights = jnp.asarray(taps.weights[rows], jnp.float32)
    return jnp.concatenate([acts.ravel(), weights])


def check_batch(before: dict[str, Any] | None, now: dict[str, Any], where: str) -> None:
    """Raise if a batch is another one than when the checkpoint was saved.

    Raises:
      ValueError: if it has another shape or other values.
    """
    if before is None or before["step"] != now["step"]:
        return
    # Rounding of bfloat16 is relative to the largest value; another batch is farther.
    old, new = np.asarray(before["values"]), np.asarray(now["values"])
    fault = None
    if before["shape"] != now["shape"]:
        fault = f"activations {now['shape']}, not {before['shape']}"
    elif old.shape == new.shape:
        finite = old[np.isfinite(old)]
        atol = _BATCH_TOLERANCE * float(np.max(np.abs(finite), initial=0.0))
        if not np.allclose(old, new, rtol=0, atol=atol, equal_nan=True):
            fault = f"an example that begins {new[0]:.6g}, not {old[0]:.6g}"
    if fault is not None:
        raise ValueError(
            f"fit: {where} holds a run with other batches: that of step {now['step']} "
            f"has {fault}; choose another directory, give the same batches (data, seed "
            "and size), or go on with these by allow_changes=True"
        )


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def run_chunk(
    update: Callable[..., Any],
    take: Callable[[Any, Array], Taps] | None,
    length: int,
    state: TrainState,
    source: Any,
    first: Array,
) -> tuple[TrainState, dict[str, Array], Array]:
    """Run ``length`` updates in one compiled scan.

    Args:
      update: of the trainer.
      take: of the feed; ``None`` if ``source`` are stacked batches.
      length: how many updates.
      state: at the start; it is donated.
      source: of the chunk's batches.
      first: ``[]`` int32, the step of the first update.

    Returns:
      The state, the metrics of every update ``[length, ...]``, and whether the
      parameters (of each member) are finite at the end.
    """

    def train_step(
        state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        taps = batch if take is None else take(source, batch)
        after, metrics = update(state, taps)
        _check_update(state, after, metrics)
        # A scan needs a carry of fixed types, so weak types are made strong.
        strong = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), after)
        return strong, metrics

    inputs = source
    if take is not None:
        inputs = first + jnp.arange(length, dtype=jnp.int32)  # the steps
    state, metrics = jax.lax.scan(train_step, state, inputs)
    return state, metrics, _params_finite(state)


def _params_finite(state: TrainState) -> Array:
    """Return whether the parameters (of each member) are finite, ``[]`` or ``[P]``."""
    finite = jnp.ones(state.step.shape, bool)
    for leaf in jax.tree.leaves(state.params):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            axes = tuple(range(state.step.ndim, leaf.ndim))
            finite = finite & jnp.isfinite(leaf).all(axes)
    return finite


def _check_update(before: TrainState, after: Any, metrics: Any) -> None:
    """Raise if an update changes the form of the state or returns wrong metrics."""
    # Every leaf of the state must keep its path, dtype and shape.
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
    # The metrics need a loss (of each member) and no name of a column of fit.
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
