r"""Latents as detectors of planted features.

A latent stands for the feature whose direction is nearest to its own; whether the
feature fires where the latent does is then a question of precision and recall.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.types import Array, ArrayLike, Detection


def uniqueness(found: ArrayLike, truth: ArrayLike) -> float:
    r"""Share of found directions that stand for a feature of their own.

    Args:
      found: ``[R, D]``, one direction per row.
      truth: ``[F, D]``.

    Returns:
      How many truths are the nearest to some found direction by :math:`|\cos|`,
      over ``R``; 1 if no two have the same.

    Raises:
      ValueError: if shapes do not fit, either has no rows, or a value is not finite.

    Example:
      >>> import numpy as np
      >>> uniqueness(np.array([[1.0, 0.1], [-2.0, 0.0]]), np.eye(2))
      0.5

    References:
      SAELens 6, ``feature_uniqueness``.
    """
    best = _nearest("uniqueness", found, truth)
    return len(np.unique(best)) / len(best)


def detection(
    found: ArrayLike,
    truth: ArrayLike,
    batches: Iterable[tuple[ArrayLike, ArrayLike]],
) -> Detection:
    r"""How well latents tell where the features that they stand for fire.

    A latent fires where its code is not 0, and stands for the truth that is the
    nearest to its direction by :math:`|\cos|`.

    Args:
      found: ``[R, D]``, the rows of ``W_dec``.
      truth: ``[F, D]``.
      batches: pairs of codes ``[N, R]`` and planted codes ``[N, F]``, such as
        ``[(codes, planted)]``; counts are over all of them.

    Returns:
      :class:`Detection`.

    Raises:
      ValueError: if shapes do not fit, there are no batches, or a direction or code
        is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> planted = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> codes = jnp.array([[2.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
      >>> detection(jnp.eye(2), jnp.eye(2), [(codes, planted)]).precision
      0.8333333333333333

    References:
      SAELens 6, ``compute_classification_metrics``.
    """
    best = jnp.asarray(_nearest("detection", found, truth))
    shapes = len(best), len(np.asarray(truth))
    hits, fired, planted_fired = (np.zeros(len(best)) for _ in range(3))
    seen = 0
    for codes, planted in batches:
        codes, planted = jnp.asarray(codes), jnp.asarray(planted)
        fits = codes.ndim == planted.ndim == 2 and len(codes) == len(planted)
        if not fits or (codes.shape[1], planted.shape[1]) != shapes:
            raise ValueError(
                f"detection: wanted codes [N, {shapes[0]}] and planted codes "
                f"[N, {shapes[1]}], got shapes {codes.shape} and {planted.shape}"
            )
        if not (jnp.isfinite(codes).all() and jnp.isfinite(planted).all()):
            raise ValueError("detection: codes must be finite; the dictionary diverged")
        seen += len(codes)
        counts = _counts(codes, planted, best)
        hits, fired, planted_fired = (
            total + np.asarray(count)
            for total, count in zip((hits, fired, planted_fired), counts, strict=True)
        )
    if not seen:
        raise ValueError(
            "detection: got no pair of codes and planted codes; a generator that was "
            "used before is empty"
        )
    precision, recall = _share(hits, fired), _share(hits, planted_fired)
    both = _share(2 * precision * recall, precision + recall)
    return Detection(*(float(x.mean()) for x in (precision, recall, both)))


@jax.jit
def _counts(codes: Array, planted: Array, best: Array) -> tuple[Array, Array, Array]:
    fires, there = codes != 0, planted[:, best] > 0
    return (fires & there).sum(0), fires.sum(0), there.sum(0)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, 0 where the whole is."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0)


def _nearest(who: str, found: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """``[R]``, the index of the truth of the largest ``|cos|``."""
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if found.ndim != 2 or truth.ndim != 2 or found.shape[1] != truth.shape[1]:
        raise ValueError(
            f"{who}: wanted found [R, D] and truth [F, D], one direction per row, got "
            f"shapes {found.shape} and {truth.shape}"
        )
    if not (len(found) and len(truth)):
        raise ValueError(
            f"{who}: wanted at least one found and one true direction, got "
            f"{len(found)} and {len(truth)}"
        )
    if not (np.isfinite(found).all() and np.isfinite(truth).all()):
        raise ValueError(f"{who}: directions must be finite; the dictionary diverged")
    norms = np.linalg.norm(truth, axis=1)
    unit = truth / np.where(norms > 0, norms, 1)[:, None]
    return np.argmax(np.abs(found @ unit.T), axis=1)
