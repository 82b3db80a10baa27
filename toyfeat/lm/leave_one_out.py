"""Compare attributions with the effects of leaving latents out."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.lm.evaluate import compile_rule, next_token_cross_entropy
from toyfeat.lm.replacements import Replaced, Replacement
from toyfeat.lm.split import HeldOut, SplitDecoder, precise
from toyfeat.metrics import Faithfulness, attribution_faithfulness
from toyfeat.types import Array, Params, Taps

# Stretches of a window: each is a program compiled for itself, and its keys and values
# have to be made first.  docs/decisions/language.md, "A decoder's past is what its
# sites say": quarters of at least 16 positions, from 8 pairs in a window on.
_MIN_STRETCH = 16
_MAX_STRETCHES = 4
_MIN_PAIRS = 8
_MEMORY = 2**30  # bytes of windows with their keys and values on the device at a time
_CHUNK = 1024  # tokens that are replaced at a time; parts take 4 k D bytes each


class _Windows(NamedTuple):
    """Windows on the device, and what the model does at their positions.

    Attributes:
      entry: ``[W, T, D]``, the residual stream that the second part starts from.
      acts: ``[W, T, width]``, at the site.
      tokens: ``[W, T]``.
      losses: ``[W, T - 1]``, cross-entropy of the next token.
      cache: keys and values ``[W, T, .]`` by site; empty if they are not used.
    """

    entry: Array
    acts: Array
    tokens: Array
    losses: Array
    cache: dict[str, Array]


class _Pairs(NamedTuple):
    """Pairs of a token and a latent that is active there.

    Attributes:
      window: ``[P]``.
      position: ``[P]``.
      slot: ``[P]``, which of the token's parts is the latent's.
      attribution: ``[P]``.
      drawn: how many, the first ones, were drawn evenly.
    """

    window: np.ndarray
    position: np.ndarray
    slot: np.ndarray
    attribution: np.ndarray
    drawn: int


@precise
def faithfulness(
    split: SplitDecoder,
    params: Params,
    held_out: HeldOut,
    replacement: Replacement,
    *,
    uniform: int,
    largest: int,
    batch: int = 16,
    seed: int = 0,
    stretch: int | None = None,
) -> tuple[Faithfulness, np.ndarray, int]:
    """Measure how well attributions predict the effects of leaving latents out.

    Pairs of a token and an active latent are drawn evenly, and those of the largest
    :math:`|A|` that were not drawn are added.  The latent's part is subtracted from
    the activation of its token alone; everything else of it stays, the reconstruction
    error included.  The true effect is the change of the cross-entropy of the window.

    Nothing changes at the positions before the token, so that the model is run on the
    stretches of the window from that of the token on, behind the keys and values of
    the positions before.

    Args:
      split: the decoder split at a site.
      params: parameters of the decoder.
      held_out: from :func:`toyfeat.lm.split.tap_held_out`.
      replacement: of the activations of the site.
      uniform: number of pairs that are drawn evenly.
      largest: number of pairs with the largest attributions.
      batch: pairs at a time that run on whole windows; more where windows are cut.
      seed: of the draw.
      stretch: positions of a stretch; by default a quarter of the window, but not
        very short ones, and whole windows where few pairs share one.

    Returns:
      :class:`Faithfulness` of all pairs, ``[pairs, 2]`` predicted and true effects,
      and how many of them, the first ones, were drawn.

    Raises:
      ValueError: if no latent is active at any token that counts, or the number of
        pairs is 0.
    """
    if (stretch is not None and stretch < 1) or uniform + largest < 1:
        raise ValueError(
            "faithfulness: wanted at least a pair, and a position in a stretch, got "
            f"uniform {uniform}, largest {largest}, stretch {stretch}"
        )
    # Pairs, and the parts of the activations that leave with them.
    replace = compile_rule(replacement)
    pairs = _choose_pairs(replace, held_out, uniform, largest, seed)
    removed = _parts_of_pairs(replace, held_out, pairs)
    if stretch is None:
        length, windows = held_out.tokens.shape[1], len(np.unique(pairs.window))
        stretch = _stretch_length(length, len(pairs.window), windows)
    true = _true_effects(split, params, held_out, pairs, removed, batch, stretch)
    # Leaving a part out changes the loss by minus its attribution, to first order.
    effects = np.stack([-pairs.attribution, true], axis=1)
    return attribution_faithfulness(*effects.T), effects, pairs.drawn


def _true_effects(
    split: SplitDecoder,
    params: Params,
    held_out: HeldOut,
    pairs: _Pairs,
    removed: np.ndarray,
    batch: int,
    stretch: int,
) -> np.ndarray:
    """Run the model without the parts of pairs: changes of the losses ``[P]``."""
    length, true = held_out.tokens.shape[1], np.zeros(len(pairs.window))
    for windows, members in _load_windows(
        split,
        params,
        held_out,
        np.unique(pairs.window),
        batch,
        with_cache=stretch < length,
    ):
        # Run every stretch from its first position on, with the pairs in it.
        for first in range(0, length, stretch):
            change = partial(_loss_changes, split.run, first, params, windows)
            in_windows = np.isin(pairs.window, members)
            in_stretch = pairs.position // stretch == first // stretch
            size = batch * length // (length - first)  # shorter runs take more pairs
            for part in _fixed_size(np.flatnonzero(in_windows & in_stretch), size):
                row = np.searchsorted(members, pairs.window[part])
                true[part] = change(row, pairs.position[part], removed[part])
            del change  # it holds the windows
        del windows  # before the next ones are made
    return true


def _stretch_length(length: int, pairs: int, windows: int) -> int:
    """Positions of a stretch: whole windows, unless many pairs share them."""
    if pairs < _MIN_PAIRS * windows:
        return length
    return max(_MIN_STRETCH, -(-length // _MAX_STRETCHES))


def _choose_pairs(
    replace: Callable[[Taps], Replaced],
    held_out: HeldOut,
    uniform: int,
    largest: int,
    seed: int,
) -> _Pairs:
    """Draw pairs evenly and add those of the largest attributions."""
    tokens = np.argwhere(held_out.weights > 0)  # window and position
    attributions = _attributions(replace, held_out, tokens)
    active = np.argwhere(attributions != 0)  # token and slot
    if not len(active):
        raise ValueError("faithfulness: no latent has an effect at any token")
    # Evenly drawn pairs first, then the largest attributions of the others.
    order = np.random.default_rng(seed).permutation(len(active))
    drawn, others = active[order[:uniform]], active[np.sort(order[uniform:])]
    sizes = np.abs(attributions[tuple(others.T)])
    by_size = np.argsort(-sizes, kind="stable")
    token, slot = np.concatenate([drawn, others[by_size[:largest]]]).T
    window, position = tokens[token].T
    return _Pairs(
        window=window,
        position=position,
        slot=slot,
        attribution=attributions[token, slot],
        drawn=len(drawn),
    )


def _load_windows(
    split: SplitDecoder,
    params: Params,
    held_out: HeldOut,
    numbers: np.ndarray,
    batch: int,
    *,
    with_cache: bool,
) -> Iterator[tuple[_Windows, np.ndarray]]:
    """Run as many windows at a time as memory has room for.

    Yields:
      Windows, filled up to the same number by repeating some, and the numbers of
      those that are not repeated.
    """
    run = partial(_losses_and_cache, split.run_with_cache, with_cache, params)

    def inputs(windows: np.ndarray) -> tuple[Array, Array, Array]:
        return (
            jnp.asarray(held_out.entry[windows]),
            jnp.asarray(held_out.acts[windows]),
            jnp.asarray(held_out.tokens[windows]),
        )

    def load(members: np.ndarray, index: np.ndarray) -> _Windows:
        results = [run(*inputs(part)) for part in _fixed_size(members, batch)]
        losses, cache = jax.tree.map(lambda *x: jnp.concatenate(x)[index], *results)
        entry, acts, tokens = inputs(members[index])
        return _Windows(
            entry=entry, acts=acts, tokens=tokens, losses=losses, cache=cache
        )

    # Bytes of a window, from shapes alone, say how many there is room for.
    shapes = jax.eval_shape(lambda *x: (x, run(*x)), *inputs(numbers[:1]))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    room = min(max(batch, _MEMORY // size), len(held_out.tokens))
    for start in range(0, len(numbers), room):
        members = numbers[start : start + room]
        index = np.resize(np.arange(len(members)), room)  # repeats to fill up
        yield load(members, index), members  # no name here keeps them in memory


def _fixed_size(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Parts of ``size`` items; the last one is filled up by repeating its own."""
    for start in range(0, len(items), size):
        yield np.resize(items[start : start + size], size)


