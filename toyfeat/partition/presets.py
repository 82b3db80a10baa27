"""Published settings, frozen: what each value is, and where it was read.

:func:`spd_2025` has the settings of stochastic parameter decomposition for seven toys,
as in the authors' configuration files of February 2026, which differ from the paper's
(there 40,000 steps for superposition).  :func:`vpd_2026` has those of adversarial
parameter decomposition, which was tuned on one language model; sizes are arguments.
"""

from typing import Any, NamedTuple

from toyfeat.checks import check_choice, check_int
from toyfeat.partition import importance as importances
from toyfeat.partition import losses
from toyfeat.partition.adversary import persistent_pgd
from toyfeat.partition.decomposition import Decomposition
from toyfeat.partition.importance import Importance
from toyfeat.partition.losses import Term
from toyfeat.partition.training import cosine, trainer
from toyfeat.train import Trainer
from toyfeat.types import Params

_CONFIG = "goodfire-ai/spd, configuration of the toy, February 2026"
_POST = "Goodfire, 'Interpreting language model parameters', May 2026"


class Preset(NamedTuple):
    """Settings of a decomposition.

    Attributes:
      components: parts of every weight.
      importance: name of the function in :mod:`toyfeat.partition.importance`.
      hidden: its width.
      objective: terms of the loss.
      batch: examples per step.
      steps: of the training.
      learning_rate: of Adam.
      end_rate: the rate at the end of a cosine as a share of the first, or ``None`` for
        a constant rate.
      warm_up: steps on the error of the weights alone.
      warm_up_decay: of the weights in them.
      cited: name of a setting to where it was read.
    """

    components: int
    importance: str
    hidden: int
    objective: tuple[Term, ...]
    batch: int
    steps: int
    learning_rate: float
    end_rate: float | None
    warm_up: int
    warm_up_decay: float
    cited: dict[str, str]

    def importance_of(self, decomposition: Decomposition) -> Importance:
        """Make the importance function of these settings."""
        return getattr(importances, self.importance)(decomposition, self.hidden)

    def trainer(
        self, decomposition: Decomposition, params: Params, **changes: Any
    ) -> Trainer:
        """Make a trainer with these settings.

        Args:
          decomposition: with :attr:`components` parts of every weight.
          params: of the target.
          **changes: other arguments of :func:`toyfeat.partition.trainer`, in place of
            these settings.

        Returns:
          :class:`toyfeat.Trainer`.
        """
        steps = changes.pop("steps", self.steps)
        settings: dict[str, Any] = {
            "objective": self.objective,
            "importance": self.importance_of(decomposition),
            "learning_rate": self.learning_rate,
            "warm_up": self.warm_up,
            "warm_up_decay": self.warm_up_decay,
        }
        if self.end_rate is not None:
            settings["schedule"] = cosine(steps, self.end_rate)
        settings |= changes
        objective, importance = settings.pop("objective"), settings.pop("importance")
        return trainer(
            decomposition, params, objective, importance, steps=steps, **settings
        )


class _Toy(NamedTuple):
    """One line of the published configurations."""

    components: int
    importance: str
    hidden: int
    coefficient: float  # of the importance minimality
    p: float  # its power
    batch: int
    steps: int
    learning_rate: float
    end_rate: float | None


_TOYS = {
    "5-2": _Toy(20, "per_component", 16, 3e-3, 1, 4096, 10_000, 1e-3, 0.0),
    "5-2+identity": _Toy(20, "per_component", 16, 3e-3, 1, 4096, 10_000, 1e-3, 0.0),
    "40-10": _Toy(200, "per_component", 16, 1e-4, 2, 4096, 10_000, 1e-3, 0.0),
    "40-10+identity": _Toy(200, "per_component", 16, 1e-4, 2, 4096, 20_000, 1e-3, 0.0),
    "residual 1": _Toy(100, "per_component", 16, 1e-5, 2, 2048, 20_000, 2e-3, None),
    "residual 2": _Toy(400, "per_site", 256, 1e-4, 2, 2048, 25_000, 3e-4, None),
    "residual 3": _Toy(500, "per_component", 128, 1e-5, 2, 2048, 50_000, 1e-3, None),
}


def spd_2025(toy: str) -> Preset:
    """Return the settings of stochastic parameter decomposition for a toy.

    Args:
      toy: ``"5-2"``, ``"5-2+identity"``, ``"40-10"``, ``"40-10+identity"`` or
        ``"residual 1"`` to ``"residual 3"``.

    Returns:
      :class:`Preset`.

    Raises:
      ValueError: for another toy.

    Example:
      >>> preset = spd_2025("5-2")
      >>> preset.components, preset.steps, [term.name for term in preset.objective]
      (20, 10000, ['importance', 'stochastic', 'layerwise'])

    References:
      Bushnaq et al. (2025), arXiv 2506.20790; values from the configurations of
      goodfire-ai/spd, February 2026.
    """
    check_choice("spd_2025", "toy", toy, _TOYS)
    line = _TOYS[toy]
    penalty = losses.importance(line.coefficient, p=line.p)
    if toy == "residual 2":
        terms = (
            losses.subset(2.0),
            losses.pgd(2.0, steps=1, step_size=1.0, routed=True),
        )
    else:
        terms = (losses.stochastic(1.0), losses.layerwise(1.0))
    names = (*_Toy._fields, "objective", "warm_up", "warm_up_decay")
    return Preset(
        components=line.components,
        importance=line.importance,
        hidden=line.hidden,
        objective=(penalty, *terms),
        batch=line.batch,
        steps=line.steps,
        learning_rate=line.learning_rate,
        end_rate=line.end_rate,
        warm_up=200,
        warm_up_decay=0.0 if toy == "residual 2" else 0.1,
        cited=dict.fromkeys(names, _CONFIG),
    )


def vpd_2026(
    *,
    components: int,
    hidden: int,
    batch: int,
    positions: tuple[int, ...] = (),
    steps: int = 400_000,
) -> Preset:
    """Return the settings of adversarial parameter decomposition.

    Half of the reconstruction is by persistent adversaries, half by random subsets of
    sites.  The published importance function is a transformer over all sites; here it
    is one MLP over all sites (:func:`toyfeat.partition.importance.shared`).

    Args:
      components: parts of every weight (512 to 3,584 as published).
      hidden: width of the importance function (2,048 as published).
      batch: examples per step (64 windows as published).
      positions: sizes of the axes behind the examples, ``(512,)`` as published.
      steps: of the training.

    Returns:
      :class:`Preset`.

    References:
      Goodfire (2026), "Interpreting language model parameters".
    """
    sizes = {"components": components, "hidden": hidden, "batch": batch, "steps": steps}
    for name, size in sizes.items():
        check_int("vpd_2026", name, size)
    penalty = {"p": 2.0, "p_end": 0.4}  # along a line over the training
    terms = (
        losses.importance(2e-4, **penalty),
        losses.frequency(1e-4, **penalty),
        persistent_pgd(0.5, batch=batch, positions=positions),
        losses.subset(0.5),
        losses.faithfulness(1e7),
    )
    names = ("objective", "steps", "learning_rate", "end_rate", "warm_up")
    return Preset(
        components=components,
        importance="shared",
        hidden=hidden,
        objective=terms,
        batch=batch,
        steps=steps,
        learning_rate=5e-5,
        end_rate=0.1,
        warm_up=400,  # at a rate of 1e-3 there, of .01 here
        warm_up_decay=0.0,
        cited=dict.fromkeys(names, _POST),
    )
