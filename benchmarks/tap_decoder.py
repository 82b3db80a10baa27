"""Compare taps of the decoder with its forward pass, and with torch and hooks.

Part of ``benchmarks/tap.py``.  The same random weights, read by ``load_decoder`` from
the files that transformers wrote; gradients are compared before times are.  All sites
are five a block.  "gradient alone" is ``jax.grad`` of the same loss by the embedded
tokens, with no site returned: what this model's backward pass costs here.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contest import HERE, PEERS, Worker
from harness import BenchmarkConfig, medians, parse_command, program, row

import toyfeat as ft
from toyfeat.models.decoder import SITES, Decoder, load_decoder

SIZE = {
    "layers": 30,
    "dim": 576,
    "heads": 9,
    "kv_heads": 3,
    "hidden": 1536,
    "vocab": 49152,
}
TINY = {**SIZE, "layers": 2, "dim": 36, "hidden": 64, "vocab": 512}
ROUNDS = 5
BAR = 2.2
ALONE = "gradient alone"


def measure(*, tiny: bool = False) -> tuple[list[dict], list[str]]:
    """Time all of it; rows and missed bars, none without the peers' environment."""
    if not PEERS.exists():
        print("decoder: no peers (bash benchmarks/peers/setup.sh), left out")
        return [], []
    size = TINY if tiny else SIZE
    batch, length = (2, 16) if tiny else (8, 128)
    worker = Worker(PEERS, HERE / "peers" / "decoder.py", None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokens = np.random.default_rng(0).integers(
                0, size["vocab"], (batch, length)
            )
            np.save(Path(folder) / "tokens.npy", tokens)
            where = {"folder": folder, "tokens": f"{folder}/tokens.npy"}
            worker.ask(what="make", **where, **size)
            tokens = jnp.asarray(tokens, jnp.int32)
            rows, missed = _measure(worker, Path(folder), tokens, size)
            return rows, [] if tiny and rows else missed  # times of tiny sizes: noise
    finally:
        worker.end()


def _measure(
    worker: Worker, folder: Path, tokens: jax.Array, size: dict[str, int]
) -> tuple[list[dict], list[str]]:
    """Check the gradients, and only then time all programs; rows and missed bars."""
    names = [f"{i}/{name}" for i in range(size["layers"]) for name in SITES]
    programs = _programs(folder, tokens, names, size["layers"] // 2)
    error, own = _errors(worker, folder, programs, names)
    if not (error < 1e-3 and own < 1e-4):
        return [], [
            f"decoder: gradients are {error:.1e} off torch's and {own:.1e} off "
            "jax.grad's, no time"
        ]
    runs = {name: compiled.run for name, compiled in programs.items()}
    for name in ("forward", "hooked"):
        runs[f"torch {name}"] = partial(worker.ask, what="run", method=name)
    seconds = medians(runs, rounds=ROUNDS)
    shape = {**size, "batch": len(tokens), "length": tokens.shape[1]}
    errors = {name: own if name == ALONE else error for name in programs}
    rows = _rows(programs, seconds, errors, shape)
    # The bars: of the time over the forward pass alone, and beside torch's hooks.
    line = next(line for line in rows if line["method"] == "tap all sites")
    share, speed = line["times_forward"], line["ratio"]
    missed = []
    if share > BAR:
        missed.append(f"decoder: all sites take {share:.2f} x the forward, bar {BAR}")
    if speed < 1:
        missed.append(f"decoder: all sites at {speed:.2f} x the speed of torch, bar 1")
    return rows, missed


def _rows(
    programs: dict[str, Any],
    seconds: dict[str, float],
    errors: dict[str, float],
    shape: dict[str, int],
) -> list[dict]:
    """Make a row for every program, beside torch's program for the same task."""
    forward, peers = programs["forward"], {"forward": "torch forward"}
    rows = []
    for name, compiled in programs.items():
        peer = seconds[peers.get(name, "torch hooked")]
        rows.append(
            row(
                "decoder",
                shape,
                name,
                ours_s=seconds[name],
                peer_s=peer,
                ratio=None if name == ALONE else peer / seconds[name],
                times_forward=seconds[name] / seconds["forward"],
                flops_times_forward=compiled.flops / forward.flops,
                error=errors[name],
                peer_error=None,
                flops=compiled.flops,
                compile_s=compiled.compile_s,
            )
        )
    return rows


def _programs(
    folder: Path, tokens: jax.Array, names: list[str], middle: int
) -> dict[str, Any]:
    """Compile everything that is timed."""
    model = load_decoder(folder, tokenizer=False)
    probed = ft.from_linen(Decoder(model.config))
    behind = Decoder(model.config, start=0)

    def tapped(sites: list[str]) -> Any:
        return lambda p, x: ft.tap(
            probed, p, x, sites=sites, readout=ft.readouts.next_token_loss(x)
        )

    def alone(p: Any, x: jax.Array) -> jax.Array:
        """Gradient of the readout's loss by the embedded tokens."""

        def loss(resid: jax.Array) -> jax.Array:
            logits = jnp.asarray(behind.apply(p, resid))[:, :-1]
            picked = jnp.take_along_axis(logits, x[:, 1:, None], axis=2)[:, :, 0]
            return jnp.sum(jax.nn.logsumexp(logits, axis=2) - picked)

        return jax.grad(loss)(p["params"]["embed"]["embedding"][x])

    functions = {
        "forward": lambda p, x: probed(p, x, {})[0],
        ALONE: alone,
        "tap all sites": tapped([f"blocks_{name}" for name in names]),
        "tap one site": tapped([f"blocks_{middle}/resid_post"]),
    }
    return {name: program(f, model.params, tokens) for name, f in functions.items()}


def _errors(
    worker: Worker, folder: Path, programs: dict[str, Any], names: list[str]
) -> tuple[float, float]:
    """Errors of all gradients against torch's, of the first against ``jax.grad``'s."""
    taps = programs["tap all sites"].run()
    worker.ask(what="run", method="hooked")
    worker.ask(what="save", sites=names, path=str(folder / "grads.npz"))
    theirs = np.load(folder / "grads.npz")
    error = max(
        _distance(taps[f"blocks_{name}"].grads, theirs[name.replace("/", ".")])
        for name in names
    )
    own = np.asarray(programs[ALONE].run())
    return error, _distance(taps["blocks_0/resid_pre"].grads, own)


def _distance(ours: Any, theirs: np.ndarray) -> float:
    ours = np.asarray(ours[:, 0]).reshape(theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    lines, misses = measure(tiny=parse_command(BenchmarkConfig, __doc__).tiny)
    for line in lines:
        print({k: line[k] for k in ("method", "ours_s", "ratio", "times_forward")})
    print(misses)
