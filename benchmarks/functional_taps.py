"""Taps of a study in files, part by part."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.jobs.workspace import Workspace, cached_readout, probed_from
from toyfeat.lm.collect import tap_windows
from toyfeat.types import Array

MASSIVE = 10.0  # as of jobs


def stored_taps(
    work: Workspace, site: str, batch: int, folder: Path, name: str, part: slice
) -> dict[str, np.ndarray]:
    """Tap windows part by part into files, and read them all.

    ``name`` is ``"acts"``, or a readout with its number of draws, ``"labels 8"``.
    """
    tokens, pieces, per_file = work.tokens[part], [], 4 * batch
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(tokens), per_file):
        file = folder / f"{name} {part.start + first}.npz"
        if not file.exists():
            start, found = time.process_time(), []
            for i in range(first, first + per_file, batch):
                windows = jnp.asarray(tokens[i : i + batch])
                found.append(tap_part(work, site, name, windows, i, part.start))
            whole: dict[str, Any] = {
                n: np.concatenate([x[n] for x in found]) for n in found[0]
            }
            whole["seconds"] = np.asarray([time.process_time() - start])
            np.savez(file.with_suffix(".part.npz"), **whole)
            file.with_suffix(".part.npz").rename(file)
            print(f"{file.name}: {whole['seconds'][0]:.1f} s", flush=True)
        with np.load(file) as content:
            pieces.append(dict(content))
    return {n: np.concatenate([x[n] for x in pieces]) for n in pieces[0]}


def tap_part(
    work: Workspace, site: str, name: str, windows: Array, index: int, seed: int
) -> dict[str, np.ndarray]:
    """Tap a batch of windows; gradients are the bits of bfloat16."""
    probed, params = probed_from(work), work.model.params
    kind, _, draws = name.partition(" ")
    kind = "none" if kind == "acts" else kind
    readout = cached_readout(kind, draws=int(draws or 1), seed=seed)
    taps = tap_windows(probed, (site,), readout, MASSIVE, params, windows, index)[site]
    rows = {"weights": taps.weights, "acts": taps.acts}
    if taps.grads is not None:
        grads = taps.grads.astype(jnp.bfloat16)
        rows["grads"] = jax.lax.bitcast_convert_type(grads, jnp.uint16)
    shape = windows.shape
    return {n: np.asarray(x).reshape(*shape, *x.shape[1:]) for n, x in rows.items()}
