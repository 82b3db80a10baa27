"""Rules of readouts with labels: losses and differences of logits.

Labels are looked at where they are concrete.  Where they are traced, what the outputs
do not have gives NaN, never the gradient of something else.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.meshes import is_known
from toyfeat.tap.rules import (
    Chunk,
    apply_select,
    as_batch_function,
    grad_of_terms,
    list_outputs,
    pull_to_outputs,
    split_floats,
    to_float32,
)
from toyfeat.types import Array, Outputs

# Seed of the outputs on which a function is tried that may count labels from the end.
_TRIAL_SEED = 0

_SHOWN_LABELS = 5
"""Labels of an input that a message lists; a matter of length."""


def counted_labels(labels: Any, ignore: int | None) -> Any:
    """Return which integer labels count, those that are not ``ignore``."""
    info = jnp.iinfo(labels.dtype)
    if ignore is None or not info.min <= ignore <= info.max:
        return np.ones(labels.shape, bool)
    return labels != ignore


def is_label_array(labels: Any) -> bool:
    """Return whether labels are one integer array, of which some may be ignored."""
    return hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer)


def loss(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Differentiate a user's loss against labels, without those that are ignored."""
    fn, ignore = options
    labels = chunk.labels
    # Which labels count; ``None`` where all of them do, which saves the masking.
    concrete = is_label_array(labels) and is_known(labels)
    counted = None
    if is_label_array(labels):
        counted = counted_labels(np.asarray(labels) if concrete else labels, ignore)
        if concrete and counted.all():
            counted = None
    # Ignored labels are replaced by 0, so that the loss is finite, and then left out.
    where = np.where if concrete else jnp.where
    safe = labels if counted is None else where(counted, labels, 0).astype(labels.dtype)
    batched = as_batch_function(fn, (outputs, safe))

    def terms(outputs: Outputs) -> Array:
        losses = batched(outputs, safe)
        return losses if counted is None else _leave_out(losses, counted, concrete)

    # Indexing in JAX says nothing about ids that the outputs do not have.
    if concrete:
        _check_no_wrapping(batched, outputs, np.asarray(safe))
    cotangents, undefined = grad_of_terms(terms, outputs)
    if concrete:
        _check_defined(labels, undefined, outputs)
    return cotangents


def _leave_out(losses: Array, counted: Any, concrete: bool) -> Array:
    """Set the losses of ignored labels to 0; NaN where they cannot be told apart."""
    # One loss per label.
    if losses.shape[: counted.ndim] == counted.shape:
        rows = counted.reshape(counted.shape + (1,) * (losses.ndim - counted.ndim))
        return jnp.where(rows, losses, jnp.zeros_like(losses))
    if concrete:
        raise ValueError(
            "loss: labels that are to be ignored need a loss of their own, got losses "
            f"{losses.shape} for labels {counted.shape}; do not sum or average over "
            "labels, or pass ignore=None if the value is a label"
        )
    # One loss for several labels counts only if every one of its labels does.
    whole = counted.reshape(len(counted), -1).all(axis=1)
    whole = whole.reshape((-1, *(1,) * (losses.ndim - 1)))
    return jnp.where(whole, losses, jnp.full_like(losses, jnp.nan))


def _check_no_wrapping(batched: Any, outputs: Outputs, labels: np.ndarray) -> None:
    """Raise if a loss takes negative labels for entries counted from the end.

    It does if a label and the one a whole axis later give the same loss.
    """
    floats, join = split_floats(outputs)
    if len(floats) != 1 or floats[0].ndim < 2 or not np.any(labels < 0):
        return
    # Try both labels on random outputs, where different entries differ.
    shape, size = floats[0].shape, floats[0].shape[-1]
    draw = np.random.default_rng(_TRIAL_SEED).standard_normal(shape)
    with jax.ensure_compile_time_eval():
        trial = join([jnp.asarray(draw, floats[0].dtype)])
        shifted = np.where(labels < 0, labels + size, labels).astype(labels.dtype)
        losses = np.asarray(batched(trial, jnp.asarray(labels)))
        later = np.asarray(batched(trial, jnp.asarray(shifted)))
    if np.array_equal(losses, later):
        raise ValueError(
            f"loss: labels must be ids 0 .. {size - 1} of the outputs, got "
            f"{labels.min()}, which the loss counts from the end; mark labels that do "
            "not count with ignore"
        )


