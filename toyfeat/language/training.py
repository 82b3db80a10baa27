"""Dictionaries of a store, by kind, number of codes and seed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data import array_batches, store_batches
from toyfeat.data.store import Store, shard_taps
from toyfeat.dictionary import (
    attribution_objective,
    dictionary_objective,
    paired,
    topk,
)
from toyfeat.interop import save_saelens
from toyfeat.language.jobs import Train
from toyfeat.train import fit, folded, trainer
from toyfeat.types import ArrayBatches, Dictionary, Objective, Params, Taps

KINDS = ("acts", "attribution", "gradients", "paired")
_IN_MEMORY = 2**31  # bytes of a store that are held at once


class Run(NamedTuple):
    """One dictionary of a job.

    Attributes:
      kind: of :data:`KINDS`.
      k: codes per token.
      seed: of its start and the order of the tokens.
    """

    kind: str
    k: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-k{self.k}-s{self.seed}"


def runs_of(train: Train) -> list[Run]:
    """All dictionaries of a job.

    Raises:
      ValueError: for an unknown kind.
    """
    if unknown := [kind for kind in train.kinds if kind not in KINDS]:
        raise ValueError(
            f"train: kinds must be of {', '.join(KINDS)}, got {unknown[0]!r}"
        )
    return [
        Run(kind, k, seed)
        for seed in train.seeds
        for k in train.codes
        for kind in train.kinds
    ]


def design(
    kind: str, dim: int, latents: int, k: int
) -> tuple[Dictionary, Objective, bool]:
    """Dictionary, objective and whether it is one of gradients.

    Args:
      kind: ``"acts"``, a TopK dictionary of activations; ``"attribution"``, the same
        with the four-term attribution loss; ``"gradients"``, a signed TopK
        dictionary of the gradients; ``"paired"``, latents with a writer and a reader.
      dim: width of the site.
      latents: how many.
      k: codes per token.

    Returns:
      All three.
    """
    if kind == "paired":
        sae = paired(dim, latents, k)
    else:
        sae = topk(dim, latents, k, signed=kind == "gradients")
    objective = dictionary_objective(sae)
    if kind == "attribution":
        objective = attribution_objective(sae, dead_latents=1.0)
    return sae, objective, kind == "gradients"


def train_one(
    run: Run,
    train: Train,
    store: Store,
    folder: Path,
    *,
    on_chunk: Callable[..., None] | None = None,
) -> tuple[Dictionary, Params]:
    """Train a dictionary from a store, going on where it was cut off.

    Args:
      run: which.
      train: settings.
      store: of the site.
      folder: gets ``checkpoint/``, ``metrics.jsonl`` and ``features/``, the latter in
        SAELens' format.
      on_chunk: as of :func:`toyfeat.fit`.

    Returns:
      The dictionary and its parameters for taps as they are.
    """
    sae, objective, of_gradients = design(run.kind, store.dim, train.latents, run.k)
    readouts = 1 if of_gradients else store.readouts or 1
    one = trainer(
        sae,
        objective,
        readouts=readouts,
        center=not of_gradients,
        warm_up=max(1, train.steps // 10),
        dead_after=max(20, train.steps // 10),
    )
    key = jax.random.key(run.seed)
    state = one.init(key, learning_rate=train.learning_rate)
    state = fit(
        one,
        state,
        batches_of(store, train.batch, run.seed, of_gradients=of_gradients),
        steps=train.steps,
        directory=folder,
        on_chunk=on_chunk,
        check_data=False,
    )
    params = folded(sae, state)
    about = {"kind": run.kind, "seed": run.seed, **store.metadata}
    save_saelens(folder / "features", sae, params, metadata=about)
    return sae, params


def batches_of(
    store: Store, batch: int, seed: int, *, of_gradients: bool
) -> ArrayBatches | Callable[[int], Taps]:
    """Tokens that count, activations or gradients in their place, shuffled.

    A store that fits is held in memory; a larger one is read as it goes, tokens of
    weight 0 included.
    """
    size = sum((store.path / shard.file).stat().st_size for shard in store.shards)
    if size <= _IN_MEMORY:
        parts = [_counting(shard_taps(store, i)) for i in range(len(store.shards))]
        taps = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        taps = _as_acts(taps) if of_gradients else taps
        return array_batches(taps, batch=min(batch, len(taps.weights)), seed=seed)
    batches = store_batches(store, batch=batch, seed=seed)
    return lambda step: _as_acts(batches(step)) if of_gradients else batches(step)


def finished(train: Train, folder: Path) -> Iterator[tuple[Run, Path]]:
    """Runs of a job whose features are there."""
    for run in runs_of(train):
        features = folder / run.name / "features"
        if (features / "cfg.json").exists():
            yield run, features


def _counting(taps: Taps) -> Taps:
    kept = np.flatnonzero(np.asarray(taps.weights))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x[kept], np.float32)), taps)


def _as_acts(taps: Taps) -> Taps:
    """Gradients in the place of activations, every draw an example of its own."""
    if taps.grads is None:
        raise ValueError("train: a dictionary of gradients wants a store with some")
    num, draws, dim = taps.grads.shape
    rows: Any = taps.grads.reshape(num * draws, dim)
    rows = rows * np.sqrt(draws).astype(rows.dtype)  # draws are scaled by 1 / sqrt(K)
    return Taps(rows, None, np.repeat(taps.weights, draws))  # pyright: ignore[reportArgumentType]
