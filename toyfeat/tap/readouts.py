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

import jax
import jax.numpy as jnp

from toyfeat.checks import (
    as_array,
    check_choice,
    check_function,
    check_int,
    check_key,
)
from toyfeat.tap import random_rules, rules
from toyfeat.tap.label_readouts import logit_difference, loss, next_token_loss
from toyfeat.tap.rules import Readout, Select, check_mask, check_select
from toyfeat.types import Array, Outputs

__all__ = [
    "Readout",
    "along_path",
    "directions",
    "half_squared_norm",
    "jacobian",
    "logit_difference",
    "loss",
    "next_token_loss",
    "random_directions",
    "sampled_labels",
    "scalar",
]


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
    check_function("scalar", "fn", fn, "of one input's output")
    mask = check_mask("scalar", mask)
    return Readout(rule=rules.scalar, options=(fn,), mask=mask)


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
    check_choice("sampled_labels", "family", family, random_rules.RESIDUALS)
    check_key("sampled_labels", key)
    check_select("sampled_labels", select)
    num = check_int("sampled_labels", "num", num)
    return Readout(
        rule=random_rules.sampled_labels,
        options=(num, family, select),
        key=key,
        mask=check_mask("sampled_labels", mask),
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
    check_choice("random_directions", "kind", kind, random_rules.DRAWS)
    check_choice("random_directions", "over", over, ("all", "positions", "units"))
    check_key("random_directions", key)
    check_select("random_directions", select)
    mask = check_mask("random_directions", mask)
    num = check_int("random_directions", "num", num)
    options = (num, kind, select, over)
    return Readout(
        rule=random_rules.random_directions, options=options, key=key, mask=mask
    )


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
    check_select("directions", select)
    mask = check_mask("directions", mask)
    cotangents = jax.tree.map(
        lambda leaf: as_array("directions", "cotangents", leaf), cotangents
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(cotangents)]
    if not shapes or not all(shape and shape[0] for shape in shapes):
        raise ValueError(
            "directions: cotangents must be arrays [K, ...] with K >= 1, got shapes "
            f"{shapes}; give K directions of one input's output"
        )
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
    check_select("jacobian", select)
    mask = check_mask("jacobian", mask)
    return Readout(rule=rules.jacobian, options=(select,), mask=mask)


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
    if not isinstance(readout, Readout):
        raise TypeError(
            "along_path: readout must come from toyfeat.readouts, got "
            f"{type(readout).__name__}; make one with readouts.scalar, ..."
        )
    scales = as_array("along_path", "scales", scales)
    scales = jnp.asarray(scales, dtype=jnp.result_type(float))
    if scales.ndim != 1 or not scales.size:
        raise ValueError(
            "along_path: scales must be a vector with entries, got shape "
            f"{scales.shape}; give the points of the path, such as [0.5]"
        )
    if readout.scales is not None:
        raise ValueError(
            "along_path: the readout is a path already; give its scales once"
        )
    return dataclasses.replace(readout, scales=scales)


def _half_squared_norm(output: Outputs) -> Array:
    """Sum over all leaves; one function, so that all such readouts share a program."""
    return jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(output)]).sum() / 2
