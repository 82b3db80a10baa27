"""Activations and gradients made when they are wanted, and never stored."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data import array_batches
from toyfeat.language.collecting import tapped
from toyfeat.language.opening import (
    Opened,
    about,
    asked_of,
    probed_of,
    readouts_of,
    width_of,
)
from toyfeat.language.supply import Batches, Supply, as_acts
from toyfeat.types import Array, ArrayBatches, Taps


def of_model(run: Opened, site: str) -> Supply:
    """Taps of the training text of a job, straight from its model.

    Batches for training are whole windows in random order, tapped on the device inside
    the loop of training; tokens that do not count have weight 0 in them.

    Args:
      run: from :func:`toyfeat.language.opening.opened`.
      site: where.

    Returns:
      :class:`Supply`.

    Raises:
      ValueError: if the batch of the job is not of whole windows.
    """
    wanted, length = run.job.train.batch, run.tokens.shape[1]
    if wanted % length or not wanted <= run.tokens.size:
        raise ValueError(
            f"job: train.batch must be whole windows of {length} tokens, at most the "
            f"{run.tokens.size} there are, got {wanted}"
        )
    return Supply(
        width_of(run.model.config, site),
        readouts_of(run.job),
        about(run, site),
        partial(_batches, run, site),
        partial(_chunks, run, site),
    )


def _tapping(run: Opened, site: str) -> partial[dict[str, Taps]]:
    given = run.job.collect
    return partial(tapped, probed_of(run), (site,), asked_of(run.job), given.massive)


def _chunks(run: Opened, site: str) -> Iterator[Taps]:
    """Batches of windows in order, the last one without what fills it up."""
    of, batch = _tapping(run, site), min(run.job.collect.batch, len(run.tokens))
    for first in range(0, len(run.tokens), batch):
        part = run.tokens[first : first + batch]
        full = jnp.asarray(np.resize(part, (batch, part.shape[1])))
        taps = of(run.model.params, full, first)[site]
        yield jax.tree.map(lambda x, n=part.size: np.asarray(x, np.float32)[:n], taps)


def _as_float(taps: Taps) -> Taps:
    return jax.tree.map(lambda x: x.astype(jnp.float32), taps)


def _batches(run: Opened, site: str, seed: int, of_gradients: bool) -> Batches:
    wanted, length = run.job.train.batch, run.tokens.shape[1]
    windows, num = jnp.asarray(run.tokens, jnp.int32), len(run.tokens)
    rows = Taps(windows, jnp.arange(num), jnp.ones(num))  # with their indices
    order = array_batches(rows, batch=wanted // length, seed=seed)
    of = _tapping(run, site)

    def take(data: Any, step: Array) -> Taps:
        params, order = data
        chosen = order(step)
        taps = _as_float(of(params, chosen.acts, chosen.grads)[site])
        return as_acts(taps) if of_gradients else taps

    return ArrayBatches(take, (run.model.params, order))
