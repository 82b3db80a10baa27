"""Kinds of dictionaries that a job trains: one row of a table for each."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from toyfeat.dictionary import losses, paired, topk
from toyfeat.dictionary.types import Dictionary, Objective


class Kind(NamedTuple):
    """Making and training of the dictionaries of a kind.

    Attributes:
      make: ``(dim, latents, k) -> Dictionary``.
      objective: ``(dictionary, **loss) -> Objective``; the fields of an attribution
        loss, where the kind has one.
      of_gradients: whether gradients take the place of the activations.
      needs_gradients: whether there have to be some.
      revive: whether dead latents start anew: half of a paired dictionary dies early,
        and its auxiliary loss, which only looks at activations, does not bring it back.
    """

    make: Callable[[int, int, int], Dictionary]
    objective: Callable[..., Objective]
    of_gradients: bool = False
    needs_gradients: bool = True
    revive: bool = False


KINDS: dict[str, Kind] = {
    # TopK of activations.
    "acts": Kind(topk, losses.default, needs_gradients=False),
    # The same, trained with the four-term attribution loss.
    "attribution": Kind(topk, partial(losses.attribution, dead_latents=1.0)),
    # Signed TopK of gradients.
    "gradients": Kind(partial(topk, signed=True), losses.default, of_gradients=True),
    # Latents with a writer and a reader.
    "paired": Kind(paired, losses.default, revive=True),
}
"""Name to kind, in the order in which a job trains them."""
