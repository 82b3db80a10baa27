r"""Readouts: what is differentiated, as cotangents at the model's output.

A readout turns the outputs of a batch into ``K`` cotangents per input.  Pulled
back to a site they are the gradients :math:`g_{nk}`, one per readout, read at
each position of the site.  A gradient is a covector, like the readers of features
(what the next layer takes the dot product with); activations are vectors, like their
writers (what the previous layer adds).

A readout is a pytree: labels, keys, scales and masks are leaves, so that one compiled
:func:`toyfeat.tap` serves all batches.  The functions in it are static, so define
them once and not inside a loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from toyfeat.tap import rules
from toyfeat.types import Array, Outputs

Select = Callable[[Outputs], Outputs]


@struct.dataclass
class Readout:
    """A readout, which is differentiated: cotangents at outputs, weights of examples.

    Build one with a function of this module, or from a ``rule`` of your own.

    Attributes:
      rule: ``rule(options, outputs, chunk) -> cotangents``, with the structure
        of ``outputs`` and leaves ``[K, *leaf.shape]``.  Static.
      options: hashable arguments of the rule.  Static.
      labels: pytree with leading axis ``B``, split into chunks with the inputs.
      shared: pytree that is the same for all inputs.
      key: random key, folded with the index of each input.
      mask: ``[B]`` or ``[B, positions...]``, the weights of the examples.
      scales: ``[S]``, the points of a path at which the gradient is taken (see
        :func:`along_path`), or ``None``.
    """

    rule: rules.Rule = struct.field(pytree_node=False)
    options: tuple[Any, ...] = struct.field(pytree_node=False, default=())
    labels: Any = None
    shared: Any = None
    key: Array | None = None
    mask: Array | None = None
    scales: Array | None = None


def scalar(fn: Callable[[Outputs], Array], *, mask: Array | None = None) -> Readout:
    """Gradient of a scalar of each input's output; ``K = 1``.

    Args:
      fn: ``fn(output) -> []`` of the output of *one* input (no batch axis).
        Whatever it returns is summed, so per-token terms are summed over the
        positions.  A function that only works on a whole batch (leading axis
        ``B`` in and out) is accepted; one that could be meant either way and
        means different things raises.
      mask: ``[B]`` or ``[B, positions...]``, the weight of each example;
        everything counts 1 by default.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> probed = ft.from_split(lambda p, x: x @ p, lambda p, a: a**2)
      >>> readout = scalar(lambda y: y[0])
      >>> x = jnp.array([[1.0, 2.0]])
      >>> ft.tap(probed, jnp.eye(2), x, sites="acts", readout=readout)["acts"].grads
      Array([[[2., 0.]]], dtype=float32)
    """
    return Readout(rule=rules.scalar_or_loss, options=(fn,), mask=mask)


def half_squared_norm(*, mask: Array | None = None) -> Readout:
    r"""Gradient of half the squared norm of each input's output; ``K = 1``.

    The gradient is :math:`J^\top y`: every direction that the output depends on,
    weighed by what it adds to the output.  It needs no labels, and every model has it.

    Args:
      mask: weights, as in :func:`scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`; the norm is over all arrays of the outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> probed = ft.from_split(lambda p, x: x, lambda p, a: a @ p)
      >>> params, x = jnp.array([[3.0], [4.0]]), jnp.array([[1.0, 0.5]])
      >>> readout = half_squared_norm()
      >>> ft.tap(probed, params, x, sites="acts", readout=readout)["acts"].grads
      Array([[[15., 20.]]], dtype=float32)
    """
    return scalar(_half_squared_norm, mask=mask)


def loss(
    fn: Callable[[Outputs, Any], Array], labels: Any, *, mask: Array | None = None
) -> Readout:
    """Gradient of a loss against labels; ``K = 1``.

    Gradients of a loss vanish where the model is right: at the optimum they are
    the residual times noise.  Prefer :func:`sampled_labels` or
    :func:`random_directions` when the labels are not the point.

    Args:
      fn: ``fn(output, label) -> []`` for one input; summed like in
        :func:`scalar`.  The losses of optax fit.
      labels: pytree whose leaves have leading axis ``B``.
      mask: weights, as in :func:`scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> readout = loss(optax.squared_error, jnp.zeros((8, 3)))
    """
    return Readout(rule=rules.scalar_or_loss, options=(fn,), labels=labels, mask=mask)


def next_token_loss(
    tokens: Array,
    *,
    mask: Array | None = None,
    first: bool = False,
    select: Select | None = None,
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

    Returns:
      A readout for sites with positions ``[T]``.

    Raises:
      ValueError: if ``tokens`` is not ``[B, T]`` with ``T >= 2``, or if ``mask``
        has another shape.
    """
    tokens = _as_integers("next_token_loss: tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            "next_token_loss: tokens must be [B, T] with T >= 2, got shape "
            f"{tokens.shape}"
        )
    mask = jnp.ones(tokens.shape) if mask is None else jnp.asarray(mask, jnp.float32)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"next_token_loss: mask must have the shape of tokens {tokens.shape}, got "
            f"{mask.shape}"
        )
    # A position has a target if it and the next one are no padding.
    targets = jnp.concatenate([mask[:, :-1] * mask[:, 1:], 0 * mask[:, :1]], axis=1)
    # The first position that is no padding is no example, unless asked for.
    after_first = jnp.cumsum(mask > 0, axis=1) > 1
    weights = targets if first else jnp.where(after_first, targets, 0)
    return Readout(
        rule=rules.next_token_loss,
        options=(select,),
        labels=(jnp.roll(tokens, -1, axis=1), targets),
        mask=weights,
    )


def sampled_labels(
    key: Array,
    *,
    num: int = 1,
    family: str = "categorical",
    select: Select | None = None,
    mask: Array | None = None,
) -> Readout:
    """Gradient of the loss against labels drawn from the model's own output.

    The second moment of these gradients is the true Fisher information (not the
    empirical one), and unlike those of :func:`loss` they do not vanish where the
    model is right.

    Args:
      key: random key; input ``i`` uses ``fold_in(key, i)``.
      num: how many labels to draw per position; gives ``K``, scaled by
        ``1 / sqrt(num)``.
      family: ``"categorical"`` (outputs are logits ``[B, ..., V]``),
        ``"bernoulli"`` (logits) or ``"gaussian"`` (means with unit variance).
      select: picks the logits or means out of the outputs.
      mask: weights, as in :func:`scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Raises:
      ValueError: for an unknown family or ``num < 1``.

    References:
      Martens (2020), "New insights and perspectives on the natural gradient
      method", section 5.
    """
    if family not in rules.RESIDUALS:
        raise ValueError(
            f"sampled_labels: family must be one of {sorted(rules.RESIDUALS)}, got "
            f"{family!r}"
        )
    _check_num("sampled_labels", num)
    return Readout(
        rule=rules.sampled_labels, options=(num, family, select), key=key, mask=mask
    )


def random_directions(
    key: Array,
    num: int,
    kind: str = "rademacher",
    *,
    over: str = "all",
    select: Select | None = None,
    mask: Array | None = None,
) -> Readout:
    r"""Gradient along random directions of the whole output of an input.

    With :math:`u_k` of independent zero-mean unit-variance entries and
    :math:`g_k = J^\top u_k / \sqrt{K}`,
    :math:`E \sum_k g_k g_k^\top = J^\top J`.

    Args:
      key: random key; input ``i`` uses ``fold_in(key, i)``.
      num: the number ``K`` of directions.
      kind: ``"rademacher"`` (smaller variance) or ``"gaussian"``.
      over: which entries of an output share a direction: ``"all"``; the
        ``"positions"`` of one unit (entry of the last axis), so that ``K`` is
        ``num`` times the units; or the ``"units"`` of one position, ``K`` being
        ``num`` times the positions.  The last two cost more and have a smaller
        variance.
      select: picks the part of the outputs to look at.
      mask: weights, as in :func:`scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Raises:
      ValueError: for an unknown ``kind`` or ``over``, or ``num < 1``; from
        ``tap``, if ``over`` is not ``"all"`` and there are several outputs.

    References:
      Hutchinson (1990); Bushnaq et al. (2024), arXiv 2405.10928, "stochastic
      sources".
    """
    if kind not in rules.DRAWS:
        raise ValueError(
            f"random_directions: kind must be one of {sorted(rules.DRAWS)}, got "
            f"{kind!r}"
        )
    if over not in ("all", "positions", "units"):
        raise ValueError(
            "random_directions: over must be 'all', 'positions' or 'units', got "
            f"{over!r}"
        )
    _check_num("random_directions", num)
    options = (num, kind, select, over)
    return Readout(rule=rules.random_directions, options=options, key=key, mask=mask)


def directions(
    cotangents: Outputs, *, select: Select | None = None, mask: Array | None = None
) -> Readout:
    """Gradient along given directions of the output.

    Args:
      cotangents: the structure of one input's output, leaves ``[K, ...]``.
      select: picks the part of the outputs that the directions live in.
      mask: weights, as in :func:`scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`, which raises if a shape does not fit.
    """
    return Readout(
        rule=rules.directions, options=(select,), shared=cotangents, mask=mask
    )


def jacobian(*, select: Select | None = None, mask: Array | None = None) -> Readout:
    """Gradient of every entry of an input's output.

    ``K`` is the number of output entries per input, in the order of the
    flattened outputs.  Memory and time grow with it: for wide outputs use
    :func:`random_directions`, or bound memory with ``batch_size``.

    Args:
      select: picks the part of the outputs to look at.
      mask: weights, as in :func:`scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`.
    """
    return Readout(rule=rules.jacobian, options=(select,), mask=mask)


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
      mask: weights, as in :func:`scalar`.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Raises:
      TypeError: if an index is not an integer.
      ValueError: if an index is neither a scalar nor ``[B]``; from ``tap``, if
        the outputs do not have it (inside jit the gradients are NaN instead).
    """
    a = _as_integers("logit_difference: a", a)
    b = _as_integers("logit_difference: b", b)
    if a.ndim > 1 or b.ndim > 1:
        raise ValueError(
            "logit_difference: a and b must be integers or [B], got shapes "
            f"{a.shape} and {b.shape}"
        )
    # One index per input is split with the inputs, a single one is shared.
    per_input = {n: v for n, v in (("a", a), ("b", b)) if v.ndim}
    shared = {n: v for n, v in (("a", a), ("b", b)) if not v.ndim}
    return Readout(
        rule=rules.logit_difference,
        options=(position, select),
        labels=per_input,
        shared=shared,
        mask=mask,
    )


def along_path(readout: Readout, scales: Array) -> Readout:
    r"""Take a readout's gradient at several scalings of the activation.

    The gradient of ``readout`` with respect to the activation is taken at
    ``scale * act`` for each scale, one site at a time; the activations returned
    are the unscaled ones.  ``K`` becomes ``len(scales)`` times the readout's,
    scale-major, unscaled: with midpoints :math:`(s + 1/2)/S` the mean over the
    path times the activation is the integrated gradient, whose sum is
    :math:`F(a) - F(0)` up to the quadrature.

    Args:
      readout: any readout but another path.
      scales: ``[S]``.

    Returns:
      A readout for :func:`toyfeat.tap`.

    Raises:
      ValueError: if ``scales`` is not a non-empty vector or ``readout`` is a
        path already.

    References:
      Sundararajan, Taly and Yan (2017), equation 1, with baseline 0.
    """
    scales = jnp.asarray(scales, dtype=jnp.result_type(float))
    if scales.ndim != 1 or not scales.size:
        raise ValueError(
            "along_path: scales must be a vector with entries, got shape "
            f"{scales.shape}"
        )
    if readout.scales is not None:
        raise ValueError(
            "along_path: the readout is a path already; give its scales once"
        )
    return dataclasses.replace(readout, scales=scales)


def _half_squared_norm(output: Outputs) -> Array:
    """Sum over all leaves; one function, so that all such readouts share a program."""
    return jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(output)]).sum() / 2


def _as_integers(who: str, index: Array | int) -> Array:
    """Convert to an integer array, or raise."""
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{who} must be integers, got {index.dtype}")
    return index


def _check_num(who: str, num: int) -> None:
    """Raise if a number of draws is not positive."""
    if num < 1:
        raise ValueError(f"{who}: num must be at least 1, got {num}")
