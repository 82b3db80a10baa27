"""Settings of a trainer of decompositions, and their description as JSON values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from toyfeat.dictionary.controllers import Controller
from toyfeat.partition.decomposition import Decomposition
from toyfeat.partition.importance import Importance
from toyfeat.partition.losses import Term
from toyfeat.partition.sources import Distance
from toyfeat.train.run import describe_functions
from toyfeat.types import Array, Params


class PartitionRecipe(NamedTuple):
    """Arguments of :func:`toyfeat.partition.trainer`, by the same names."""

    decomposition: Decomposition
    params: Params
    objective: tuple[Term, ...]
    importance: Importance
    steps: int
    schedule: Callable[[Array], Array] | None
    optimizer: optax.GradientTransformation
    controller: Controller | None
    distance: Distance
    warm_up: int
    warm_up_decay: float
    networks: bool
    inputs_from: Callable[[Array], Any]


def describe_recipe(recipe: PartitionRecipe) -> dict[str, Any]:
    """Describe what a run must keep when it goes on, for :func:`toyfeat.fit`.

    Args:
      recipe: of the trainer.

    Returns:
      JSON values by name; functions are described by what they return.
    """
    names = "steps", "warm_up", "warm_up_decay", "networks"
    settings = {name: getattr(recipe, name) for name in names}
    settings["terms"] = [term.name for term in recipe.objective]
    settings["sites"] = [site.name for site in recipe.decomposition.sites]
    return settings | describe_functions(recipe, lambda: {"V": jnp.ones((2, 2))})
