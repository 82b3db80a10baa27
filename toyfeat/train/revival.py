"""Latents that never fire start again from what is reconstructed worst."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.coding import lengths
from toyfeat.linalg.orthonormal import choose
from toyfeat.types import Array, Dictionary, Params, Parts, TrainState

_FAINT = 0.2  # of an encoder that starts again, in units of the others' mean length
_OF_COLUMNS = ("W_enc", "P")  # one latent per column; all other tensors per row
_OF_NO_LATENT = ("b_dec", "topk_threshold")


class Directions(NamedTuple):
    """Unit vectors for every example of a batch, ``[N, D]``, and what decides.

    Attributes:
      read: for the encoder.
      write: for the decoder.
      grads: for readers of gradients, that of the readout where it is largest, or
        ``None``.
      error: ``[N]``, squared error times weight.
    """

    read: Array
    write: Array
    grads: Array | None
    error: Array


def revived(
    parts: Parts, state: TrainState, *, every: int, dead_after: int
) -> tuple[TrainState, dict[str, Array]]:
    """A state in which dead latents start again, every so many steps.

    Each dead latent is given another example of the batch, drawn with a probability
    proportional to its squared error; where fewer examples have one, the others wait.
    Its decoder row is the example, as long as those of latents that fire are on the
    mean; its encoder the same direction, as long as theirs or, where codes do not
    compete, a fifth of it; everything else of it is as at the start, the optimizer's
    memory of it 0.  In other steps, in a population those in which no member has
    dead latents, nothing is drawn, and only a selection between old and new is left;
    members do not see each other.

    Args:
      parts: of the batch, from before the update.
      state: after the update.
      every: steps between revivals.
      dead_after: silent steps after which a latent is dead.

    Returns:
      The state, and ``revived``, how many latents were.
    """
    silent = state.running["silent"]
    dead = silent >= dead_after
    # What follows takes part in the pass over all entries that the update makes: a
    # condition that returned the parameters would copy them in every step.
    again, fresh = choose(
        (state.step % every == 0) & jnp.any(dead),
        partial(_started, parts.dictionary),
        _nothing,
        jax.random.fold_in(state.running["key"], state.step),
        (parts.acts, parts.target, parts.out.recon, parts.grads, parts.weights),
        dead,
        parts.params,
    )
    start = parts.dictionary.init(jax.random.key(0))  # its biases and thresholds
    start |= {name: x for name, x in state.params.items() if x.ndim == 2} | fresh
    state = state._replace(
        params={n: _put(n, again, start[n], x) for n, x in state.params.items()},
        opt_state=_forgotten(state.opt_state, state.params, again),
        running={**state.running, "silent": jnp.where(again, 0, silent)},
    )
    return state, {"revived": jnp.sum(again)}


def _nothing(key: Array, batch: Any, dead: Array, params: Params) -> Any:
    """What :func:`_started` returns where no latent starts again."""
    del key
    names = _matrices(params, batch)
    return dead & False, {name: jnp.zeros_like(params[name]) for name in names}


def _matrices(params: Params, batch: Any) -> list[str]:
    """Tensors of which a latent's part is set from an example."""
    without = batch[3] is None
    names = ["W_enc", "W_dec"] if without else ["W_enc", "W_dec", "W_read", "P"]
    return [name for name in names if name in params]


def _started(
    dictionary: Dictionary, key: Array, batch: Any, dead: Array, params: Params
) -> tuple[Array, Params]:
    """Which latents ``[M]`` start again, and matrices in which all of them do."""
    found = _directions(dictionary, params, batch)
    noise = jax.random.gumbel(key, found.error.shape, found.error.dtype)
    score = jnp.log(found.error) + noise  # -inf without any
    best, order = jax.lax.top_k(score, min(len(score), len(dead)))
    place = jnp.cumsum(dead) - 1
    last = len(order) - 1
    again = dead & (place <= last) & (best[jnp.minimum(place, last)] > -jnp.inf)
    given = jax.tree.map(lambda x: x[order[jnp.clip(place, 0, last)]], found)
    faint = _FAINT if dictionary.config.k is None else 1.0
    rows = {"W_dec": given.write, "W_enc": faint * given.read}
    if given.grads is not None:
        rows |= {"W_read": given.grads, "P": given.grads}
    fresh = {}
    for name in _matrices(params, batch):
        columns = name in _OF_COLUMNS
        old = params[name].T if columns else params[name]
        new = (_mean_length(dead, old) * rows[name]).astype(old.dtype)
        fresh[name] = new.T if columns else new
    return again, fresh


def _directions(dictionary: Dictionary, params: Params, batch: Any) -> Directions:
    acts, target, recon, grads, weights = batch
    origin = params["b_dec"][None, :]
    write = target - origin
    read = acts - origin if dictionary.config.apply_b_dec_to_input else acts
    error = weights * jnp.sum((target - recon) ** 2, axis=1)
    error = jnp.where(jnp.isfinite(error), error, jnp.zeros_like(error))
    strong = None
    if grads is not None and "W_read" in params:
        sizes = jnp.sum(grads**2, axis=2)
        which = jnp.argmax(sizes, axis=1)
        error = jnp.where(jnp.max(sizes, axis=1) > 0, error, jnp.zeros_like(error))
        strong = _unit(jnp.take_along_axis(grads, which[:, None, None], axis=1)[:, 0])
    return Directions(_unit(read), _unit(write), strong, error)


def _mean_length(dead: Array, rows: Array) -> Array:
    """Of the rows of latents that fire; of all if none does."""
    counted = jnp.where(jnp.all(dead), jnp.ones_like(dead), ~dead)
    sizes = jnp.linalg.norm(rows, axis=1)
    total = jnp.sum(jnp.where(counted, sizes, jnp.zeros_like(sizes)))
    return total / jnp.sum(counted).astype(rows.dtype)


def _forgotten(opt_state: Any, params: Params, again: Array) -> Any:
    """An optimizer's state without what it holds of some latents.

    Whatever in it is a dict with the names of parameters is taken to be per entry,
    where shapes are the same: moments of Adam, a trace of momentum.
    """
    names = {name for name in params if name not in _OF_NO_LATENT}

    def is_like_params(node: Any) -> bool:
        return isinstance(node, dict) and names <= node.keys()

    def forget(node: Any) -> Any:
        if not is_like_params(node):
            return node
        return {
            name: _put(name, again, jnp.zeros_like(x), x)
            if name in names and jnp.shape(x) == params[name].shape
            else x
            for name, x in node.items()
        }

    return jax.tree.map(forget, opt_state, is_leaf=is_like_params)


def _put(name: str, again: Array, new: Array, old: Array) -> Array:
    """``new`` for the latents that start again."""
    if name in _OF_NO_LATENT:
        return old
    if old.ndim == 1:
        return jnp.where(again, new, old)
    place = again[None, :] if name in _OF_COLUMNS else again[:, None]
    return jnp.where(place, new, old)


def _unit(rows: Array) -> Array:
    return rows / lengths(rows)[:, None]
