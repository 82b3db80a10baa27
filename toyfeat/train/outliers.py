"""Find outlier dimensions of activations before training."""

import warnings
from typing import NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_number
from toyfeat.dictionary.types import Config
from toyfeat.processes import to_host
from toyfeat.types import Moments, Taps

# The limits below were chosen by the shares of latents that died in training, see
# docs/decisions/train.md, "Outliers are judged by |mean| / |std| of the first batch".
_LIMIT = 3.0  # |mean| / std of a dimension that is listed
_SEVERE = 2.0  # |mean| / |std| of all dimensions that is reported
_SEVERE_TOPK = 1.0  # the same where only the k largest codes count
_MASSIVE = 10.0  # standard deviation, in units of the median one
_MASSIVE_SHARE = 0.5  # of the variance: massive dimensions have more than all others


class OutlierDims(NamedTuple):
    """Dimensions of activations that stand out.

    Attributes:
      dims: ``[n]`` int, whose mean is far from 0 in units of their standard
        deviation, the farthest first.
      ratios: ``[n]``, how far; inf where a dimension does not vary.
      share: ``n / D``.
      severity: ``|mean| / |std|``, norms over all dimensions.
      massive: ``[m]`` int, whose standard deviation is far above the median one, the
        largest first.
      spread: the largest standard deviation in units of the median one.
      massive_variance: share of the variance that the massive dimensions have.
    """

    dims: np.ndarray
    ratios: np.ndarray
    share: float
    severity: float
    massive: np.ndarray
    spread: float
    massive_variance: float


def outlier_dims(
    data: Taps | Moments, *, limit: float = _LIMIT, massive: float = _MASSIVE
) -> OutlierDims:
    r"""Find dimensions that dominate by their mean or by their variance.

    A latent with a random encoder starts with a pre-activation of mean
    :math:`w \cdot \mu` and standard deviation about :math:`|w||\sigma| / \sqrt D`, so
    that among latents the mean is normal with :math:`\gamma = |\mu| / |\sigma|` of
    these: the share that does not fire in a hundred thousand examples is about
    :math:`\Phi(-4.3 / \gamma)`, none at 1, 8 % at 3, 39 % at 15.  Where only the
    largest codes count it takes less.  Centring takes :math:`\mu` away
    (``trainer(center=True)``, the default, for what is no transcoder).  A massive
    dimension is nearly all that a reconstruction is scored on, centred or not.

    Args:
      data: taps of a site, or moments of it; concrete, outside of jit.
      limit: ratio :math:`|\mu_d| / \sigma_d` from which a dimension is listed.
      massive: standard deviation, in units of the median of the dimensions that
        vary, from which one is massive.

    Returns:
      :class:`OutlierDims`; examples count by their weight.

    Raises:
      ValueError: if a limit is not positive, no example has weight, or activations
        are not finite.
      TypeError: inside jit, and for another kind of data.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> acts = jax.random.normal(jax.random.key(0), (500, 8)).at[:, 3].add(40.0)
      >>> outliers = outlier_dims(Taps(acts, None, jnp.ones(500)))
      >>> outliers.dims.tolist(), outliers.severity > 3, outliers.massive.tolist()
      ([3], True, [])

    References:
      Simon, Adams and Zou (2026), "On the relationship between activation outliers
      and feature death in sparse autoencoders", arXiv 2605.31518, for
      :math:`\gamma`; the shares above are of the model here, not theirs.
    """
    for name, value in (("limit", limit), ("massive", massive)):
        check_number("outlier_dims", name, value, above=0, finite=False)
    mean, std = _mean_and_std(data)
    # Shifted dimensions: |mean| / std, inf where a dimension is a constant but 0.
    size = np.abs(mean)
    safe = np.where(std > 0, std, 1.0)
    ratios = np.where(std > 0, size / safe, np.where(size > 0, np.inf, 0.0))
    dims = np.argsort(-ratios)[: np.sum(ratios > limit)]
    # Massive dimensions: compared with the median of those that vary.
    total_std, median_std = float(np.linalg.norm(std)), 0.0
    if total_std > 0:
        median_std = float(np.median(std[std > 0]))
    large = np.argsort(-std)[: np.sum(std > massive * median_std)] if median_std else []
    large = np.asarray(large, int)
    return OutlierDims(
        dims=dims,
        ratios=ratios[dims],
        share=len(dims) / len(mean),
        severity=_ratio(float(np.linalg.norm(mean)), total_std),
        massive=large,
        spread=_ratio(float(std.max()), median_std),
        massive_variance=(
            float(np.sum(std[large] ** 2) / total_std**2) if total_std else 0.0
        ),
    )


