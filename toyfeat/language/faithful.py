"""Whether attributions say what leaving a latent out does."""

from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.language.halves import Halves
from toyfeat.language.judging import Held, compiled, of_next, precise
from toyfeat.language.methods import Method, Replaced
from toyfeat.splicing import Faithfulness, attribution_faithfulness
from toyfeat.types import Array, Params, Taps

_STRETCH, _STRETCHES = 16, 4  # positions at least, and so many in a window at most
_MEMORY = 2**30  # bytes of keys and values


class _Place(NamedTuple):
    """Windows, and what the model does at their positions.

    Attributes:
      entry: ``[W, T, D]``, the residual stream that the second half starts from.
      acts: ``[W, T, width]``, at the site.
      tokens: ``[W, T]``.
      losses: ``[W, T - 1]``, cross-entropy of the next token.
      past: keys and values ``[W, T, .]`` by site; none if they are not used.
    """

    entry: Array
    acts: Array
    tokens: Array
    losses: Array
    past: dict[str, Array]


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
    stretch: int | None = None,
) -> tuple[Faithfulness, np.ndarray, int]:
    """How well attributions predict what leaving one latent out of one token does.

    Pairs of a token and a latent that is there are drawn evenly, and those of the
    largest :math:`|A|` that were not drawn are added.  The latent's part is taken out
    of the activation of its token alone, the rest of it stays as it is, what no latent
    explains included; the true effect is what that does to the cross-entropy of the
    window.

    Nothing changes at the positions before the token, so that the model is run on the
    stretches of the window from that of the token on, behind the keys and values of
    those before.

    Args:
      cut: the decoder at a site.
      params: its parameters.
      held: from :func:`held_out`.
      method: that describes the site.
      uniform: pairs that are drawn.
      largest: pairs of the largest attributions.
      batch: pairs at a time that run on whole windows; more where they do not.
      seed: of the draw.
      stretch: positions of a stretch; by default a quarter of the window and at least
        16, since each is compiled for itself.  Where there are fewer than two pairs in
        a window, all of it is run.

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
    (window, position), slot = tokens[pairs[:, 0]].T, pairs[:, 1]
    length, used = held.tokens.shape[1], np.unique(window)
    step = stretch or max(_STRETCH, -(-length // _STRETCHES))
    if len(pairs) < 2 * len(used):
        step = length
    true = np.zeros(len(pairs))
    for place, windows in _places(cut, params, held, used, batch, step < length):
        for first in range(0, length, step):
            here = np.isin(window, windows) & (position // step == first // step)
            size = batch * length // (length - first)
            for part in _parts(np.flatnonzero(here), size):
                rows = _rows(held, window[part], position[part])
                removed = replace(rows).parts[jnp.arange(size), slot[part]]
                where = np.searchsorted(windows, window[part]), position[part]
                true[part] = _changes(cut.after, first, params, place, *where, removed)
    effects = np.stack([-sizes[tuple(pairs.T)], true], axis=1)
    return attribution_faithfulness(*effects.T), effects, len(drawn)


def _places(
    cut: Halves,
    params: Params,
    held: Held,
    windows: np.ndarray,
    batch: int,
    keep: bool,
) -> Iterator[tuple[_Place, np.ndarray]]:
    """As many windows at a time as keys and values have room for."""
    run = partial(_seen, cut.after, cut.past if keep else None, params)

    def arrays(windows: np.ndarray) -> tuple[Array, Array, Array]:
        entry, acts = held.entry[windows], held.acts[windows]
        return jnp.asarray(entry), jnp.asarray(acts), jnp.asarray(held.tokens[windows])

    past = jax.eval_shape(run, *arrays(windows[:1]))[1]
    each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(past))
    room = max(batch, _MEMORY // max(each, 1))
    for start in range(0, len(windows), room):
        mine = windows[start : start + room]
        found = [run(*arrays(part)) for part in _parts(mine, batch)]
        whole = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
        losses, past = jax.tree.map(itemgetter(slice(len(mine))), whole)
        yield _Place(*arrays(mine), losses, past), mine


def _parts(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """So many at a time; the last one is filled up with some of its own."""
    for start in range(0, len(items), size):
        yield np.resize(items[start : start + size], size)


@partial(jax.jit, static_argnums=(0, 1))
def _seen(
    after: Callable[..., Array],
    past: Callable[..., dict[str, Array]] | None,
    params: Params,
    entry: Array,
    acts: Array,
    tokens: Array,
) -> tuple[Array, dict[str, Array]]:
    """Losses of windows, and their keys and values."""
    losses = _per_token(after, params, entry, acts, tokens, {})
    return losses, past(params, entry, acts) if past else {}


@partial(jax.jit, static_argnums=(0, 1))
def _changes(
    after: Callable[..., Array],
    first: int,
    params: Params,
    place: _Place,
    window: Array,
    position: Array,
    removed: Array,
) -> Array:
    """Of the losses of windows ``[B]``, from position ``first`` on."""
    past = {name: x[window, :first] for name, x in place.past.items()}
    entry, value, tokens, was = (x[window, first:] for x in place[:4])
    at = jnp.arange(first, place.tokens.shape[1])[None, :] - position[:, None]
    value = value - jnp.where(at[:, :, None] == 0, removed[:, None, :], 0)
    now = _per_token(after, params, entry, value, tokens, past)
    return jnp.sum(jnp.where(at[:, :-1] >= 0, now - was, 0), axis=1)


def _per_token(
    after: Callable[..., Array],
    params: Params,
    entry: Array,
    value: Array,
    tokens: Array,
    past: dict[str, Array],
) -> Array:
    """Cross-entropy at every position but the last, ``[B, T - 1]``."""
    logits = after(params, entry, value, past)
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
