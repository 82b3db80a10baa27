"""Placement of a training state: what belongs to a latent is on its device."""

from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import AbstractMesh

from toyfeat.dictionary.shards import Split, lay_out, sharding, tensor_sharding
from toyfeat.dictionary.tensors import latent_axes
from toyfeat.dictionary.types import Architecture, Dictionary
from toyfeat.meshes import everywhere, like, run_automatic
from toyfeat.train.types import TrainState
from toyfeat.types import Taps


def map_tensors(
    fn: Callable[[str, Any], Any],
    rest: Callable[[Any], Any],
    names: Collection[str],
    opt_state: Any,
) -> Any:
    """Map what an optimizer's state holds per tensor of a dictionary, and the rest.

    Args:
      fn: ``(name, leaf) -> result`` for every dict in the state that has ``names``:
        moments of Adam, a trace of momentum.
      rest: ``leaf -> result`` for all other leaves.
      names: of the tensors that each such dict must have.
      opt_state: state of the optimizer.

    Returns:
      A state of the same structure.
    """

    def is_like_params(node: Any) -> bool:
        return isinstance(node, dict) and set(names) <= node.keys()

    def map_node(node: Any) -> Any:
        if is_like_params(node):
            return {name: fn(name, x) for name, x in node.items()}
        return rest(node)

    return jax.tree.map(map_node, opt_state, is_leaf=is_like_params)


def place_state(dictionary: Dictionary, state: TrainState) -> TrainState:
    """Lay a state out over the mesh of a dictionary, if it has one.

    Args:
      dictionary: that the state trains.
      state: of one member.

    Returns:
      The state; parameters, moments of the optimizer and counts of silent steps are
      split by their latents, all else is on every device.
    """
    if dictionary.split is None:
        return state
    shardings = state_shardings(dictionary.split, dictionary.architecture, state)
    return jax.tree.map(lay_out, state, shardings)


def run_update(
    update: Callable[..., Any], state: TrainState, taps: Taps
) -> tuple[TrainState, dict[str, Any]]:
    """Run an update; the next state lies where the last one does, metrics everywhere.

    Args:
      update: ``(state, taps) -> (state, metrics)``.
      state: of one member or of a population, on any devices.
      taps: batch, on any devices.

    Returns:
      The next state, and the metrics.
    """

    def shardings(mesh: AbstractMesh) -> Any:
        return like(state)(mesh), everywhere(mesh)

    return run_automatic(update, shardings, state, taps)


def state_shardings(
    split: Split, architecture: Architecture, state: TrainState
) -> TrainState:
    """Make the shardings of all leaves of a state of a split dictionary."""
    axes = latent_axes(architecture)
    tensors = {name: tensor_sharding(split, axes[name]) for name in state.params}
    names = {name for name in state.params if axes[name] is not None}

    def whole(leaf: Any) -> Any:
        del leaf
        return sharding(split)

    def tensor(name: str, leaf: Any) -> Any:
        known = name in tensors and leaf.shape == state.params[name].shape
        return tensors[name] if known else whole(leaf)

    shardings = jax.tree.map(whole, state)
    return shardings._replace(
        params=tensors,
        opt_state=map_tensors(tensor, whole, names, state.opt_state),
        running=shardings.running | {"silent": sharding(split, split.latents)},
    )
