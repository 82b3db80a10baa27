"""Taps of a study in files, part by part."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat.jobs.workspace import Workspace, probed_from
from toyfeat.lm.collect import exclude_massive, make_readout, tap_windows
from toyfeat.types import Array, Params

MASSIVE = 10.0  # as of jobs


@partial(jax.jit, static_argnums=(0, 1))
def tap_acts(probed: Any, site: str, params: Params, tokens: Array) -> Any:
    """Activations and weights alone; the blocks behind the site are not run."""
    taps = ft.tap(probed, params, tokens, sites=(site,), readout=None)[site]
    weights = ft.readouts.next_token_loss(tokens).mask
    taps = taps._replace(weights=jnp.asarray(weights).reshape(-1))
    return exclude_massive(taps, tokens.shape[1], MASSIVE)


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
    if name == "acts":
        taps = tap_acts(probed, site, params, windows)
    else:
        kind, _, draws = name.partition(" ")
        readout = make_readout(kind, draws=int(draws or 1), seed=seed)
        taps = tap_windows(probed, (site,), readout, MASSIVE, params, windows, index)
        taps = taps[site]
    rows = {"weights": taps.weights, "acts": taps.acts}
    if taps.grads is not None:
        grads = taps.grads.astype(jnp.bfloat16)
        rows["grads"] = jax.lax.bitcast_convert_type(grads, jnp.uint16)
    shape = windows.shape
    return {n: np.asarray(x).reshape(*shape, *x.shape[1:]) for n, x in rows.items()}
