"""Dimensions that make latents die or fill the variance, found before training."""

import warnings

import jax
import numpy as np
from jax.core import Tracer

from toyfeat.types import DictionaryConfig, Moments, Outliers, Taps

_LIMIT = 3.0  # of one dimension's ratio
_SEVERE = 2.0  # of all together, for codes that do not compete
_SEVERE_FOR_FEW = 1.0  # for the k largest of them
_MASSIVE = 10.0  # times the median standard deviation


def check_outliers(
    data: Taps | Moments, *, limit: float = _LIMIT, massive: float = _MASSIVE
) -> Outliers:
    r"""Look for dimensions that dominate by their mean or by their variance.

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
      :class:`Outliers`; examples count by their weight.

    Raises:
      ValueError: if a limit is not positive, no example has weight, or activations
        are not finite.
      TypeError: inside jit, and for another kind of data.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> acts = jax.random.normal(jax.random.key(0), (500, 8)).at[:, 3].add(40.0)
      >>> found = check_outliers(Taps(acts, None, jnp.ones(500)))
      >>> found.dims.tolist(), found.severity > 3, found.massive.tolist()
      ([3], True, [])

    References:
      Simon, Adams and Zou (2026), "On the relationship between activation outliers
      and feature death in sparse autoencoders", arXiv 2605.31518, for
      :math:`\gamma`; the shares above are of the model here, not theirs.
    """
    for name, value in (("limit", limit), ("massive", massive)):
        if not value > 0:
            raise ValueError(f"check_outliers: {name} must be positive, got {value}")
    mean, std = _mean_and_std(data)
    size = np.abs(mean)
    safe = np.where(std > 0, std, 1.0)
    ratios = np.where(std > 0, size / safe, np.where(size > 0, np.inf, 0.0))
    dims = np.argsort(-ratios)[: np.sum(ratios > limit)]
    whole, usual = float(np.linalg.norm(std)), 0.0
    if whole > 0:
        usual = float(np.median(std[std > 0]))
    large = np.argsort(-std)[: np.sum(std > massive * usual)] if usual else []
    large = np.asarray(large, int)
    return Outliers(
        dims,
        ratios[dims],
        len(dims) / len(mean),
        _over(float(np.linalg.norm(mean)), whole),
        large,
        _over(float(std.max()), usual),
        float(np.sum(std[large] ** 2) / whole**2) if whole else 0.0,
    )


def warn_of_outliers(taps: Taps, config: DictionaryConfig, center: bool) -> None:
    """Warn if the first batch is one that a dictionary will not get on with.

    Args:
      taps: the batch.
      config: of the dictionary; a transcoder does not subtract ``b_dec``.
      center: whether ``b_dec`` starts at the mean.
    """
    there = np.asarray(taps.weights) > 0
    acts = np.asarray(taps.acts)[there]
    if not np.isfinite(acts).all():
        return  # the loss will say so
    if len(acts) == 0 or np.all(acts == acts[0]):
        what = "differ in nothing" if len(acts) else "have no weight"
        warnings.warn(
            f"fit: the examples of the first batch {what}; there is nothing to learn "
            "from them, nor a scale",
            stacklevel=5,
        )
        return
    found = check_outliers(taps)
    severe = _SEVERE if config.k is None else _SEVERE_FOR_FEW
    off = ", or fit(check_data=False) to go on without this look at the first batch"
    if found.severity > severe and not (center and config.apply_b_dec_to_input):
        what = "subtract the mean of the activations from them"
        if config.apply_b_dec_to_input:
            what = "leave trainer(center=True) on"
        worst = ", ".join(
            f"{d} ({r:.3g})"
            for d, r in zip(found.dims[:3], found.ratios[:3], strict=True)
        )
        most = f"; the largest |mean| / std: dimensions {worst}" if worst else ""
        warnings.warn(
            f"fit: activations are not centred and their mean is {found.severity:.3g} "
            f"times as long as their standard deviation{most}. Latents that point away "
            f"from the mean never fire: {what}{off}",
            stacklevel=5,
        )
    if found.massive_variance > 0.5:
        named = ", ".join(str(d) for d in found.massive[:5])
        warnings.warn(
            f"fit: {len(found.massive)} of {taps.acts.shape[1]} dimensions ({named}) "
            f"have {found.massive_variance:.0%} of the variance, up to "
            f"{found.spread:.3g} times the median standard deviation, so the others "
            "hardly count in the loss: divide each dimension by its standard "
            f"deviation, leave massive ones out{off}",
            stacklevel=5,
        )


def _mean_and_std(data: Taps | Moments) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(data, Taps | Moments):
        raise TypeError(
            f"check_outliers: wanted Taps or Moments, got {type(data).__name__}"
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(data)):
        raise TypeError("check_outliers: looks at values, so call it outside of jit")
    if isinstance(data, Taps):
        weights = np.asarray(data.weights, np.float64)
        acts = np.asarray(data.acts, np.float64)[weights > 0]
        weights = weights[weights > 0]
        total = weights.sum()
        mean = weights @ acts / total if total > 0 else np.zeros(acts.shape[1:])
        square = weights @ (acts - mean) ** 2
    else:
        total = float(np.asarray(data.weight))
        mean = np.asarray(data.mean, np.float64)
        square = np.diagonal(np.asarray(data.scatter, np.float64))
    if not total > 0:
        raise ValueError("check_outliers: no example has weight")
    if not (np.isfinite(mean).all() and np.isfinite(square).all()):
        raise ValueError(
            "check_outliers: activations are not all finite; see check_taps"
        )
    return mean, np.sqrt(np.maximum(square, 0) / total)


def _over(part: float, whole: float) -> float:
    """A ratio; inf over 0, 0 of 0."""
    if whole > 0:
        return part / whole
    return float("inf") if part > 0 else 0.0
