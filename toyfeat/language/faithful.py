"""Whether attributions say what leaving a latent out does."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.language.halves import Halves
from toyfeat.language.judging import Held, compiled, of_next, precise
from toyfeat.language.methods import Method, Replaced
from toyfeat.splicing import Faithfulness, attribution_faithfulness
from toyfeat.types import Array, Params, Taps

_STRETCH, _STRETCHES = 16, 4  # positions at least, and so many in a window at most
_PAIRS = 8  # in a window, from which on its keys and values are worth having
_MEMORY = 2**30  # bytes of windows with keys and values
_CHUNK = 1024  # tokens of which a method is asked at a time


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
        16, since each is compiled for itself.  Where windows have fewer than eight
        pairs on average, all of them is run.

    Returns:
      :class:`Faithfulness` of all pairs, ``[pairs, 2]`` predicted and true effects,
      and how many of them, the first ones, were drawn.

    Raises:
      ValueError: if no latent is there at any token that counts, or no pairs are asked
        for.
    """
    if (stretch is not None and stretch < 1) or uniform + largest < 1:
        raise ValueError(
            "faithfulness: wanted at least a pair, and a position in a stretch, got "
            f"uniform {uniform}, largest {largest}, stretch {stretch}"
        )
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
    removed = _removed(replace, held, window, position, slot)
    length, used = held.tokens.shape[1], np.unique(window)
    step = stretch or max(_STRETCH, -(-length // _STRETCHES))
    if stretch is None and len(pairs) < _PAIRS * len(used):
        step = length
    true = np.zeros(len(pairs))
    for place, windows in _places(cut, params, held, used, batch, step < length):
        for first in range(0, length, step):
            here = np.isin(window, windows) & (position // step == first // step)
            size = batch * length // (length - first)
            for part in _parts(np.flatnonzero(here), size):
                where = np.searchsorted(windows, window[part]), position[part]
                run = partial(_changes, cut.after, first, params, place)
                true[part] = run(*where, removed[part])
        del place  # before the next one is made
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
    """As many windows at a time as there is room for, filled up to one number."""
    run = partial(_seen, cut.seen, keep, params)

    def arrays(windows: np.ndarray) -> tuple[Array, Array, Array]:
        entry, acts = held.entry[windows], held.acts[windows]
        return jnp.asarray(entry), jnp.asarray(acts), jnp.asarray(held.tokens[windows])

    def seen(windows: np.ndarray, index: np.ndarray) -> Any:
        found = [run(*arrays(part)) for part in _parts(windows, batch)]
        return jax.tree.map(lambda *x: jnp.concatenate(x)[index], *found)

    one = jax.eval_shape(lambda *x: (x, run(*x)), *arrays(windows[:1]))
    each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
    room = min(max(batch, _MEMORY // each), len(held.tokens))
    for start in range(0, len(windows), room):
        mine = windows[start : start + room]
        index = np.resize(np.arange(len(mine)), room)
        yield _Place(*arrays(mine[index]), *seen(mine, index)), mine


def _parts(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """So many at a time; the last one is filled up with some of its own."""
    for start in range(0, len(items), size):
        yield np.resize(items[start : start + size], size)


@partial(jax.jit, static_argnums=(0, 1))
def _seen(
    seen: Callable[..., tuple[Array, dict[str, Array]]],
    keep: bool,
    params: Params,
    entry: Array,
    acts: Array,
    tokens: Array,
) -> tuple[Array, dict[str, Array]]:
    """Losses of windows, and their keys and values."""
    logits, past = seen(params, entry, acts)
    return _per_token(logits, tokens), past if keep else {}


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
    now = _per_token(after(params, entry, value, past), tokens)
    return jnp.sum(jnp.where(at[:, :-1] >= 0, now - was, 0), axis=1)


def _per_token(logits: Array, tokens: Array) -> Array:
    """Cross-entropy at every position but the last, ``[B, T - 1]``."""
    return of_next(logits, jax.nn.logsumexp(logits, axis=2), tokens)[:, :-1]


def _attributions(
    replace: Callable[[Taps], Replaced], held: Held, tokens: np.ndarray
) -> np.ndarray:
    """``[tokens, k]``."""
    found = []
    for part, rows in _chunks(held, *tokens.T):
        assert rows.grads is not None
        effects = jnp.einsum("nkd,nd->nk", replace(rows).parts, rows.grads[:, 0])
        found.append(np.asarray(effects)[: len(part)])
    return np.concatenate(found)


def _removed(
    replace: Callable[[Taps], Replaced],
    held: Held,
    window: np.ndarray,
    position: np.ndarray,
    slot: np.ndarray,
) -> np.ndarray:
    """Parts of pairs, ``[P, width]``."""
    found = []
    for part, rows in _chunks(held, window, position):
        parts = replace(rows).parts
        found.append(np.asarray(parts[jnp.arange(len(part)), slot[part]]))
    return np.concatenate(found)


def _chunks(
    held: Held, window: np.ndarray, position: np.ndarray
) -> Iterator[tuple[np.ndarray, Taps]]:
    """Indices of some tokens, and these tokens, filled up to one number."""
    size = min(_CHUNK, held.tokens.size)
    for start in range(0, len(window), size):
        part = np.arange(start, min(start + size, len(window)))
        full = np.resize(part, size)
        yield part, _rows(held, window[full], position[full])


def _rows(held: Held, window: np.ndarray, position: np.ndarray) -> Taps:
    """Single tokens."""
    acts, grads = held.acts[window, position], held.grads[window, position]
    return Taps(jnp.asarray(acts), jnp.asarray(grads), jnp.ones(len(acts)))