def _check_defined(labels: Any, undefined: Array, outputs: Outputs) -> None:
    """Raise if the loss of finite outputs is NaN, as that of a label past the end."""
    floats = split_floats(outputs)[0]
    if not all(is_known(x) for x in (undefined, *floats)):
        return
    # NaN of an input whose own outputs hold NaN is no fault of the labels.
    wrong = np.asarray(undefined)
    if not wrong.any():
        return
    for leaf in floats:
        wrong = wrong & np.asarray(jnp.isfinite(leaf)).reshape(len(wrong), -1).all(1)
    if wrong.any():
        row = int(np.argmax(wrong))
        listed = np.unique(np.asarray(labels[row]))[:_SHOWN_LABELS].tolist()
        raise ValueError(
            f"loss: the loss of input {row} is NaN although its outputs are finite, "
            f"got label {listed}; labels must be ids that the outputs have, and those "
            "that do not count are marked with ignore"
        )


def next_token_loss(
    options: tuple[Any, ...], outputs: Outputs, chunk: Chunk
) -> Outputs:
    """Differentiate the cross-entropy of the next token where there is one.

    The gradient is written down, softmax minus one-hot: differentiating the loss takes
    two more passes over the logits (docs/decisions/language.md).
    """
    (select,) = options
    targets, valid = chunk.labels

    def residuals(floats: list[Array]) -> list[Array]:
        shapes = [leaf.shape for leaf in floats]
        if [shape[:-1] for shape in shapes] != [targets.shape]:
            raise ValueError(
                f"next_token_loss: tokens {targets.shape} need logits "
                f"{(*targets.shape, 'V')}, got {', '.join(map(str, shapes))}; pick the "
                "logits with select"
            )
        size = shapes[0][-1]
        _check_targets(targets, valid, size)
        # A target that the logits do not have gives NaN where it counts.
        known = (valid == 0) | ((targets >= 0) & (targets < size))
        factor = jnp.where(known, valid, jnp.full_like(valid, jnp.nan))
        residual = label_residual(targets, to_float32(floats[0]))
        return [(factor[..., None].astype(residual.dtype) * residual)[None]]

    return pull_to_outputs(select, outputs, residuals)


def _check_targets(targets: Array, valid: Array, size: int) -> None:
    """Raise if a concrete target that counts is not among the logits."""
    if not (is_known(targets) and is_known(valid)):
        return
    ids = np.asarray(targets)
    wrong = (np.asarray(valid) != 0) & ((ids < 0) | (ids >= size))
    if wrong.any():
        row, position = np.argwhere(wrong)[0]
        raise ValueError(
            f"next_token_loss: targets must be ids 0 .. {size - 1} of the logits, got "
            f"{ids[row, position]} at position {position + 1} of input {row}; mark "
            "positions that do not count with ignore or mask"
        )


def label_residual(label: Array, logits: Array) -> Array:
    """Gradient of the cross-entropy of a label in the logits."""
    return jax.nn.softmax(logits) - jax.nn.one_hot(
        label, logits.shape[-1], dtype=logits.dtype
    )


def logit_difference(
    options: tuple[Any, ...], outputs: Outputs, chunk: Chunk
) -> Outputs:
    """Differentiate ``logits[..., a] - logits[..., b]``, at one position or summed."""
    position, select = options

    def terms(outputs: Outputs) -> Array:
        logits = _find_logits(apply_select(select, outputs))
        if position is not None:
            logits = _take_position(logits, position)
        indices = {**chunk.labels, **chunk.shared}
        a, b = (_take_entry(logits, indices[name]) for name in "ab")
        return a - b

    return grad_of_terms(terms, outputs)[0]


def _find_logits(outputs: Outputs) -> Array:
    """Return the only floating-point output, or raise."""
    floats = split_floats(outputs)[0]
    if len(floats) != 1 or floats[0].ndim < 2:
        raise ValueError(
            "logit_difference: needs logits [B, ..., V], got "
            f"{list_outputs(outputs)}; pick them with select=lambda outputs: ..."
        )
    return floats[0]


def _take_position(logits: Array, position: int) -> Array:
    """Select one position of ``[B, T, V]``, or raise."""
    if logits.ndim < 3 or not -logits.shape[1] <= position < logits.shape[1]:
        raise ValueError(
            f"logit_difference: position {position} needs logits [B, T, V] that have "
            f"it, got shape {logits.shape}; give one of their positions"
        )
    return logits[:, position]


def _take_entry(logits: Array, index: Array) -> Array:
    """Select an entry of the last axis, one for all inputs or one per input."""
    size = logits.shape[-1]
    concrete = np.asarray(index) if is_known(index) else None
    if concrete is not None and not np.all((-size <= concrete) & (concrete < size)):
        raise ValueError(
            f"logit_difference: index {index} is not one of the {size} entries of "
            f"logits {logits.shape}; give an id that they have"
        )
    index = jnp.broadcast_to(index, logits.shape[:1])
    index = index.reshape((-1, *(1,) * (logits.ndim - 1)))
    return jnp.take_along_axis(logits, index, axis=-1)[..., 0]
