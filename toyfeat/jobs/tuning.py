"""Settings of fine-tuning: one table of a job."""

from dataclasses import dataclass
from typing import Literal

from toyfeat.jobs.limits import Count, CountOrZero, Positive, Seed


@dataclass(frozen=True)
class Tuning:
    """A loss that dictionaries are fine-tuned with, beside their reconstruction error.

    Attributes:
      name: of the folders of its dictionaries.
      term: ``"mse"`` for none; ``"fisher"``, :func:`toyfeat.losses.fisher`;
        ``"kl"``, :func:`toyfeat.losses.spliced_kl`, which runs the model at every
        step; ``"shared_kl"``, :func:`toyfeat.losses.shared_kl`, which trains all
        dictionaries of the job side by side and runs the model once for all of them at
        every step; ``"expanded_kl"``, :func:`toyfeat.losses.expanded_kl`, which runs
        it once, before the first.
      form: of ``"fisher"``.
      limit: of ``"fisher"``, in nats.
      draws: readouts that ``"fisher"`` takes, the first of the collected ones, 0 for
        all; labels that ``"expanded_kl"`` and ``"shared_kl"`` draw at a
        reconstruction, 0 for 4 and 1.
      at: where ``"expanded_kl"`` expands: at the reconstruction of the dictionary
        itself, ``"own"``, or at the mean one of all dictionaries of the job,
        ``"mean"``, where one expansion serves all.
      clean_prefix: whether ``"kl"`` keeps the keys and values of the model.
      weight: of the term, relative to the reconstruction error at the start;
        ``"expanded_kl"`` wants a small one, .03 on SmolLM2.
    """

    name: str = "mse"
    term: Literal["mse", "fisher", "kl", "shared_kl", "expanded_kl"] = "mse"
    form: Literal["square", "huber", "log"] = "square"
    limit: Positive = 1.0
    draws: CountOrZero = 0
    at: Literal["own", "mean"] = "own"
    clean_prefix: bool = False
    weight: Positive = 1.0


@dataclass(frozen=True)
class Finetune:
    """Dictionaries to fine-tune, each with every loss, on the collected windows.

    Attributes:
      dictionaries: folders in SAELens' format, of this or another library.
      losses: how.
      steps: of training; all windows are used at most once.
      windows: per step.
      learning_rate: of Adam, which falls to 0.
      seed: of the order of windows, the same for all losses.
    """

    dictionaries: tuple[str, ...] = ("out/smollm2/train/acts-k16-s0/features",)
    losses: tuple[Tuning, ...] = (Tuning(),)
    steps: Count = 500
    windows: Count = 8
    learning_rate: Positive = 5e-4
    seed: Seed = 0
