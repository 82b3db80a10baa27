"""Readouts with labels: losses and differences of logits.

Users find them in :mod:`toyfeat.tap.readouts`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import (
    as_array,
    as_integers,
    check_flag,
    check_function,
    check_int,
)
from toyfeat.meshes import by_rows, is_known, run_automatic
from toyfeat.tap import label_rules
from toyfeat.tap.rules import Readout, Select, check_mask, check_select
from toyfeat.types import Array, Outputs

# Labels that do not count have this value in PyTorch and in transformers.
IGNORED_LABEL = -100


def loss(
    fn: Callable[[Outputs, Any], Array],
    labels: Any,
    *,
    mask: Array | None = None,
    ignore: int | None = IGNORED_LABEL,
) -> Readout:
    """Gradient of a loss against labels; ``K = 1``.

    Gradients of a loss vanish where the model is right: at the optimum they are
    the residual times noise.  Prefer :func:`toyfeat.readouts.sampled_labels` or
    :func:`toyfeat.readouts.random_directions` when the labels are not the point.

    Args:
      fn: ``fn(output, label) -> []`` for one input; summed like in
        :func:`toyfeat.readouts.scalar`.  The losses of optax fit.
      labels: pytree whose leaves have leading axis ``B``.
      mask: weights, as in :func:`toyfeat.readouts.scalar`.
      ignore: value that marks labels that do not count, if ``labels`` is one integer
        array: they have no loss, and an input without any other label has weight 0.
        The losses must have the shape of the labels, not be summed or averaged over
        them.  ``None`` counts all labels.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Raises:
      TypeError: if ``fn`` is no function or ``labels`` holds no array.
      ValueError: from ``tap``, for integer labels that give NaN or are counted from
        the end, as labels that the outputs do not have; inside jit the gradients are
        NaN for the first, and the second is not seen.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> readout = loss(optax.squared_error, jnp.zeros((8, 3)))
      >>> cross_entropy = optax.softmax_cross_entropy_with_integer_labels
      >>> loss(cross_entropy, jnp.array([2, -100, 0])).mask
      Array([1., 0., 1.], dtype=float32)
    """
    check_function("loss", "fn", fn, "(output, label)")
    ignore = _check_ignore("loss", ignore)
    mask = check_mask("loss", mask)
    labels = jax.tree.map(lambda leaf: as_array("loss", "labels", leaf), labels)
    if not jax.tree.leaves(labels):
        raise TypeError(
            "loss: labels must be arrays with leading axis B, got none; use scalar for "
            "a function of the outputs alone"
        )
    if label_rules.is_label_array(labels) and labels.ndim:
        mask = _weights_of_inputs(label_rules.counted_labels(labels, ignore), mask)
    return Readout(
        rule=label_rules.loss, options=(fn, ignore), labels=labels, mask=mask
    )


def next_token_loss(
    tokens: Array,
    *,
    mask: Array | None = None,
    first: bool = False,
    select: Select | None = None,
    ignore: int | None = IGNORED_LABEL,
) -> Readout:
    """Cross-entropy of the next token, summed over an input's positions; ``K = 1``.

    Position ``t`` predicts token ``t + 1``.  The last position has no target and
    gets weight 0.  So does the first one that is not padding, whose activations
    are often massive outliers; ``first=True`` counts it.

    Args:
      tokens: ``[B, T]`` int.
      mask: ``[B, T]``, 0 at padding, which is then neither target nor example.
      first: whether the first position counts as an example.
      select: picks the logits ``[B, T, V]`` out of the outputs.
      ignore: a token of this value stands for none, like 0 in ``mask``; ``None`` if
        no token does.

    Returns:
      A readout for sites with positions ``[T]``.

    Raises:
      TypeError: if ``tokens`` are no integers.
      ValueError: if ``tokens`` is not ``[B, T]`` with ``T >= 2``, or if ``mask``
        has another shape; from ``tap``, if the logits do not have a target (inside
        jit the gradients of that input are NaN instead).
    """
    tokens = as_integers("next_token_loss", "tokens", tokens)
    check_select("next_token_loss", select)
    ignore = _check_ignore("next_token_loss", ignore)
    check_flag("next_token_loss", "first", first)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            "next_token_loss: tokens must be [B, T] with T >= 2, got shape "
            f"{tokens.shape}; a sequence needs a next token"
        )
    mask = check_mask("next_token_loss", mask)
    mask = jnp.ones(tokens.shape) if mask is None else jnp.asarray(mask, jnp.float32)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"next_token_loss: mask must have the shape of tokens {tokens.shape}, got "
            f"{mask.shape}; give 1 per token that counts, and 0 at padding"
        )
    # Ignored tokens are padding.
    counted = label_rules.counted_labels(tokens, ignore)
    mask = jnp.where(counted, mask, jnp.zeros_like(mask))
    # A position has a target if it and the next one are no padding.
    targets = jnp.concatenate([mask[:, :-1] * mask[:, 1:], 0 * mask[:, :1]], axis=1)
    # The first position that is no padding is no example, unless asked for.
    after_first = jnp.cumsum(mask > 0, axis=1) > 1
    weights = targets if first else jnp.where(after_first, targets, 0)
    return Readout(
        rule=label_rules.next_token_loss,
        options=(select,),
        labels=(jnp.roll(tokens, -1, axis=1), targets),
        mask=weights,
    )


def logit_difference(
    a: Array | int,
    b: Array | int,
    *,
    position: int | None = None,
    select: Select | None = None,
    mask: Array | None = None,
) -> Readout:
    """Gradient of ``logits[..., a] - logits[..., b]``; ``K = 1``.

    Args:
      a: index on the last axis, one for all inputs or ``[B]``.
      b: likewise.
      position: which position of ``[B, T, V]`` outputs to look at, such as -1;
        all are summed by default.
      select: picks the logits out of the outputs.
      mask: weights, as in :func:`toyfeat.readouts.scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Raises:
      TypeError: if an index is not an integer.
      ValueError: if an index is neither a scalar nor ``[B]``; from ``tap``, if
        the outputs do not have it (inside jit the gradients are NaN instead).
    """
    a = as_integers("logit_difference", "a", a)
    b = as_integers("logit_difference", "b", b)
    check_select("logit_difference", select)
    mask = check_mask("logit_difference", mask)
    if position is not None:
        position = check_int("logit_difference", "position", position, least=None)
    if a.ndim > 1 or b.ndim > 1:
        raise ValueError(
            "logit_difference: a and b must be integers or [B], got shapes "
            f"{a.shape} and {b.shape}; give one id, or one per input"
        )
    # One index per input is split with the inputs, a single one is shared.
    per_input = {n: v for n, v in (("a", a), ("b", b)) if v.ndim}
    shared = {n: v for n, v in (("a", a), ("b", b)) if not v.ndim}
    return Readout(
        rule=label_rules.logit_difference,
        options=(position, select),
        labels=per_input,
        shared=shared,
        mask=mask,
    )


def _check_ignore(who: str, ignore: Any) -> int | None:
    """Return the value of labels that do not count as an int, or raise."""
    return None if ignore is None else check_int(who, "ignore", ignore, least=None)


def _weights_of_inputs(counted: Any, mask: Any) -> Any:
    """Set the weight of inputs whose labels are all ignored to 0."""
    # Most often there are none: the readout then keeps its structure, and its program.
    counted = counted.reshape(len(counted), -1).any(axis=1)
    if is_known(counted) and np.all(counted):
        return mask
    weights = jnp.ones(counted.shape) if mask is None else jnp.asarray(mask)
    if weights.shape[:1] != counted.shape:
        return mask  # tap raises, and names both sizes

    def mask_rows(counted: Array, weights: Array) -> Array:
        rows = counted.reshape((-1, *(1,) * (weights.ndim - 1)))
        return jnp.where(rows, weights, jnp.zeros_like(weights))

    return run_automatic(mask_rows, by_rows(counted), counted, weights)
