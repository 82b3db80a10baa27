"""Scores of a dictionary on a synthetic world, as SynthSAEBench takes them."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.types import Dictionary
from toyfeat.metrics.detection import feature_uniqueness, latent_classification
from toyfeat.metrics.matching import match_features
from toyfeat.types import Array, ArrayLike, Params


def score_dictionary(
    dictionary: Dictionary,
    params: Params,
    truth: ArrayLike,
    batches: Iterable[tuple[ArrayLike, ArrayLike]],
    *,
    train: bool = False,
) -> dict[str, float]:
    """Score a dictionary on a world of known features.

    Args:
      dictionary: any.
      params: its parameters, for activations that are not normalized.
      truth: ``[F, D]``, the features.
      batches: pairs of activations ``[N, D]`` and planted codes ``[N, F]``.
      train: choose the codes of a batch top-k over each batch, not by threshold.

    Returns:
      ``mcc``, ``uniqueness``, ``f1``, ``precision``, ``recall``, ``ev`` (share of
      the variance that is explained), ``l0`` and ``dead`` (latents that never fire).

    Raises:
      ValueError: if there are no batches.

    References:
      SynthSAEBench (2026), arXiv 2602.14687.
    """
    sums = _Sums()

    # Sums are taken on the way: the batches are seen once.
    def encoded() -> Iterator[tuple[Array, ArrayLike]]:
        nonlocal sums
        for acts, planted in batches:
            acts = jnp.asarray(acts)
            codes, error = _encode(dictionary, train, params, acts)
            sums = _add(sums, acts, codes, error)
            yield codes, planted

    classified = latent_classification(params["W_dec"], truth, encoded())
    # Total variance of the activations, E |x|^2 - |E x|^2.
    variance = sums.square / sums.count - float(np.sum((sums.acts / sums.count) ** 2))
    return {
        "mcc": match_features(params["W_dec"], truth).mcc,
        "uniqueness": feature_uniqueness(params["W_dec"], truth),
        **classified._asdict(),
        "ev": 1 - sums.error / sums.count / variance,
        "l0": sums.codes / sums.count,
        "dead": int(np.sum(~np.asarray(sums.fired))),
    }


class _Sums(NamedTuple):
    """Running sums over examples, in float64.

    Attributes:
      count: of examples.
      acts: ``[D]``, of the activations.
      square: of their squares.
      error: of the squared errors.
      codes: of codes that are not 0.
      fired: ``[H]``, whether a latent ever fired.
    """

    count: int = 0
    acts: Any = 0.0
    square: float = 0.0
    error: float = 0.0
    codes: float = 0.0
    fired: Any = False


def _add(sums: _Sums, acts: Array, codes: Array, error: Array) -> _Sums:
    """Add a batch of activations, codes and reconstruction errors."""
    # Differences of large sums of squares need more digits than float32 has.
    acts64, error64 = np.asarray(acts, np.float64), np.asarray(error, np.float64)
    active = np.asarray(codes != 0)
    return _Sums(
        count=sums.count + len(acts64),
        acts=sums.acts + acts64.sum(0),
        square=sums.square + float(np.sum(acts64**2)),
        error=sums.error + float(np.sum(error64**2)),
        codes=sums.codes + float(active.sum()),
        fired=sums.fired | active.any(0),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _encode(
    dictionary: Dictionary, train: bool, params: Params, acts: Array
) -> tuple[Array, Array]:
    """Encode activations; returns codes and the error of the reconstruction."""
    codes = dictionary.encode(params, acts, train=train)
    return codes, acts - dictionary.decode(params, codes)
