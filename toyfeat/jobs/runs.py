"""List the dictionaries of a job: kinds, names, and which of them are trained."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from toyfeat.jobs.config import BASES, Attribution, Train

KINDS = ("acts", "attribution", "gradients", "paired")


class Run(NamedTuple):
    """One dictionary of a job.

    Attributes:
      kind: of :data:`KINDS`.
      k: active latents per token.
      seed: of the initial parameters and the order of the tokens.
      loss: of the kind ``"attribution"``.
    """

    kind: str
    k: int
    seed: int
    loss: Attribution | None = None

    @property
    def label(self) -> str:
        """The kind, or the name of the attribution loss."""
        return self.loss.name if self.loss else self.kind

    @property
    def name(self) -> str:
        """Name of the folder of the run."""
        return f"{self.label}-k{self.k}-s{self.seed}"


def list_runs(train: Train) -> list[Run]:
    """List all dictionaries of a job: every kind with every ``k`` and seed.

    Raises:
      ValueError: for an unknown kind, or losses whose names cannot be told apart.
    """
    if unknown := [kind for kind in train.kinds if kind not in KINDS]:
        raise ValueError(
            f"train: kinds must be of {', '.join(KINDS)}, got {unknown[0]!r}"
        )
    _check_losses(train)
    losses: dict[str, Sequence[Attribution | None]] = dict.fromkeys(KINDS, (None,))
    losses["attribution"] = train.attribution
    return [
        Run(kind, k, seed, loss)
        for seed in train.seeds
        for k in train.ks
        for kind in train.kinds
        for loss in losses[kind]
    ]


def _check_losses(train: Train) -> None:
    """Refuse names that cannot be folders or methods of their own, and unused losses.

    Rows of results and folders are found by name, so that a loss must not be called
    like a basis or like a way in which another kind is evaluated ("paired alone").
    """
    names = [loss.name for loss in train.attribution]
    for name in names:
        taken = name in BASES or name.split(" ")[0] in {*KINDS} - {"attribution"}
        plain = name.replace(" ", "").replace("_", "").isalnum()
        if taken or not plain or names.count(name) > 1:
            raise ValueError(
                "train: losses want names of their own, of letters, digits, spaces and "
                "underscores, that do not begin as other kinds and are no bases', got "
                f"{name!r}"
            )
    if train.attribution != (Attribution(),) and "attribution" not in train.kinds:
        raise ValueError(
            f"train: there are losses ({', '.join(names)}), but kinds has no "
            "'attribution'; add it, or leave the losses out"
        )


def finished_runs(train: Train, folder: Path) -> Iterator[tuple[Run, Path]]:
    """Iterate over the trained dictionaries of a job.

    Args:
      train: settings.
      folder: that has a folder for each run.

    Yields:
      A run and the folder of its features, in SAELens' format.
    """
    for run in list_runs(train):
        if is_finished(folder, run):
            yield run, folder / run.name / "features"


def is_finished(folder: Path, run: Run) -> bool:
    """Check whether the features of a run were saved."""
    return (folder / run.name / "features" / "cfg.json").exists()
