"""Splice a dictionary into a model, and measure what that costs the model."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from toyfeat.checks import as_host_floats, check_type
from toyfeat.dictionary.types import Dictionary
from toyfeat.types import Array, ArrayLike, Params

# Decimals of a correlation: what lies behind them is float64 rounding.
_DECIMALS = 12


class Faithfulness(NamedTuple):
    """Agreement of first-order effects with those of leaving latents out.

    Attributes:
      correlation: Pearson's, between predicted and true effects; nan if either is
        constant.
      slope: of the true effect on the predicted one, through the origin; 1 is right.
      error: squared error of the prediction, as a share of the squared true effects;
        0 is right, 1 is as good as predicting none.
      pairs: number of effects that were compared.
    """

    correlation: float
    slope: float
    error: float
    pairs: int


def splice(
    dictionary: Dictionary, params: Params, *, grads: Array | None = None
) -> Callable[[Array], Array]:
    """Make a probe that replaces an activation by its reconstruction.

    Args:
      dictionary: of the site's width.
      params: for activations as they are (:func:`toyfeat.denormalized`).
      grads: ``[N, K, D]`` of the same examples, where the architecture chooses codes
        by gradients; without them it chooses by activations alone.

    Returns:
      ``act [..., D] -> act [..., D]``, for ``probes={site: ...}`` of any probed
      model; its dtype is kept.

    Raises:
      ValueError: when called, if the width is another one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import toyfeat as ft
      >>> probed = ft.from_split(lambda p, x: x, lambda p, a: a.sum(-1))
      >>> sae = ft.dictionaries.topk(3, 12, 2)
      >>> probe = splice(sae, sae.init(jax.random.key(0)))
      >>> probed(None, jnp.ones((4, 5, 3)), {"acts": probe})[0].shape
      (4, 5)
    """
    check_type("splice", "dictionary", dictionary, Dictionary)
    if not isinstance(params, Mapping) or "b_dec" not in params:
        raise TypeError(
            "splice: params must be parameters of the dictionary, got "
            f"{type(params).__name__}; pass what dictionary.init or ft.denormalized "
            "returned"
        )

    def probe(act: Array) -> Array:
        flat = act.reshape(-1, act.shape[-1]).astype(params["b_dec"].dtype)
        codes = dictionary.encode(params, flat, grads=grads)
        return dictionary.decode(params, codes).reshape(act.shape).astype(act.dtype)

    return probe


def ce_recovered(
    clean: float | ArrayLike, spliced: float | ArrayLike, ablated: float | ArrayLike
) -> np.ndarray:
    r"""Compute the share of the cost of an ablation that a splice recovers.

    :math:`(L_{ablated} - L_{spliced}) / (L_{ablated} - L_{clean})`: 1 is as good as the
    model itself, 0 as bad as the ablation, and below 0 worse.

    Args:
      clean: loss of the model, such as the cross-entropy of the next token.
      spliced: with the dictionary in it.
      ablated: with the site at 0, or at its mean.

    Returns:
      The share, in the shape of the arguments; nan where the ablation costs nothing
      or a loss is nan.

    Raises:
      TypeError: if an argument does not hold numbers.

    Example:
      >>> float(ce_recovered(3.0, 3.5, 8.0))
      0.9
    """
    clean = as_host_floats("ce_recovered", "clean", clean)
    spliced = as_host_floats("ce_recovered", "spliced", spliced)
    ablated = as_host_floats("ce_recovered", "ablated", ablated)
    cost = ablated - clean
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(cost > 0, (ablated - spliced) / cost, np.nan)


def attribution_faithfulness(predicted: ArrayLike, true: ArrayLike) -> Faithfulness:
    """Compare first-order effects of latents with the effects of leaving them out.

    Args:
      predicted: ``[P]``, ``-A_j``: minus the latent's code times its writer's product
        with the gradient.
      true: ``[P]``, the readout without the latent's part minus the readout.

    Returns:
      :class:`Faithfulness`.

    Raises:
      ValueError: if the shapes differ, there is no pair, or a value is not finite.

    Example:
      >>> attribution_faithfulness([1.0, -2.0, 0.5], [2.0, -4.0, 1.0])[:3]
      (1.0, 2.0, 0.25)
    """
    p = as_host_floats("attribution_faithfulness", "predicted", predicted)
    t = as_host_floats("attribution_faithfulness", "true", true)
    if p.shape != t.shape or p.ndim != 1 or not p.size:
        raise ValueError(
            "attribution_faithfulness: wanted predicted and true [P] with P >= 1, got "
            f"shapes {p.shape} and {t.shape}; one pair per latent"
        )
    if not (np.isfinite(p).all() and np.isfinite(t).all()):
        bad = int(np.sum(~np.isfinite(p) | ~np.isfinite(t)))
        raise ValueError(
            f"attribution_faithfulness: effects must be finite, got {bad} pairs that "
            "are not; look at the model's losses"
        )
    # In units of the largest effect: squares of tiny ones would vanish.
    size = max(np.abs(p).max(), np.abs(t).max(), np.finfo(float).tiny)
    p, t = p / size, t / size

    # Pearson's correlation; the standard deviation of a constant may be rounding.
    varies = np.ptp(p) > 0 and np.ptp(t) > 0
    scale = np.std(p) * np.std(t) if varies else 0.0
    covariance = np.mean((p - p.mean()) * (t - t.mean()))
    correlation = covariance / scale if scale > 0 else np.nan

    # Regression through the origin, and the error of the prediction itself.
    slope = (p @ t) / (p @ p) if p.any() else np.nan
    error = np.sum((t - p) ** 2) / (t @ t) if t.any() else np.nan
    return Faithfulness(
        correlation=round(float(correlation), _DECIMALS),
        slope=float(slope),
        error=float(error),
        pairs=len(p),
    )
