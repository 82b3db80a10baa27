"""Whether attributions say what leaving a latent out does."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.language.halves import Halves
from toyfeat.language.judging import Held, compiled, of_next, precise
from toyfeat.language.methods import Method, Replaced
from toyfeat.splicing import Faithfulness, attribution_faithfulness
from toyfeat.types import Array, Params, Taps


@precise
def faithfulness(
    cut: Halves,
    params: Params,
    held: Held,
    method: Method,
    *,
    uniform: int,
    largest: int,
    batch: int = 16,
    seed: int = 0,
) -> tuple[Faithfulness, np.ndarray, int]:
    """How well attributions predict what leaving one latent out of one token does.

    Pairs of a token and a latent that is there are drawn evenly, and those of the
    largest :math:`|A|` that were not drawn are added.  The latent's part is taken out
    of the activation of its token alone, the rest of it stays as it is, what no latent
    explains included; the true effect is what that does to the cross-entropy of the
    window.

    Args:
      cut: the decoder at a site.
      params: its parameters.
      held: from :func:`held_out`.
      method: that describes the site.
      uniform: pairs that are drawn.
      largest: pairs of the largest attributions.
      batch: pairs at a time.
      seed: of the draw.

    Returns:
      :class:`Faithfulness` of all pairs, ``[pairs, 2]`` predicted and true effects,
      and how many of them, the first ones, were drawn.

    Raises:
      ValueError: if no latent is there at any token that counts.
    """
    tokens = np.argwhere(held.weights > 0)  # window and position
    replace = compiled(method)
    sizes = _attributions(replace, held, tokens)
    there = np.argwhere(sizes != 0)
    if not len(there):
        raise ValueError("faithfulness: no latent has an effect at any token")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(there))
    drawn, rest = there[order[:uniform]], there[np.sort(order[uniform:])]
    order = np.argsort(-np.abs(sizes[tuple(rest.T)]), kind="stable")[:largest]
    pairs = np.concatenate([drawn, rest[order]])
    run = partial(jax.jit(_per_token, static_argnums=0), cut.after)
    whole = np.resize(
        np.arange(len(held.tokens)), -(-len(held.tokens) // batch) * batch
    )
    before = np.concatenate(
        [
            np.asarray(run(params, held.entry[w], held.acts[w], held.tokens[w]))
            for w in np.split(whole, len(whole) // batch)
        ]
    )
    true = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        place, slot = np.resize(part, (batch, 2)).T
        window, position = tokens[place].T
        removed = np.asarray(replace(_rows(held, window, position)).parts)
        value = held.acts[window]
        value[np.arange(batch), position] -= removed[np.arange(batch), slot]
        after = np.asarray(run(params, held.entry[window], value, held.tokens[window]))
        later = np.arange(before.shape[1])[None, :] >= position[:, None]
        change = np.where(later, after.astype(np.float64) - before[window], 0)
        true.append(change.sum(axis=1)[: len(part)])
    effects = np.stack([-sizes[tuple(pairs.T)], np.concatenate(true)], axis=1)
    return attribution_faithfulness(*effects.T), effects, len(drawn)


def _per_token(
    after: Callable[..., Array],
    params: Params,
    entry: Array,
    value: Array,
    tokens: Array,
) -> Array:
    """Cross-entropy at every position but the last, ``[B, T - 1]``."""
    logits = after(params, entry, value)
    return of_next(logits, jax.nn.logsumexp(logits, axis=2), tokens)[:, :-1]


def _attributions(
    replace: Callable[[Taps], Replaced], held: Held, tokens: np.ndarray
) -> np.ndarray:
    """``[tokens, k]``, in chunks of one size."""
    size = min(1024, len(tokens))
    found = []
    for start in range(0, len(tokens), size):
        rows = _rows(held, *np.resize(tokens[start : start + size], (size, 2)).T)
        assert rows.grads is not None
        parts = replace(rows).parts
        found.append(np.asarray(jnp.einsum("nkd,nd->nk", parts, rows.grads[:, 0])))
    return np.concatenate(found)[: len(tokens)]


def _rows(held: Held, window: np.ndarray, position: np.ndarray) -> Taps:
    """Single tokens."""
    acts, grads = held.acts[window, position], held.grads[window, position]
    return Taps(jnp.asarray(acts), jnp.asarray(grads), jnp.ones(len(acts)))
