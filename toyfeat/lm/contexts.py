"""Contexts of latents: where in a text they are active, and what they promote."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.latents import (
    Latent,
    LatentView,
    measure_latents,
)
from toyfeat.metrics.latents import Example, summarize_latents
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
    latents = summarize_latents(view, measured, tokens.shape[1:], contexts)
    offset = model.config.norm_offset
    writers = view.writers[measured.chosen]
    promoted = _promoted(model.params, writers, offset) if residual else None
    # Show each by its largest contexts and the tokens that its writer promotes.
    for slot, latent in enumerate(latents):
        order = []
        if promoted is not None:
            order = np.argsort(-promoted[slot], kind="stable").tolist()
        latents[slot] = latent._replace(
            activating=_contexts(latent.activating, tokens, names),
            attributed=_contexts(latent.attributed, tokens, names),
            promoted=tuple(names[i] for i in order[:_PROMOTED]),
            suppressed=tuple(names[i] for i in order[::-1][:_PROMOTED]),
        )
    return latents


def cut_context(
    example: Example, tokens: np.ndarray, name: Callable[[int], str]
) -> Context:
    """Cut the context of an example out of its text.

    Args:
      example: with a position for every token.
      tokens: ``[num, T]``, of all inputs.
      name: of a token.
    """
    # The context ends where the text does.
    low = max(0, example.at - _CONTEXT)
    high = min(tokens.shape[1], example.at + _CONTEXT + 1)
    return Context(
        tokens=tuple(name(int(i)) for i in tokens[example.index, low:high]),
        values=example.values[low:high],
        at=example.at - low,
        effect=example.effect,
    )


def _contexts(
    examples: Sequence[Example], tokens: np.ndarray, names: Sequence[str]
) -> tuple[Context, ...]:
    """Cut the contexts of examples out of their windows."""
    return tuple(cut_context(x, tokens, names.__getitem__) for x in examples)


def _promoted(params: Params, writers: Array, offset: float = 0.0) -> np.ndarray:
    """Change of the logits per unit of a writer, ``[L, V]``."""
    # The final norm without its division by the length, which is the same for all.
    tree = params["params"]
    scale = tree["final_norm"]["scale"] + offset
    if "bias" in tree["final_norm"]:  # LayerNorm subtracts the mean first
        writers = writers - jnp.mean(writers, axis=1, keepdims=True)
    logits = tree["embed"]["embedding"].T if "head" not in tree else tree["head"]
    return np.asarray((writers * scale[None, :]) @ logits)