@partial(jax.jit, static_argnums=(0, 1))
def _losses_and_cache(
    run_with_cache: Callable[..., tuple[Array, dict[str, Array]]],
    with_cache: bool,
    params: Params,
    entry: Array,
    acts: Array,
    tokens: Array,
) -> tuple[Array, dict[str, Array]]:
    """Losses of windows, and their keys and values."""
    logits, cache = run_with_cache(params, entry, acts)
    return _losses_per_token(logits, tokens), cache if with_cache else {}


@partial(jax.jit, static_argnums=(0, 1))
def _loss_changes(
    run: Callable[..., Array],
    first: int,
    params: Params,
    windows: _Windows,
    row: Array,
    position: Array,
    removed: Array,
) -> Array:
    """Changes of the losses of windows ``[B]`` when a part is left out.

    Args:
      run: the model behind the site.
      first: position that the run starts at.
      params: parameters of the decoder.
      windows: with their keys and values, if ``first`` is not 0.
      row: ``[B]``, which of the windows.
      position: ``[B]``, of the token.
      removed: ``[B, width]``, the part.
    """
    # What comes before the stretch, and the stretch itself, of each pair's window.
    past = {name: x[row, :first] for name, x in windows.cache.items()}
    entry, acts, tokens, losses = (x[row, first:] for x in windows[:4])
    offset = jnp.arange(first, windows.tokens.shape[1])[None, :] - position[:, None]
    # The part leaves at its token alone; losses before that token cannot change.
    value = acts - jnp.where(offset[:, :, None] == 0, removed[:, None, :], 0)
    changed = _losses_per_token(run(params, entry, value, past), tokens)
    return jnp.sum(jnp.where(offset[:, :-1] >= 0, changed - losses, 0), axis=1)


