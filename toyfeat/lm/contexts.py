"""Contexts of latents: where in a text they are active, and what they promote."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.base import lengths
from toyfeat.dictionary.types import Dictionary
from toyfeat.models.decoder import Pretrained
from toyfeat.types import Array, Params, Taps

# What a page shows of a latent; nothing is computed from these.
_CONTEXT = 12  # tokens before and after
_PROMOTED = 8  # promoted tokens, and as many suppressed ones
_NEIGHBOURS = 5


class Context(NamedTuple):
    """Token at which a latent is active, with the tokens around it.

    Attributes:
      tokens: as text.
      values: code of the latent at each of them.
      at: index of the token among them.
      effect: attribution of the latent at the token, in nats of the window's loss.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: int
    effect: float


class Latent(NamedTuple):
    """Latent of a dictionary, its statistics and the contexts that show it.

    Attributes:
      index: of the latent in the dictionary.
      frequency: share of the tokens at which it is active.
      effect: mean absolute attribution over all tokens.
      activating: contexts of the largest codes, each of another window.
      attributed: contexts of the largest absolute attributions.
      promoted: tokens whose logits its writer raises most, by the last norm's scale and
        the logits' matrix alone.
      suppressed: tokens whose logits it lowers most.
      neighbours: latents with the most similar readers, and the cosines.
    """

    index: int
    frequency: float
    effect: float
    activating: tuple[Context, ...]
    attributed: tuple[Context, ...]
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


class _Measurements(NamedTuple):
    """Totals over a text, and codes and attributions of the chosen latents.

    Attributes:
      active: ``[M]``, number of tokens at which a latent is active.
      effects: ``[M]``, summed absolute attributions.
      tokens: number of tokens that count.
      chosen: ``[L]``, latents with the largest effects.
      codes: ``[N, L]``, of the chosen latents at every token.
      attributions: ``[N, L]``.
    """

    active: np.ndarray
    effects: np.ndarray
    tokens: float
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


def _check_grads(taps: Taps) -> Array:
    """Return the gradients of taps that have some."""
    if taps.grads is None:
        raise ValueError("find_contexts: wanted taps with gradients")
    return taps.grads


def find_contexts(
    view: LatentView,
    chunks: Callable[[], Iterator[Taps]],
    tokens: np.ndarray,
    model: Pretrained,
    *,
    residual: bool,
    num: int = 24,
    contexts: int = 6,
) -> list[Latent]:
    """Find the latents with the largest effects, and their contexts in a text.

    Args:
      view: of the dictionary.
      chunks: gives the taps of the site in order, with the gradients of one readout
        first; called twice.
      tokens: ``[num, T]``, the windows that the taps are of.
      model: for its vocabulary.
      residual: whether writers are in the residual stream, so that they promote
        tokens.
      num: number of latents.
      contexts: number of contexts of either kind, per latent.

    Returns:
      Latents, the largest mean absolute attribution first.

    Raises:
      ValueError: if the taps are not of these tokens or have no gradients.
    """
    # Choose latents by their effects; keep their codes and attributions everywhere.
    measured = _measure(view, chunks, tokens.size, num)
    names = [model.tokenizer.decode([i]) for i in range(model.config.vocab)]
    chosen = measured.chosen
    offset = model.config.norm_offset
    writers = view.writers[chosen]
    promoted = _promoted(model.params, writers, offset) if residual else None
    neighbours = _neighbours(np.asarray(view.readers, np.float64), chosen)
    # Describe each by its largest contexts and the tokens that its writer promotes.
    latents = []
    for slot, index in enumerate(chosen):
        codes = measured.codes[:, slot]
        attributions = measured.attributions[:, slot]
        show = partial(_largest_contexts, tokens, names, codes, attributions)
        order = []
        if promoted is not None:
            order = np.argsort(-promoted[slot], kind="stable").tolist()
        latents.append(
            Latent(
                index=int(index),
                frequency=float(measured.active[index] / measured.tokens),
                effect=float(measured.effects[index] / measured.tokens),
                activating=show(np.abs(codes), contexts),
                attributed=show(np.abs(attributions), contexts),
                promoted=tuple(names[i] for i in order[:_PROMOTED]),
                suppressed=tuple(names[i] for i in order[::-1][:_PROMOTED]),
                neighbours=neighbours[slot],
            )
        )
    return latents


