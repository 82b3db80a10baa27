"""Latents of a dictionary: how often and how strongly they act, and what is near."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.base import lengths
from toyfeat.dictionary.types import Dictionary
from toyfeat.types import Array, Params, Taps

_NEIGHBOURS = 5  # that a page shows of a latent


class Latent(NamedTuple):
    """Latent of a dictionary, its statistics and the examples that show it.

    Attributes:
      index: of the latent in the dictionary.
      frequency: share of the examples in which it is active.
      effect: mean absolute attribution over all examples.
      activating: examples of the largest codes, each of another input.
      attributed: examples of the largest absolute attributions.
      promoted: names of the outputs that its writer raises most.
      suppressed: names of those that it lowers most.
      neighbours: latents with the most similar readers, and the cosines.
    """

    index: int
    frequency: float
    effect: float
    activating: tuple[Any, ...]
    attributed: tuple[Any, ...]
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    neighbours: tuple[tuple[int, float], ...]


class LatentView(NamedTuple):
    """Codes, attributions and directions of a dictionary's latents.

    Attributes:
      rule: ``(arrays, Taps) -> (codes [N, M], attributions [N, M])``, to be compiled.
      writers: ``[M, D]``.
      readers: ``[M, D]``.
      arrays: that the rule takes.
    """

    rule: Callable[[Any, Taps], tuple[Array, Array]]
    writers: Array
    readers: Array
    arrays: Any


class Measurements(NamedTuple):
    """Totals over taps, and codes and attributions of the chosen latents.

    Attributes:
      active: ``[M]``, number of examples in which a latent is active.
      effects: ``[M]``, summed absolute attributions.
      examples: number of examples that count.
      chosen: ``[L]``, latents with the largest effects.
      codes: ``[N, L]``, of the chosen latents in every example.
      attributions: ``[N, L]``.
    """

    active: np.ndarray
    effects: np.ndarray
    examples: float
    chosen: np.ndarray
    codes: np.ndarray
    attributions: np.ndarray


def from_acts(dictionary: Dictionary, params: Params) -> LatentView:
    """View a dictionary of activations: attributions are ``f_j (w_j . g)``."""
    rows = _directions(dictionary, params)
    readers = params["W_read"] if "W_read" in params else params["W_enc"].T

    # A latent adds f_j w_j to the activation: first-order effect f_j (w_j . g).
    def rule(arrays: Any, taps: Taps) -> tuple[Array, Array]:
        params, rows = arrays
        grads = _check_grads(taps)
        codes = dictionary.encode(params, taps.acts, grads=grads)
        return codes, codes * (grads[:, 0] @ rows.T)

    return LatentView(rule, rows, readers, (params, rows))


def from_grads(
    dictionary: Dictionary, params: Params, mean: Array, covariance: Array
) -> LatentView:
    """View a dictionary of gradients: attributions are ``h_j (r_j . (a - mean))``.

    With the share of ``b_dec`` they sum to the product of the reconstructed gradient
    and ``a - mean``, the first-order effect of the activation on the loss.  Writers
    are the regression patterns of the readers.
    """
    rows = _directions(dictionary, params)

    # A latent adds h_j r_j to the gradient, which the activation is multiplied with.
    def rule(arrays: Any, taps: Taps) -> tuple[Array, Array]:
        params, rows, mean = arrays
        codes = dictionary.encode(params, _check_grads(taps)[:, 0])
        return codes, codes * ((taps.acts - mean[None, :]) @ rows.T)

    return LatentView(rule, rows @ covariance, rows, (params, rows, mean))


def _directions(dictionary: Dictionary, params: Params) -> Array:
    """Directions ``[M, D]`` that a code of 1 adds."""
    rows = params["W_dec"]
    if dictionary.config.rescale_acts_by_decoder_norm:
        rows = rows / lengths(rows)[:, None]
    return rows


def _check_grads(taps: Taps, who: str = "the rule of a view") -> Array:
    """Return the gradients of taps that have some."""
    if taps.grads is None:
        raise ValueError(
            f"{who}: wanted taps with gradients, got none; tap with a readout"
        )
    return taps.grads


def measure_latents(
    view: LatentView,
    chunks: Callable[[], Iterator[Taps]],
    rows: int,
    num: int,
    *,
    who: str = "measure_latents",
) -> Measurements:
    """Sum effects over taps, choose latents, and keep what these do in each example.

    Args:
      view: of the dictionary.
      chunks: gives the taps of the site in order; called twice.
      rows: number of rows that all chunks have together.
      num: number of latents to choose.
      who: name of the function whose errors these are.

    Returns:
      Totals of all latents; codes and attributions of those of the largest effects.

    Raises:
      ValueError: if there are other numbers of rows, or no gradients.
    """
    measure = partial(_codes_and_attributions, view.rule)
    sums = jax.jit(lambda arrays, taps: _sums(*measure(arrays, taps)))
    columns = jax.jit(
        lambda arrays, taps, latents: [x[:, latents] for x in measure(arrays, taps)]
    )
    # First pass: how often latents are active, and their effects.
    totals, found, weight = np.zeros((2, len(view.writers))), 0, 0.0
    for taps in chunks():
        _check_grads(taps, who)
        found, weight = found + len(taps.weights), weight + float(np.sum(taps.weights))
        totals += np.asarray(sums(view.arrays, taps), np.float64)
    if found != rows:
        raise ValueError(
            f"{who}: wanted taps of these {rows} examples or tokens, got {found} rows; "
            "tap the same ones"
        )
    # The largest effects, without latents that have none.
    active, effects = totals
    chosen = np.argsort(-effects, kind="stable")[:num]
    chosen = chosen[effects[chosen] > 0]
    # Second pass: codes and attributions of the chosen ones alone.
    parts = [columns(view.arrays, taps, chosen) for taps in chunks()]
    codes, attributions = (np.concatenate(x) for x in zip(*parts, strict=True))
    return Measurements(
        active=active,
        effects=effects,
        examples=weight,
        chosen=chosen,
        codes=codes,
        attributions=attributions,
    )


def _codes_and_attributions(
    rule: Callable[[Any, Taps], tuple[Array, Array]], arrays: Any, taps: Taps
) -> tuple[Array, Array]:
    """Codes and attributions ``[N, M]``, 0 at tokens that do not count."""
    counts = (taps.weights > 0)[:, None]
    codes, attributions = rule(arrays, taps)
    zeros = jnp.zeros_like(codes)
    return jnp.where(counts, codes, zeros), jnp.where(counts, attributions, zeros)


def _sums(codes: Array, attributions: Array) -> Array:
    """Numbers of tokens with an active latent, and summed absolute attributions."""
    active = jnp.sum(codes != 0, axis=0).astype(attributions.dtype)
    return jnp.stack([active, jnp.sum(jnp.abs(attributions), axis=0)])


def nearest_readers(
    readers: np.ndarray, latents: np.ndarray
) -> list[tuple[tuple[int, float], ...]]:
    """Latents with the most similar readers, and the cosines, of each latent."""
    norms = np.linalg.norm(readers, axis=1, keepdims=True)
    readers = readers / np.where(norms > 0, norms, 1)
    neighbours = []
    for index in latents:
        cosines = readers @ readers[index]
        order = np.argsort(-cosines, kind="stable")
        nearest = order[order != index][:_NEIGHBOURS]
        neighbours.append(tuple((int(i), float(cosines[i])) for i in nearest))
    return neighbours
