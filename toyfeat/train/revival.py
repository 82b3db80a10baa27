"""Revival of latents that never fire, from what is reconstructed worst."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.dictionary.base import lengths
from toyfeat.dictionary.tensors import latent_axes
from toyfeat.dictionary.types import Architecture, Dictionary, Inputs
from toyfeat.linalg.orthonormal import choose
from toyfeat.train.placement import map_tensors
from toyfeat.train.types import TrainState
from toyfeat.types import Array, Params

ENCODER_SHARE = 0.2
"""Length of a revived encoder in units of the mean of the others, where codes do not
compete: that of Bricken et al. (2023), appendix on neuron resampling.  Where they
compete it is 1 (docs/decisions/train.md, "Revival follows Bricken et al.")."""


class Directions(NamedTuple):
    """Unit vectors for every example of a batch, ``[N, D]``, and their errors.

    Attributes:
      acts: for what reads activations.
      target: for what writes.
      grads: for what reads gradients, that of the readout where it is largest, or
        ``None``.
      error: ``[N]``, squared error times weight.
    """

    acts: Array
    target: Array
    grads: Array | None
    error: Array


class _Batch(NamedTuple):
    """Part of the inputs of the loss that revival needs; a pytree of arrays."""

    acts: Array
    target: Array
    recon: Array
    grads: Array | None
    weights: Array


def revive_dead(
    inputs: Inputs, state: TrainState, *, every: int, dead_after: int
) -> tuple[TrainState, dict[str, Array]]:
    """Start dead latents again, every so many steps.

    Each dead latent is given another example of the batch, drawn with a probability
    proportional to its squared error; where fewer examples have one, the others wait.
    Its decoder row is the example, with the mean length of those of latents that
    fire; its encoder the same direction, with their mean length or, where codes do not
    compete, :data:`ENCODER_SHARE` of it; everything else of it is as at the start, the
    optimizer's memory of it 0.  In other steps, in a population those in which no
    member has dead latents, nothing is drawn, and only a selection between old and new
    remains; members do not see each other.

    Args:
      inputs: of the batch, from before the update.
      state: after the update.
      every: steps between revivals.
      dead_after: silent steps after which a latent is dead.

    Returns:
      The state, and ``revived``, the number of latents that were.
    """
    dictionary = inputs.dictionary
    silent = state.running["silent"]
    dead = silent >= dead_after
    # Draw examples, if it is time and there are dead latents.  What follows takes part
    # in the pass over all entries that the update makes: a condition that returned the
    # parameters would copy them in every step.
    batch = _Batch(
        acts=inputs.acts,
        target=inputs.target,
        recon=inputs.out.recon,
        grads=inputs.grads,
        weights=inputs.weights,
    )
    revived, rows = choose(
        (state.step % every == 0) & jnp.any(dead),
        partial(_draw, dictionary),
        partial(_draw_nothing, dictionary),
        jax.random.fold_in(state.running["key"], state.step),
        batch,
        dead,
        inputs.params,
    )
    # Vectors start again as they were, matrices from the examples.
    start = dictionary.init(jax.random.key(0))
    start |= {name: x for name, x in state.params.items() if x.ndim == 2} | rows
    axes = latent_axes(dictionary.architecture)
    state = state._replace(
        params={
            name: _replace_latents(axes[name], revived, start[name], x)
            for name, x in state.params.items()
        },
        opt_state=_forget(state.opt_state, state.params, axes, revived),
        running={**state.running, "silent": jnp.where(revived, 0, silent)},
    )
    return state, {"revived": jnp.sum(revived)}


def _sources(architecture: Architecture, batch: _Batch) -> dict[str, str]:
    """Matrices that are set from an example, and from which of its vectors."""
    sources = {"W_enc": "acts", "W_dec": "target", **architecture.revived_from}
    if batch.grads is None:
        sources = {name: x for name, x in sources.items() if x != "grads"}
    return sources


def _draw_nothing(
    dictionary: Dictionary, key: Array, batch: _Batch, dead: Array, params: Params
) -> Any:
    """Return what :func:`_draw` returns where no latent starts again."""
    del key
    names = _sources(dictionary.architecture, batch)
    return dead & False, {name: jnp.zeros_like(params[name]) for name in names}


def _draw(
    dictionary: Dictionary, key: Array, batch: _Batch, dead: Array, params: Params
) -> tuple[Array, Params]:
    """Draw which latents ``[M]`` start again, and matrices in which all of them do."""
    directions = _directions(dictionary, params, batch)
    # Sample examples without replacement, by their errors: Gumbel top-k.
    noise = jax.random.gumbel(key, directions.error.shape, directions.error.dtype)
    score = jnp.log(directions.error) + noise  # -inf without any error
    best, order = jax.lax.top_k(score, min(len(score), len(dead)))
    # The dead latent number i takes the example in place i, if there is one.
    place = jnp.cumsum(dead) - 1
    last = len(order) - 1
    revived = dead & (place <= last) & (best[jnp.minimum(place, last)] > -jnp.inf)
    drawn = jax.tree.map(lambda x: x[order[jnp.clip(place, 0, last)]], directions)
    # Rows of the mean length of the latents that fire.
    architecture = dictionary.architecture
    axes = latent_axes(architecture)
    share = ENCODER_SHARE if architecture.selects == "all" else 1.0
    matrices = {}
    for name, source in _sources(architecture, batch).items():
        rows = getattr(drawn, source)
        rows = share * rows if name == "W_enc" else rows
        columns = axes[name] == 1
        old = params[name].T if columns else params[name]
        new = (_mean_length(dead, old) * rows).astype(old.dtype)
        matrices[name] = new.T if columns else new
    return revived, matrices


def _directions(dictionary: Dictionary, params: Params, batch: _Batch) -> Directions:
    """Compute what a latent would start from, were it given to an example."""
    # An example writes its target, and reads its activation, both from the origin.
    origin = params["b_dec"][None, :]
    writes = batch.target - origin
    reads = batch.acts
    if dictionary.config.apply_b_dec_to_input:
        reads = batch.acts - origin
    # Examples are drawn by their squared error; one that is not finite is never drawn.
    error = batch.weights * jnp.sum((batch.target - batch.recon) ** 2, axis=1)
    error = jnp.where(jnp.isfinite(error), error, jnp.zeros_like(error))
    strongest = None
    read_back = "grads" in _sources(dictionary.architecture, batch).values()
    if batch.grads is not None and read_back:
        # The gradient of the readout where it is largest; without one, no example.
        sizes = jnp.sum(batch.grads**2, axis=2)
        readout = jnp.argmax(sizes, axis=1)
        error = jnp.where(jnp.max(sizes, axis=1) > 0, error, jnp.zeros_like(error))
        strongest = jnp.take_along_axis(batch.grads, readout[:, None, None], axis=1)
        strongest = _unit_rows(strongest[:, 0])
    return Directions(_unit_rows(reads), _unit_rows(writes), strongest, error)


def _mean_length(dead: Array, rows: Array) -> Array:
    """Mean length of the rows of latents that fire; of all if none does."""
    counted = jnp.where(jnp.all(dead), jnp.ones_like(dead), ~dead)
    sizes = jnp.linalg.norm(rows, axis=1)
    total = jnp.sum(jnp.where(counted, sizes, jnp.zeros_like(sizes)))
    return total / jnp.sum(counted).astype(rows.dtype)


def _forget(
    opt_state: Any, params: Params, axes: Mapping[str, int | None], revived: Array
) -> Any:
    """Set what an optimizer's state holds of some latents to 0.

    Whatever in it is a dict with the names of parameters is taken to be per entry,
    where shapes are the same: moments of Adam, a trace of momentum.
    """
    names = {name for name in params if axes[name] is not None}

    def forget(name: str, x: Any) -> Any:
        if name in names and jnp.shape(x) == params[name].shape:
            return _replace_latents(axes[name], revived, jnp.zeros_like(x), x)
        return x

    return map_tensors(forget, lambda x: x, names, opt_state)


def _replace_latents(axis: int | None, revived: Array, new: Array, old: Array) -> Array:
    """Take ``new`` for the latents that start again."""
    if axis is None:
        return old
    shape = [1] * old.ndim
    shape[axis] = len(revived)
    return jnp.where(revived.reshape(shape), new, old)


def _unit_rows(rows: Array) -> Array:
    return rows / lengths(rows)[:, None]