def _measure(
    view: LatentView, chunks: Callable[[], Iterator[Taps]], tokens: int, num: int
) -> _Measurements:
    """Sum effects over a text, choose latents, and keep what these do at each token."""
    measure = partial(_codes_and_attributions, view.rule)
    sums = jax.jit(lambda arrays, taps: _sums(*measure(arrays, taps)))
    columns = jax.jit(
        lambda arrays, taps, latents: [x[:, latents] for x in measure(arrays, taps)]
    )
    # First pass: how often latents are active, and their effects.
    totals, rows, weight = np.zeros((2, len(view.writers))), 0, 0.0
    for taps in chunks():
        _check_grads(taps)
        rows, weight = rows + len(taps.weights), weight + float(np.sum(taps.weights))
        totals += np.asarray(sums(view.arrays, taps), np.float64)
    if rows != tokens:
        raise ValueError(
            f"find_contexts: wanted taps of these {tokens} tokens, got {rows} rows"
        )
    # The largest effects, without latents that have none.
    active, effects = totals
    chosen = np.argsort(-effects, kind="stable")[:num]
    chosen = chosen[effects[chosen] > 0]
    # Second pass: codes and attributions of the chosen ones alone.
    parts = [columns(view.arrays, taps, chosen) for taps in chunks()]
    codes, attributions = (np.concatenate(x) for x in zip(*parts, strict=True))
    return _Measurements(
        active=active,
        effects=effects,
        tokens=weight,
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


def _promoted(params: Params, writers: Array, offset: float = 0.0) -> np.ndarray:
    """Change of the logits per unit of a writer, ``[L, V]``."""
    # The final norm without its division by the length, which is the same for all.
    tree = params["params"]
    scale = tree["final_norm"]["scale"] + offset
    if "bias" in tree["final_norm"]:  # LayerNorm subtracts the mean first
        writers = writers - jnp.mean(writers, axis=1, keepdims=True)
    logits = tree["embed"]["embedding"].T if "head" not in tree else tree["head"]
    return np.asarray((writers * scale[None, :]) @ logits)


def _neighbours(
    readers: np.ndarray, latents: np.ndarray
) -> list[tuple[tuple[int, float], ...]]:
    """Latents with the most similar readers, and the cosines, of each latent."""
    norms = np.linalg.norm(readers, axis=1, keepdims=True)
    readers = readers / np.where(norms > 0, norms, 1)
    neighbours = []
    for index in latents:
        cosines = readers @ readers[index]
        cosines[index] = -np.inf
        nearest = np.argsort(-cosines, kind="stable")[:_NEIGHBOURS]
        neighbours.append(tuple((int(i), float(cosines[i])) for i in nearest))
    return neighbours


def _largest_contexts(
    tokens: np.ndarray,
    names: Sequence[str],
    codes: np.ndarray,
    attributions: np.ndarray,
    order_by: np.ndarray,
    num: int,
) -> tuple[Context, ...]:
    """Contexts of the largest ``order_by``, at most one of a window."""
    length = tokens.shape[1]
    contexts, used_windows = [], set()
    for row in np.argsort(-order_by, kind="stable"):
        if order_by[row] <= 0 or len(contexts) == num:
            break
        window, position = divmod(int(row), length)
        if window in used_windows:
            continue
        used_windows.add(window)
        # The context ends where the window does.
        low, high = max(0, position - _CONTEXT), min(length, position + _CONTEXT + 1)
        rows = slice(window * length + low, window * length + high)
        contexts.append(
            Context(
                tokens=tuple(names[int(i)] for i in tokens[window, low:high]),
                values=tuple(codes[rows].tolist()),
                at=position - low,
                effect=float(attributions[row]),
            )
        )
    return tuple(contexts)
