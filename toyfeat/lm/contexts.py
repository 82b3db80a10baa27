"""Contexts of latents: where in a text they are active, and what they promote."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.latents import (
    Latent,
    LatentView,
    measure_latents,
    nearest_readers,
)
from toyfeat.models.decoder import Pretrained
from toyfeat.types import Array, Params, Taps

# What a page shows of a latent; nothing is computed from these.
_CONTEXT = 12  # tokens before and after
_PROMOTED = 8  # promoted tokens, and as many suppressed ones


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
    measured = measure_latents(view, chunks, tokens.size, num, who="find_contexts")
    names = [model.tokenizer.decode([i]) for i in range(model.config.vocab)]
    chosen = measured.chosen
    offset = model.config.norm_offset
    writers = view.writers[chosen]
    promoted = _promoted(model.params, writers, offset) if residual else None
    neighbours = nearest_readers(np.asarray(view.readers, np.float64), chosen)
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
                frequency=float(measured.active[index] / measured.examples),
                effect=float(measured.effects[index] / measured.examples),
                activating=show(np.abs(codes), contexts),
                attributed=show(np.abs(attributions), contexts),
                promoted=tuple(names[i] for i in order[:_PROMOTED]),
                suppressed=tuple(names[i] for i in order[::-1][:_PROMOTED]),
                neighbours=neighbours[slot],
            )
        )
    return latents


def _promoted(params: Params, writers: Array, offset: float = 0.0) -> np.ndarray:
    """Change of the logits per unit of a writer, ``[L, V]``."""
    # The final norm without its division by the length, which is the same for all.
    tree = params["params"]
    scale = tree["final_norm"]["scale"] + offset
    if "bias" in tree["final_norm"]:  # LayerNorm subtracts the mean first
        writers = writers - jnp.mean(writers, axis=1, keepdims=True)
    logits = tree["embed"]["embedding"].T if "head" not in tree else tree["head"]
    return np.asarray((writers * scale[None, :]) @ logits)


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