def warn_of_outliers(taps: Taps, config: Config, center: bool) -> None:
    """Warn of activations that impede the training of a dictionary.

    Args:
      taps: the first batch.
      config: of the dictionary; a transcoder does not subtract ``b_dec``.
      center: whether ``b_dec`` starts at the mean.
    """
    acts = np.asarray(taps.acts)[np.asarray(taps.weights) > 0]
    if not np.isfinite(acts).all():
        return  # the loss will not be finite either, and fit raises
    if len(acts) == 0 or np.all(acts == acts[0]):
        what = "differ in nothing" if len(acts) else "have no weight"
        warnings.warn(
            f"fit: the examples of the first batch {what}; there is nothing to learn "
            "from them, nor a scale",
            stacklevel=5,
        )
        return
    outliers = outlier_dims(taps)
    severe = _SEVERE if config.k is None else _SEVERE_TOPK
    hint = ", or fit(check_data=False) to go on without this look at the first batch"
    # A mean that is not subtracted makes latents die.
    if outliers.severity > severe and not (center and config.apply_b_dec_to_input):
        remedy = "subtract the mean of the activations from them"
        if config.apply_b_dec_to_input:
            remedy = "leave trainer(center=True) on"
        warnings.warn(f"{_describe_mean(outliers)}: {remedy}{hint}", stacklevel=5)
    # Massive dimensions fill the loss.
    if outliers.massive_variance > _MASSIVE_SHARE:
        problem = _describe_massive(outliers, taps.acts.shape[1])
        remedy = "divide each dimension by its standard deviation, leave massive "
        warnings.warn(f"{problem}: {remedy}ones out{hint}", stacklevel=5)


def _describe_mean(outliers: OutlierDims) -> str:
    """Say how far activations are from 0, with the dimensions that are farthest."""
    worst = ", ".join(
        f"{d} ({r:.3g})"
        for d, r in zip(outliers.dims[:3], outliers.ratios[:3], strict=True)
    )
    largest = f"; the largest |mean| / std: dimensions {worst}" if worst else ""
    return (
        f"fit: activations are not centred and their mean is {outliers.severity:.3g} "
        f"times as long as their standard deviation{largest}. Latents that point away "
        "from the mean never fire"
    )


def _describe_massive(outliers: OutlierDims, width: int) -> str:
    """Say how much of the variance massive dimensions have, with the largest."""
    listed = ", ".join(str(d) for d in outliers.massive[:5])
    return (
        f"fit: {len(outliers.massive)} of {width} dimensions ({listed}) have "
        f"{outliers.massive_variance:.0%} of the variance, up to "
        f"{outliers.spread:.3g} times the median standard deviation, so the others "
        "hardly count in the loss"
    )


def _mean_and_std(data: Taps | Moments) -> tuple[np.ndarray, np.ndarray]:
    """Compute the weighted mean and standard deviation of every dimension."""
    if not isinstance(data, Taps | Moments):
        raise TypeError(
            f"outlier_dims: wanted Taps or Moments, got {type(data).__name__}"
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(data)):
        raise TypeError("outlier_dims: looks at values, so call it outside of jit")
    if isinstance(data, Taps):
        # Examples without weight may be NaN, so they are left out first.
        weights = to_host(data.weights).astype(np.float64)
        acts = to_host(data.acts).astype(np.float64)[weights > 0]
        weights = weights[weights > 0]
        total = weights.sum()
        mean = weights @ acts / total if total > 0 else np.zeros(acts.shape[1:])
        square = weights @ (acts - mean) ** 2
    else:
        # Second moments hold the sums already.
        total = float(np.asarray(data.weight))
        mean = np.asarray(data.mean, np.float64)
        square = np.diagonal(np.asarray(data.scatter, np.float64))
    if not total > 0:
        raise ValueError("outlier_dims: no example has weight")
    if not (np.isfinite(mean).all() and np.isfinite(square).all()):
        raise ValueError("outlier_dims: activations are not all finite; see check_taps")
    return mean, np.sqrt(np.maximum(square, 0) / total)


def _ratio(numerator: float, denominator: float) -> float:
    """Divide, with inf for a positive number over 0 and 0 for 0 over 0."""
    if denominator > 0:
        return numerator / denominator
    return float("inf") if numerator > 0 else 0.0
