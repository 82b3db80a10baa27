"""Compare with TransformerLens and SAELens on the same weights, job by job.

    python benchmarks/transformerlens.py --peer benchmarks/peers/.venv/bin/python

A second python with both libraries makes small random models, does the jobs of
docs/torch.md with them, and writes what comes of it; here the same is done with the
same weights.  Largest differences, relative to the largest entry; below 1e-5 or exit
status 1.  Takes two minutes.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row, run_peer

import toyfeat as ft
from toyfeat.models.decoder import Decoder, generate, load_decoder

CHILD = Path(__file__).parent / "peers" / "transformerlens.py"
GATE = 1e-5
SITE = "blocks_1/resid_post"
Pairs = Iterator[tuple[str, Any, Any]]


@dataclass(frozen=True)
class PeerConfig(BenchmarkConfig):
    """Options of this benchmark."""

    peer: str = os.environ.get("TOYFEAT_PEER_PYTHON", "")
    """A python with transformer-lens and sae-lens."""


def difference(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"wanted shape {want.shape}, got {got.shape}")
    value = float(np.abs(got - want).max() / np.abs(want).max())
    return value if np.isfinite(value) else float("inf")


def model_jobs(folder: Path, theirs: Any) -> Pairs:
    """Do the jobs on a model; yields their name, ours and theirs."""
    model = load_decoder(folder, tokenizer=False)
    params, lm = model.params, ft.from_linen(Decoder(model.config, heads=True))
    tokens = jnp.asarray(theirs["tokens"], jnp.int32)
    vector = jnp.asarray(theirs["vector"])
    run = jax.jit(lambda probes: lm(params, tokens, probes))
    logits, acts = run({})
    yield "logits", logits, theirs["logits"]
    for name in theirs:
        if name.startswith("cache "):
            site = ft.interop.site_name(name.removeprefix("cache "))
            yield f"cache: {site.split('/', 1)[1]}", acts[site], theirs[name]
    # Gradients: the peer's loss is a mean over tokens, the readout a sum per text.
    grads = {n.removeprefix("grad "): theirs[n] for n in theirs if n[:5] == "grad "}
    sites = [ft.interop.site_name(name) for name in grads]
    readout = ft.readouts.next_token_loss(tokens)
    taps = ft.tap(lm, params, tokens, sites=sites, readout=readout)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    for site, want in zip(sites, grads.values(), strict=True):
        got = np.asarray(taps[site].grads).reshape(want.shape) / count
        yield "gradients of the loss", got, want
    # Interventions.
    yield "a vector added", run({SITE: vector})[0], theirs["steered"]
    no_head = lambda z: z.at[:, :, 2].set(0.0)  # noqa: E731
    ablated = lm(params, tokens, {"blocks_1/attn/z": no_head})[0]
    yield "a head left out", ablated, theirs["ablated"]
    patch = lm(params, tokens[::-1], {})[1][SITE]
    patched = lm(params, tokens, {SITE: lambda value: patch})[0]
    yield "an activation patched in", patched, theirs["patched"]
    last = len([s for s in acts if s.endswith("resid_post")]) - 1
    skip = {f"blocks_{last}/resid_post": lambda value: acts[SITE]}
    yield "logit lens", lm(params, tokens, skip)[0], theirs["logit lens"]
    probes = {SITE: vector}
    drawn = generate(model.config, params, tokens[:, :4], 8, probes=probes).tokens
    yield "text generated under a hook", drawn, theirs["generated"][:, 4:]


def dictionary_jobs(folder: Path, theirs: Any) -> Pairs:
    """Load the dictionary, encode and decode."""
    sae, params, about = ft.interop.load_dictionary(folder)
    acts = jnp.asarray(theirs["cache blocks.1.hook_resid_post"])
    codes = sae.encode(params, acts.reshape(-1, acts.shape[-1]))
    yield "codes of a dictionary", codes.reshape(theirs["codes"].shape), theirs["codes"]
    decoded = sae.decode(params, codes).reshape(acts.shape)
    yield "reconstructions", decoded, theirs["decoded"]
    if ft.interop.site_name(about["hook_name"]) != SITE:
        raise ValueError(f"wanted metadata of {SITE}, got {about}")


def compare(folder: Path) -> dict[str, dict[str, float]]:
    """Compute the largest difference of every job, by model."""
    differences: dict[str, dict[str, float]] = {}
    for name in ("gpt2", "llama"):
        theirs = np.load(folder / f"{name}.npz")
        jobs = [*model_jobs(folder / name, theirs)]
        if "codes" in theirs:
            jobs += dictionary_jobs(folder / "sae", theirs)
        largest = differences.setdefault(name, {})
        for job, got, want in jobs:
            largest[job] = max(largest.get(job, 0.0), difference(got, want))
    return differences


def main() -> None:
    """Make the peer's files, compare, and hold the gate."""
    config = parse_command(PeerConfig, __doc__)
    if not config.peer:
        sys.exit("transformerlens: --peer wants a python with both libraries")
    rows, missed = [], []
    with tempfile.TemporaryDirectory() as folder:
        versions = run_peer(config.peer, CHILD, Path(folder))
        for name, differences in compare(Path(folder)).items():
            for job, error in differences.items():
                rows.append(row(name, {}, job, error=error, peers=versions))
                print(f"{name:6} {job:28} {error:.1e}", flush=True)
                if error >= GATE:
                    missed.append(f"{name}, {job}: {error:.1e}")
    finish(rows, missed, config.json)


if __name__ == "__main__":
    main()
