"""Train the dictionaries of a job, one by one or as populations."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.sharding import shard
from toyfeat.dictionary.types import Dictionary, Objective
from toyfeat.files.atomic import write_whole
from toyfeat.files.json import parse_json, read_bytes, read_json_lines
from toyfeat.interop import save_saelens
from toyfeat.jobs.config import Attribution, Train
from toyfeat.jobs.kinds import KINDS
from toyfeat.jobs.results import Run, finished_runs
from toyfeat.jobs.several import to_local
from toyfeat.jobs.taps import TapSource
from toyfeat.processes import call_in_first, process_index, together
from toyfeat.train import denormalized, fit, population, trainer
from toyfeat.train.types import Trainer, TrainState

OnChunk = Callable[..., None]


def design(
    kind: str, dim: int, latents: int, k: int, loss: Attribution | None = None
) -> tuple[Dictionary, Objective]:
    """Make the dictionary and the objective of a kind.

    Args:
      kind: of :data:`toyfeat.jobs.kinds.KINDS`.
      dim: width of the site.
      latents: of the dictionary.
      k: active latents per token.
      loss: of a kind that is trained with one; its defaults are those of
        :func:`toyfeat.losses.attribution`.

    Returns:
      Dictionary and objective.
    """
    row = KINDS[kind]
    sae = row.make(dim, latents, k)
    settings = asdict(loss) if loss else {}
    settings.pop("name", None)  # of the run, not of the loss
    return sae, row.objective(sae, **settings)


def train_one(
    run: Run,
    train: Train,
    source: TapSource,
    folder: Path,
    *,
    on_chunk: OnChunk | None = None,
) -> None:
    """Train a dictionary, or resume its training.

    Args:
      run: which dictionary.
      train: settings.
      source: of the site.
      folder: gets a folder for each run, with ``checkpoint/``, ``metrics.jsonl`` and
        ``features/``, the latter in SAELens' format.
      on_chunk: as of :func:`toyfeat.fit`.
    """
    run_trainer = _make_trainer(run, train, source, run.k)
    state = _start(
        run_trainer, source, jax.random.key(run.seed), learning_rate=train.learning_rate
    )
    state = fit(
        run_trainer,
        state,
        source.batches(run.seed, KINDS[run.kind].of_gradients),
        steps=train.steps,
        directory=folder / run.name,
        on_chunk=on_chunk,
        check_data=False,
    )
    _save_features(run, train, source, folder, state)


def train_together(
    runs: Sequence[Run],
    train: Train,
    source: TapSource,
    folder: Path,
    *,
    on_chunk: OnChunk | None = None,
) -> None:
    """Train dictionaries of one kind side by side, on the same batches.

    A population that was cut off is resumed with the members it was started with.

    Args:
      runs: of one kind, with any ``k`` and seeds.
      train: settings.
      source: of the site.
      folder: gets a folder for the population with checkpoints, and one for each run
        with ``metrics.jsonl`` and ``features/``.
      on_chunk: as of :func:`toyfeat.fit`, with a value per run of every metric.

    Raises:
      FloatingPointError: if a member diverged; those that did not are saved.
    """
    call_in_first("train", _find_population, runs, folder)  # writes who its members are
    shared, members = _find_population(runs, folder)
    # One trainer for all: members keep fewer codes than the largest k, by their own.
    largest = max(run.k for run in members)
    run_trainer = population(_make_trainer(members[0], train, source, largest))
    keys = jax.vmap(jax.random.key)(jnp.array([run.seed for run in members]))
    ks = jnp.array([float(run.k) for run in members])
    state = _start(run_trainer, source, keys, k=ks, learning_rate=train.learning_rate)
    state = fit(
        run_trainer,
        state,
        source.batches(
            min(run.seed for run in members), KINDS[members[0].kind].of_gradients
        ),
        steps=train.steps,
        directory=shared,
        on_chunk=on_chunk,
        check_data=False,
    )
    # Save the members that are wanted and finite.
    state = to_local(state)
    diverged = []
    for i, run in enumerate(members):
        member = jax.tree.map(lambda x, i=i: x[i], state)
        if not all(bool(jnp.isfinite(x).all()) for x in member.params.values()):
            diverged.append(run.name)
        elif run in runs:
            call_in_first("train", _save_metrics, i, shared, folder / run.name)
            _save_features(run, train, source, folder, member)
    if diverged:
        raise FloatingPointError(
            f"train: {', '.join(diverged)} diverged in {shared}; lower "
            "train.learning_rate (in another folder), or leave them out"
        )


def _find_population(runs: Sequence[Run], folder: Path) -> tuple[Path, list[Run]]:
    """Find or make the population that has these runs among its members.

    Returns:
      Its folder, and all its members.
    """
    number = 0
    while (path := _members_path(runs[0], folder, number)).exists():
        members = [runs[0]._replace(k=k, seed=seed) for k, seed in _read_members(path)]
        if set(runs) <= set(members):
            return path.parent, members
        number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps([(run.k, run.seed) for run in runs]))
    return path.parent, list(runs)


def _read_members(path: Path) -> list[tuple[int, int]]:
    """Read ``k`` and seed of the members of a population.

    Raises:
      ValueError: if the file is broken; says what to do.
    """
    advice = f"delete the folder {path.parent}, and its training begins anew"
    pairs = parse_json(read_bytes(path, "train"), path, "train", advice=advice)
    is_list = isinstance(pairs, list)
    if not is_list or any(
        not isinstance(pair, list) or [type(number) for number in pair] != [int, int]
        for pair in pairs
    ):
        raise ValueError(
            f"train: {path} must be a list of pairs [k, seed], got {pairs!r:.80}; "
            f"{advice}"
        )
    return [(k, seed) for k, seed in pairs]


def _members_path(run: Run, folder: Path, number: int) -> Path:
    return folder / f"{run.label} together {number}" / "members.json"


def _save_metrics(member: int, shared: Path, folder: Path) -> None:
    """Save the metrics of one member of a population into its own folder."""
    rows = [
        {
            name: value[member] if isinstance(value, list) else value
            for name, value in row.items()
        }
        for row in read_json_lines(shared / "metrics.jsonl", "train")
    ]
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(folder / "metrics.jsonl", text)


def load_curves(train: Train, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Read the metrics of the training of the finished dictionaries of a job.

    Args:
      train: settings.
      folder: of :func:`train_one`.

    Returns:
      Name of a run to metric to ``[chunks]``; ``step`` is one of them.
    """
    curves = {}
    for run, features in finished_runs(train, folder):
        path = features.parent / "metrics.jsonl"
        rows = read_json_lines(path, "train") if path.exists() else []
        if rows:
            names = [n for n, x in rows[-1].items() if isinstance(x, int | float)]
            curves[run.name] = {
                n: np.array([_number(row.get(n)) for row in rows]) for n in names
            }
    return curves


