"""Types of training: the trainer, its state, and what it was made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from toyfeat.dictionary.controllers import Controller
from toyfeat.dictionary.types import Dictionary, Objective
from toyfeat.types import Array, Params, Taps


class Recipe(NamedTuple):
    """Arguments of :func:`toyfeat.trainer`, by the same names."""

    dictionary: Dictionary
    objective: Objective
    optimizer: optax.GradientTransformation
    controller: Controller | None
    readouts: int
    normalize: bool
    center: bool
    dead_after: int
    threshold_rate: float
    schedule: Callable[[Array], Array] | None
    revive: int | None


class TrainState(NamedTuple):
    """State of the training of a dictionary.

    In a population every leaf has a leading axis ``P``.

    Attributes:
      step: ``[]`` int32, number of updates done.
      params: of the dictionary.
      opt_state: of the optimizer.
      controller: state of the controller, or ``()``.
      running: running averages and counts (scale of the gradients, steps since each
        latent fired, ...), a dict of arrays.
      hyper: name to ``[]`` array, the settings that may differ from member to
        member of a population.
    """

    step: Array
    params: Params
    opt_state: Any
    controller: Any
    running: dict[str, Array]
    hyper: dict[str, Array]


class Trainer(NamedTuple):
    """Training as two pure functions.

    Attributes:
      init: ``(key, **hyper) -> TrainState``; ``hyper`` overrides defaults.
      update: ``(state, taps) -> (state, metrics)``, ``metrics`` a dict of ``[]``
        arrays with at least ``"loss"``.
      recipe: what :func:`toyfeat.trainer` made it of, or ``None`` for another.
      settings: function without arguments that returns, as JSON values, what a run
        must keep when it goes on; of trainers without a recipe, ``None`` for nothing.
    """

    init: Callable[..., TrainState]
    update: Callable[[TrainState, Taps], tuple[TrainState, dict[str, Array]]]
    recipe: Recipe | None = None
    settings: Callable[[], dict[str, Any]] | None = None
