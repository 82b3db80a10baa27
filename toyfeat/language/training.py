"""Dictionaries of a language model, by kind, number of codes and seed."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checkpoint.files import write_whole
from toyfeat.dictionary import (
    attribution_objective,
    dictionary_objective,
    paired,
    topk,
)
from toyfeat.interop import save_saelens
from toyfeat.language.jobs import BASES, Attribution, Train
from toyfeat.language.supply import Supply
from toyfeat.train import fit, folded, population, trainer
from toyfeat.types import Dictionary, Objective, Trainer, TrainState

KINDS = ("acts", "attribution", "gradients", "paired")
OnChunk = Callable[..., None]


class Run(NamedTuple):
    """One dictionary of a job.

    Attributes:
      kind: of :data:`KINDS`.
      k: codes per token.
      seed: of its start and the order of the tokens.
      loss: of the kind ``"attribution"``.
    """

    kind: str
    k: int
    seed: int
    loss: Attribution | None = None

    @property
    def label(self) -> str:
        """The kind, or the name of its loss."""
        return self.loss.name if self.loss else self.kind

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.label}-k{self.k}-s{self.seed}"


def runs_of(train: Train) -> list[Run]:
    """All dictionaries of a job.

    Raises:
      ValueError: for an unknown kind, or losses whose names cannot be told apart.
    """
    if unknown := [kind for kind in train.kinds if kind not in KINDS]:
        raise ValueError(
            f"train: kinds must be of {', '.join(KINDS)}, got {unknown[0]!r}"
        )
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
    losses: dict[str, Sequence[Attribution | None]] = dict.fromkeys(KINDS, (None,))
    losses["attribution"] = train.attribution
    return [
        Run(kind, k, seed, loss)
        for seed in train.seeds
        for k in train.codes
        for kind in train.kinds
        for loss in losses[kind]
    ]


def design(
    kind: str, dim: int, latents: int, k: int, loss: Attribution | None = None
) -> tuple[Dictionary, Objective, bool]:
    """Dictionary, objective and whether it is one of gradients.

    Args:
      kind: ``"acts"``, a TopK dictionary of activations; ``"attribution"``, the same
        with the four-term attribution loss; ``"gradients"``, a signed TopK
        dictionary of the gradients; ``"paired"``, latents with a writer and a reader.
      dim: width of the site.
      latents: how many.
      k: codes per token.
      loss: of ``"attribution"``.

    Returns:
      All three.
    """
    if kind == "paired":
        sae = paired(dim, latents, k)
    else:
        sae = topk(dim, latents, k, signed=kind == "gradients")
    objective = dictionary_objective(sae)
    if kind == "attribution":
        loss = loss or Attribution()
        objective = attribution_objective(
            sae,
            attribution_sparsity=loss.attribution_sparsity,
            unexplained=loss.unexplained,
            penalty=loss.penalty,
            form=loss.form,
            dead_latents=1.0,
        )
    return sae, objective, kind == "gradients"


def train_one(
    run: Run,
    train: Train,
    supply: Supply,
    folder: Path,
    *,
    on_chunk: OnChunk | None = None,
) -> None:
    """Train a dictionary, going on where it was cut off.

    Args:
      run: which.
      train: settings.
      supply: of the site.
      folder: one for each run is made in it, with ``checkpoint/``, ``metrics.jsonl``
        and ``features/``, the latter in SAELens' format.
      on_chunk: as of :func:`toyfeat.fit`.
    """
    one, of_gradients = _trainer(run, train, supply, run.k)
    state = one.init(jax.random.key(run.seed), learning_rate=train.learning_rate)
    state = fit(
        one,
        state,
        supply.batches(run.seed, of_gradients),
        steps=train.steps,
        directory=folder / run.name,
        on_chunk=on_chunk,
        check_data=False,
    )
    _save(run, train, supply, folder, state)


def train_together(
    runs: Sequence[Run],
    train: Train,
    supply: Supply,
    folder: Path,
    *,
    on_chunk: OnChunk | None = None,
) -> None:
    """Train dictionaries of one kind side by side; they see the same batches.

    What was cut off goes on with the members it was begun with.

    Args:
      runs: of one kind, with any codes and seeds.
      train: settings.
      supply: of the site.
      folder: gets one for all with checkpoints, and for each run one with
        ``metrics.jsonl`` and ``features/``.
      on_chunk: as of :func:`toyfeat.fit`, with a value per run of every metric.

    Raises:
      FloatingPointError: if a member diverged; those that did not are saved.
    """
    whole, members = _begun(runs, folder)
    one, of_gradients = _trainer(
        members[0], train, supply, max(run.k for run in members)
    )
    many = population(one)
    keys = jax.vmap(jax.random.key)(jnp.array([run.seed for run in members]))
    codes = jnp.array([float(run.k) for run in members])
    state = many.init(keys, k=codes, learning_rate=train.learning_rate)
    state = fit(
        many,
        state,
        supply.batches(min(run.seed for run in members), of_gradients),
        steps=train.steps,
        directory=whole,
        on_chunk=on_chunk,
        check_data=False,
    )
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows, lost = [json.loads(line) for line in lines], []
    for i, run in enumerate(members):
        member = jax.tree.map(lambda x, i=i: x[i], state)
        if not all(bool(jnp.isfinite(x).all()) for x in member.params.values()):
            lost.append(run.name)
        if run not in runs or run.name in lost:
            continue
        mine = [
            {n: x[i] if isinstance(x, list) else x for n, x in row.items()}
            for row in rows
        ]
        (folder / run.name).mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in mine)
        write_whole(folder / run.name / "metrics.jsonl", text)
        _save(run, train, supply, folder, member)
    if lost:
        raise FloatingPointError(
            f"train: {', '.join(lost)} diverged in {whole}; lower train.learning_rate "
            "(in another folder), or leave them out"
        )


def _begun(runs: Sequence[Run], folder: Path) -> tuple[Path, list[Run]]:
    """The folder of a population with these runs among its members, and all of them."""
    for number in itertools.count():
        whole = folder / f"{runs[0].label} together {number}"
        path = whole / "members.json"
        if not path.exists():
            whole.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps([(run.k, run.seed) for run in runs]))
            return whole, list(runs)
        members = [
            runs[0]._replace(k=k, seed=seed)
            for k, seed in json.loads(path.read_text(encoding="utf-8"))
        ]
        if set(runs) <= set(members):
            return whole, members
    raise AssertionError  # counting does not end


def finished(train: Train, folder: Path) -> Iterator[tuple[Run, Path]]:
    """Runs of a job whose features are there."""
    for run in runs_of(train):
        if is_finished(folder, run):
            yield run, folder / run.name / "features"


def is_finished(folder: Path, run: Run) -> bool:
    """Whether a run has its features."""
    return (folder / run.name / "features" / "cfg.json").exists()


def curves(train: Train, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What was measured while the finished dictionaries of a job were trained.

    Args:
      train: settings.
      folder: of :func:`train_one`.

    Returns:
      Name of a run to metric to ``[chunks]``; ``step`` is one of them.
    """
    found = {}
    for run, features in finished(train, folder):
        path = features.parent / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [json.loads(line) for line in text.splitlines()]
        if rows:
            names = [n for n, x in rows[-1].items() if isinstance(x, int | float)]
            found[run.name] = {
                n: np.array([row.get(n) for row in rows], np.float64) for n in names
            }
    return found


def _trainer(run: Run, train: Train, supply: Supply, k: int) -> tuple[Trainer, bool]:
    sae, objective, of_gradients = design(
        run.kind, supply.dim, train.latents, k, run.loss
    )
    one = trainer(
        sae,
        objective,
        readouts=1 if of_gradients else supply.readouts or 1,
        center=not of_gradients,
        warm_up=max(1, train.steps // 10),
        dead_after=max(20, train.steps // 10),
        # Half of a paired dictionary dies early, and its auxiliary loss, which only
        # looks at activations, does not bring it back.
        revive=max(10, train.steps // 20) if run.kind == "paired" else None,
    )
    return one, of_gradients


def _save(
    run: Run, train: Train, supply: Supply, folder: Path, state: TrainState
) -> None:
    """The dictionary for taps as they are."""
    sae, *_ = design(run.kind, supply.dim, train.latents, run.k, run.loss)
    about: dict[str, Any] = {"kind": run.kind, "seed": run.seed, **supply.about}
    if run.loss:
        about["loss"] = asdict(run.loss)
    save_saelens(
        folder / run.name / "features", sae, folded(sae, state), metadata=about
    )