def _losses_per_token(logits: Array, tokens: Array) -> Array:
    """Cross-entropy at every position but the last, ``[B, T - 1]``."""
    log_normalizer = jax.nn.logsumexp(logits, axis=2)
    return next_token_cross_entropy(logits, log_normalizer, tokens)[:, :-1]


def _attributions(
    replace: Callable[[Taps], Replaced], held_out: HeldOut, tokens: np.ndarray
) -> np.ndarray:
    """First-order effects of all parts of some tokens, ``[tokens, k]``."""
    chunks = []
    for part, acts, grads in _chunks(held_out, *tokens.T):
        parts = replace(Taps(acts, grads, jnp.ones(len(acts)))).parts
        attributions = jnp.einsum("nkd,nd->nk", parts, grads[:, 0])
        chunks.append(np.asarray(attributions)[: len(part)])
    return np.concatenate(chunks)


def _parts_of_pairs(
    replace: Callable[[Taps], Replaced], held_out: HeldOut, pairs: _Pairs
) -> np.ndarray:
    """Compute what the latents of pairs add to the activations, ``[P, width]``."""
    chunks = []
    for part, acts, grads in _chunks(held_out, pairs.window, pairs.position):
        parts = replace(Taps(acts, grads, jnp.ones(len(acts)))).parts
        slot = pairs.slot[part]
        chunks.append(np.asarray(parts[jnp.arange(len(part)), slot]))
    return np.concatenate(chunks)


def _chunks(
    held_out: HeldOut, window: np.ndarray, position: np.ndarray
) -> Iterator[tuple[np.ndarray, Array, Array]]:
    """Activations and gradients of tokens in chunks of one size.

    Yields:
      Indices of the tokens of a chunk, then activations and gradients, filled up by
      repeating some.
    """
    size = min(_CHUNK, held_out.tokens.size)
    for start in range(0, len(window), size):
        part = np.arange(start, min(start + size, len(window)))
        repeated = np.resize(part, size)
        where = window[repeated], position[repeated]
        yield (
            part,
            jnp.asarray(held_out.acts[where]),
            jnp.asarray(held_out.grads[where]),
        )
