r"""Latents as detectors of planted features.

A latent stands for the feature whose direction is nearest to its own; whether the
feature fires where the latent does is then a question of precision and recall.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import as_array, as_host_floats
from toyfeat.types import Array, ArrayLike


class Classification(NamedTuple):
    """Scores of latents as detectors of features; means over the latents.

    Attributes:
      precision: share of a latent's firings at which its feature fires, 0 if it
        never does.
      recall: share of the feature's firings at which the latent does.
      f1: harmonic mean of the two, latent by latent.
    """

    precision: float
    recall: float
    f1: float


def feature_uniqueness(directions: ArrayLike, truth: ArrayLike) -> float:
    r"""Compute the share of found directions that stand for a feature of their own.

    Args:
      directions: ``[R, D]``, one found direction per row.
      truth: ``[F, D]``.

    Returns:
      How many truths are the nearest to some found direction by :math:`|\cos|`,
      over ``R``; 1 if no two have the same.

    Raises:
      ValueError: if shapes do not fit, either has no rows, or a value is not finite.

    Example:
      >>> import numpy as np
      >>> feature_uniqueness(np.array([[1.0, 0.1], [-2.0, 0.0]]), np.eye(2))
      0.5

    References:
      SAELens 6, ``feature_uniqueness``.
    """
    nearest = _nearest_truths("feature_uniqueness", directions, truth)
    return len(np.unique(nearest)) / len(nearest)


def latent_classification(
    directions: ArrayLike,
    truth: ArrayLike,
    batches: Iterable[tuple[ArrayLike, ArrayLike]],
) -> Classification:
    r"""Score latents as classifiers of where the features that they stand for fire.

    A latent fires where its code is not 0, and stands for the truth that is the
    nearest to its direction by :math:`|\cos|`.

    Args:
      directions: ``[R, D]``, one per latent, the rows of ``W_dec``.
      truth: ``[F, D]``.
      batches: pairs of codes ``[N, R]`` and planted codes ``[N, F]``, such as
        ``[(codes, planted)]``; counts are over all of them.

    Returns:
      :class:`Classification`.

    Raises:
      ValueError: if shapes do not fit, there are no batches, or a direction or code
        is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> planted = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> codes = jnp.array([[2.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
      >>> latent_classification(jnp.eye(2), jnp.eye(2), [(codes, planted)]).precision
      0.8333333333333333

    References:
      SAELens 6, ``compute_classification_metrics``.
    """
    nearest = jnp.asarray(_nearest_truths("latent_classification", directions, truth))
    widths = len(nearest), len(np.asarray(truth))

    # Count firings of latents, of their features, and of both, batch by batch.
    counts = np.zeros((3, len(nearest)))
    num_examples = 0
    for pair in _check_batches(batches):
        codes, planted = _check_codes(*pair, widths)
        num_examples += len(codes)
        counts += np.stack(_count_firings(codes, planted, nearest))
    if not num_examples:
        raise ValueError(
            "latent_classification: got no pair of codes and planted codes; a "
            "generator that was used before is empty"
        )

    # Precision and recall of each latent, then means.
    hits, latent_fires, feature_fires = counts
    precision, recall = _share(hits, latent_fires), _share(hits, feature_fires)
    f1 = _share(2 * precision * recall, precision + recall)
    return Classification(*(float(x.mean()) for x in (precision, recall, f1)))


def _check_batches(batches: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over batches, or raise unless they are pairs."""
    if not isinstance(batches, Iterable):
        raise TypeError(
            "latent_classification: batches must be pairs of codes and planted codes, "
            f"got {type(batches).__name__}; pass a list of them"
        )
    for pair in batches:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                "latent_classification: a batch must be a pair of codes and planted "
                f"codes, got {type(pair).__name__}; pass [(codes, planted), ...]"
            )
        yield pair[0], pair[1]


def _check_codes(
    codes: ArrayLike, planted: ArrayLike, widths: tuple[int, int]
) -> tuple[Array, Array]:
    """Return a batch as arrays of the right widths and equal length."""
    codes = jnp.asarray(as_array("latent_classification", "codes", codes))
    planted = jnp.asarray(as_array("latent_classification", "planted codes", planted))
    fits = codes.ndim == planted.ndim == 2 and len(codes) == len(planted)
    if not fits or (codes.shape[1], planted.shape[1]) != widths:
        raise ValueError(
            f"latent_classification: wanted codes [N, {widths[0]}] and planted codes "
            f"[N, {widths[1]}], got shapes {codes.shape} and {planted.shape}; "
            "one column per direction"
        )
    if not (jnp.isfinite(codes).all() and jnp.isfinite(planted).all()):
        raise ValueError(
            "latent_classification: codes must be finite, got NaN or infinity; the "
            "dictionary diverged, train another"
        )
    return codes, planted


@jax.jit
def _count_firings(
    codes: Array, planted: Array, nearest: Array
) -> tuple[Array, Array, Array]:
    """Count examples with both, with the latent, and with the feature, ``[R]`` each."""
    latent, feature = codes != 0, planted[:, nearest] > 0
    return (latent & feature).sum(0), latent.sum(0), feature.sum(0)


def _share(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return ``part / total``, 0 where the total is 0."""
    return np.where(total > 0, part / np.where(total > 0, total, 1), 0.0)


def _nearest_truths(who: str, directions: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """Return ``[R]``, the index of the truth of the largest ``|cos|``."""
    directions = as_host_floats(who, "directions", directions)
    truth = as_host_floats(who, "truth", truth)
    wide = directions.ndim == truth.ndim == 2 and directions.shape[1] == truth.shape[1]
    if not wide:
        raise ValueError(
            f"{who}: wanted directions [R, D] and truth [F, D], one direction per row, "
            f"got shapes {directions.shape} and {truth.shape}; transpose readers of a "
            "basis"
        )
    if not (len(directions) and len(truth)):
        raise ValueError(
            f"{who}: wanted at least one direction and one truth, got "
            f"{len(directions)} and {len(truth)}; nothing was found"
        )
    if not (np.isfinite(directions).all() and np.isfinite(truth).all()):
        raise ValueError(
            f"{who}: directions must be finite, got NaN or infinity; the dictionary "
            "diverged, train another"
        )
    # Lengths of the directions do not change which truth is the nearest.
    norms = np.linalg.norm(truth, axis=1)
    unit_truth = truth / np.where(norms > 0, norms, 1)[:, None]
    return np.argmax(np.abs(directions @ unit_truth.T), axis=1)
