"""Where in a text a latent is there, and what it says."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.coding import lengths
from toyfeat.models.decoder import Pretrained
from toyfeat.types import Array, Dictionary, Params, Taps

_AROUND = 12  # tokens before and after


class Context(NamedTuple):
    """A token with those around it.

    Attributes:
      tokens: as text.
      values: code of the latent at each of them.
      at: which of them it is about.
      effect: attribution of the latent there, in nats of the window's loss.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: int
    effect: float


class Latent(NamedTuple):
    """A latent of a dictionary, to look at.

    Attributes:
      index: which.
      frequency: share of the tokens at which it is there.
      effect: mean absolute attribution over all tokens.
      activating: contexts of the largest codes, each of another window.
      attributed: contexts of the largest absolute attributions.
      promoted: tokens whose logits its writer raises most, by the last norm's scale and
        the logits' matrix alone.
      suppressed: those it lowers most.
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


class Described(NamedTuple):
    """A dictionary as something that has codes and effects.

    Attributes:
      rule: ``(arrays, Taps) -> (codes [N, M], attributions [N, M])``, to be compiled.
      writers: ``[M, D]``.
      readers: ``[M, D]``.
      arrays: that the rule wants.
    """

    rule: Callable[[Any, Taps], tuple[Array, Array]]
    writers: Array
    readers: Array
    arrays: Any


def of_acts(dictionary: Dictionary, params: Params) -> Described:
    """A dictionary of activations: attributions are ``f_j (w_j . g)``."""
    rows = params["W_dec"]
    if dictionary.config.rescale_acts_by_decoder_norm:
        rows = rows / lengths(rows)[:, None]
    readers = params["W_read"] if "W_read" in params else params["W_enc"].T

    def rule(arrays: Any, taps: Taps) -> tuple[Array, Array]:
        params, rows = arrays
        assert taps.grads is not None
        codes = dictionary.encode(params, taps.acts, grads=taps.grads)
        return codes, codes * (taps.grads[:, 0] @ rows.T)

    return Described(rule, rows, readers, (params, rows))


def of_grads(
    dictionary: Dictionary, params: Params, mean: Array, covariance: Array
) -> Described:
    """A dictionary of gradients: attributions are ``h_j (r_j . (a - mean))``.

    With the share of ``b_dec`` they sum to the reconstructed gradient's product with
    ``a - mean``, what the first order says that the activation adds to the loss.
    Writers are the regression patterns of the readers.
    """
    rows = params["W_dec"]
    if dictionary.config.rescale_acts_by_decoder_norm:
        rows = rows / lengths(rows)[:, None]

    def rule(arrays: Any, taps: Taps) -> tuple[Array, Array]:
        params, rows, mean = arrays
        assert taps.grads is not None
        codes = dictionary.encode(params, taps.grads[:, 0])
        return codes, codes * ((taps.acts - mean[None, :]) @ rows.T)

    return Described(rule, rows @ covariance, rows, (params, rows, mean))


def latents_of(
    described: Described,
    chunks: Callable[[], Iterator[Taps]],
    tokens: np.ndarray,
    model: Pretrained,
    *,
    residual: bool,
    num: int = 24,
    contexts: int = 6,
) -> list[Latent]:
    """The latents with the largest effects, with contexts from a collected text.

    Args:
      described: the dictionary.
      chunks: the taps of the site in order, with the gradients of one readout first;
        called twice.
      tokens: ``[num, T]``, the windows that were collected.
      model: for its vocabulary.
      residual: whether writers are in the residual stream, so that they have tokens.
      num: how many latents.
      contexts: of either kind, per latent.

    Returns:
      Latents, the largest mean absolute attribution first.

    Raises:
      ValueError: if the taps are not of these tokens or have no gradients.
    """
    measured = partial(_measured, described.rule)
    sums = jax.jit(lambda arrays, taps: _sums(measured, arrays, taps))
    some = jax.jit(lambda arrays, taps, at: [x[:, at] for x in measured(arrays, taps)])
    sizes, rows, total = np.zeros((2, len(described.writers))), 0, 0.0
    for taps in chunks():
        if taps.grads is None:
            raise ValueError("latents_of: wanted taps with gradients")
        rows, total = rows + len(taps.weights), total + float(np.sum(taps.weights))
        sizes += np.asarray(sums(described.arrays, taps), np.float64)
    if rows != tokens.size:
        raise ValueError(
            f"latents_of: wanted taps of these {tokens.size} tokens, got {rows} rows"
        )
    counts, sizes = sizes
    chosen = np.argsort(-sizes, kind="stable")[:num]
    chosen = chosen[sizes[chosen] > 0]
    columns = [some(described.arrays, taps, chosen) for taps in chunks()]
    codes, effects = (np.concatenate(x) for x in zip(*columns, strict=True))
    names = [model.tokenizer.decode([i]) for i in range(model.config.vocab)]
    promoted = _promoted(model.params, described.writers[chosen]) if residual else None
    readers = np.asarray(described.readers, np.float64)
    lengths = np.linalg.norm(readers, axis=1, keepdims=True)
    readers = readers / np.where(lengths > 0, lengths, 1)
    found = []
    for slot, index in enumerate(chosen):
        show = partial(_contexts, tokens, names, codes[:, slot], effects[:, slot])
        cosines = readers @ readers[index]
        cosines[index] = -np.inf
        near = np.argsort(-cosines, kind="stable")[:5]
        order = None if promoted is None else np.argsort(-promoted[slot], kind="stable")
        found.append(
            Latent(
                int(index),
                float(counts[index] / total),
                float(sizes[index] / total),
                show(np.abs(codes[:, slot]), contexts),
                show(np.abs(effects[:, slot]), contexts),
                () if order is None else tuple(names[i] for i in order[:8]),
                () if order is None else tuple(names[i] for i in order[::-1][:8]),
                tuple((int(i), float(cosines[i])) for i in near),
            )
        )
    return found


def _measured(
    rule: Callable[[Any, Taps], tuple[Array, Array]], arrays: Any, taps: Taps
) -> tuple[Array, Array]:
    """Codes and attributions ``[N, M]``, 0 at tokens that do not count."""
    there = (taps.weights > 0)[:, None]
    codes, effects = rule(arrays, taps)
    zeros = jnp.zeros_like(codes)
    return jnp.where(there, codes, zeros), jnp.where(there, effects, zeros)


def _sums(measured: Callable[..., Any], arrays: Any, taps: Taps) -> Array:
    """How often latents are there, and their summed absolute attributions."""
    codes, effects = measured(arrays, taps)
    there = jnp.sum(codes != 0, axis=0).astype(effects.dtype)
    return jnp.stack([there, jnp.sum(jnp.abs(effects), axis=0)])


def _promoted(params: Params, writers: Array) -> np.ndarray:
    """Change of the logits per unit of a writer, ``[L, V]``."""
    tree = params["params"]
    scale = tree["final_norm"]["scale"]
    if "bias" in tree["final_norm"]:  # of a norm that centres
        writers = writers - jnp.mean(writers, axis=1, keepdims=True)
    logits = tree["embed"]["embedding"].T if "head" not in tree else tree["head"]
    return np.asarray((writers * scale[None, :]) @ logits)


def _contexts(
    tokens: np.ndarray,
    names: Sequence[str],
    codes: np.ndarray,
    effects: np.ndarray,
    order_by: np.ndarray,
    num: int,
) -> tuple[Context, ...]:
    """The largest, at most one of a window."""
    length = tokens.shape[1]
    found, seen = [], set()
    for row in np.argsort(-order_by, kind="stable"):
        window, position = divmod(int(row), length)
        if order_by[row] <= 0 or len(found) == num:
            break
        if window in seen:
            continue
        seen.add(window)
        low, high = max(0, position - _AROUND), min(length, position + _AROUND + 1)
        here = slice(window * length + low, window * length + high)
        found.append(
            Context(
                tuple(names[int(i)] for i in tokens[window, low:high]),
                tuple(codes[here].tolist()),
                position - low,
                float(effects[row]),
            )
        )
    return tuple(found)