def _number(value: Any) -> float:
    """Return a number, NaN for what is none."""
    return float(value) if isinstance(value, int | float) else float("nan")


def _make_trainer(run: Run, train: Train, source: TapSource, k: int) -> Trainer:
    """Make the trainer of a run."""
    kind = KINDS[run.kind]
    sae, objective = design(run.kind, source.dim, train.latents, k, run.loss)
    if source.mesh is not None:
        is_split = source.mesh.shape["latents"] > 1
        sae = shard(sae, source.mesh, latents="latents" if is_split else None)
    # Shares of the training: a tenth warms up, a latent that was active nowhere in a
    # tenth counts as dead.  The lower bounds are for trainings of a few steps.
    return trainer(
        sae,
        objective,
        readouts=1 if kind.of_gradients else source.readouts or 1,
        center=not kind.of_gradients,
        warm_up=max(1, train.steps // 10),
        dead_after=max(20, train.steps // 10),
        revive=max(10, train.steps // 20) if kind.revive else None,
    )


def _start(
    run_trainer: Trainer, source: TapSource, keys: Any, **hyper: Any
) -> TrainState:
    """Start a state, on the devices of the mesh if there is one."""
    if source.mesh is None:
        return run_trainer.init(keys, **hyper)
    return jax.jit(partial(_init, run_trainer))(keys, hyper)


def _init(run_trainer: Trainer, keys: Any, hyper: dict[str, Any]) -> TrainState:
    return run_trainer.init(keys, **hyper)


def _save_features(
    run: Run, train: Train, source: TapSource, folder: Path, state: TrainState
) -> None:
    """Save the dictionary for taps as they are, in SAELens' format."""
    sae = KINDS[run.kind].make(source.dim, train.latents, run.k)
    metadata: dict[str, Any] = {"kind": run.kind, "seed": run.seed, **source.metadata}
    if run.loss:
        metadata["loss"] = asdict(run.loss)
    path, state = folder / run.name / "features", to_local(state)
    with together("train"):
        if process_index() == 0:
            save_saelens(path, sae, denormalized(sae, state), metadata=metadata)
