"""Compare taps of the decoder with its forward pass, with torch's hooks and nnsight.

Part of ``benchmarks/tap.py``.  The same random weights, read by ``load_decoder`` from
the files that transformers wrote; gradients are compared before times are.  All sites
are five a block.  nnsight traces the same model in a process of its own, as it patches
torch; without it there is no row for it.  "gradient alone" is ``jax.grad`` of the same
loss by the embedded tokens, with no site returned: what this model's backward pass
costs here.
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
ALONE, ALL = "gradient alone", "tap all sites"
HOOKS = "torch with hooks"


def measure(*, tiny: bool = False) -> tuple[list[dict], list[str]]:
    """Time all of it; rows and missed bars, none without the peers' environment."""
    if not PEERS.exists():
        print("decoder: no peers (bash benchmarks/peers/setup.sh), left out")
        return [], []
    size = TINY if tiny else SIZE
    batch, length = (2, 16) if tiny else (8, 128)
    workers = {HOOKS: Worker(PEERS, HERE / "peers" / "decoder.py", None)}
    try:
        if name := _nnsight(workers[HOOKS]):
            workers[name] = Worker(PEERS, HERE / "peers" / "decoder.py", None)
        with tempfile.TemporaryDirectory() as folder:
            tokens = np.random.default_rng(0).integers(
                0, size["vocab"], (batch, length)
            )
            np.save(Path(folder) / "tokens.npy", tokens)
            where = {"folder": folder, "tokens": f"{folder}/tokens.npy"}
            for worker in workers.values():
                worker.ask(what="make", **where, **size)  # the same seed
            tokens = jnp.asarray(tokens, jnp.int32)
            rows, missed = _measure(workers, Path(folder), tokens, size)
            return rows, [] if tiny and rows else missed  # times of tiny sizes: noise
    finally:
        for worker in workers.values():
            worker.end()


def _nnsight(worker: Worker) -> str | None:
    """Name of nnsight with its version, or ``None`` with a message."""
    version = worker.ask(what="version")["version"]
    if version is None:
        print("decoder: nnsight is not installed (bash benchmarks/peers/setup.sh)")
        return None
    return f"nnsight {version}"


def _measure(
    workers: dict[str, Worker], folder: Path, tokens: jax.Array, size: dict[str, int]
) -> tuple[list[dict], list[str]]:
    """Check the gradients, and only then time all programs; rows and missed bars."""
    names = [f"{i}/{name}" for i in range(size["layers"]) for name in SITES]
    programs = _programs(folder, tokens, names, size["layers"] // 2)
    taps = programs[ALL].run()
    own = np.asarray(programs[ALONE].run())
    errors = {ALONE: _distance(taps["blocks_0/resid_pre"].grads, own)}
    for peer, worker in workers.items():
        errors[peer] = _error(worker, _method(peer), folder, taps, names)
    if not (max(errors.values()) < 1e-3 and errors[ALONE] < 1e-4):
        texts = ", ".join(f"{error:.1e} off {name}" for name, error in errors.items())
        return [], [f"decoder: gradients are {texts}, no time"]
    runs = {name: compiled.run for name, compiled in programs.items()}
    for peer, worker in workers.items():
        runs[peer] = partial(worker.ask, what="run", method=_method(peer))
    runs["torch forward"] = partial(workers[HOOKS].ask, what="run", method="forward")
    seconds = medians(runs, rounds=ROUNDS)
    shape = {**size, "batch": len(tokens), "length": tokens.shape[1]}
    rows = _rows(programs, seconds, errors, shape)
    # The bars: of the time over the forward pass alone, and beside each peer.
    missed = []
    share = seconds[ALL] / seconds["forward"]
    if share > BAR:
        missed.append(f"decoder: all sites take {share:.2f} x the forward, bar {BAR}")
    for peer in workers:
        speed = seconds[peer] / seconds[ALL]
        if speed < 1:
            text = f"decoder: all sites at {speed:.2f} x the speed of {peer}, bar 1"
            missed.append(text)
    return rows, missed


def _method(peer: str) -> str:
    """Name of the worker's method for a peer."""
    return "hooked" if peer == HOOKS else "nnsight"


def _rows(
    programs: dict[str, Any],
    seconds: dict[str, float],
    errors: dict[str, float],
    shape: dict[str, int],
) -> list[dict]:
    """Make a row for every program beside torch's, and one for each further peer."""
    pairs = [(n, "torch forward" if n == "forward" else HOOKS) for n in programs]
    pairs += [(ALL, peer) for peer in errors if peer not in (HOOKS, ALONE)]
    rows = []
    for name, peer in pairs:
        compiled = programs[name]
        error = errors[ALONE] if name == ALONE else errors.get(peer, errors[HOOKS])
        rows.append(
            row(
                "decoder",
                shape,
                name,
                peer=peer,
                ours_s=seconds[name],
                peer_s=seconds[peer],
                ratio=None if name == ALONE else seconds[peer] / seconds[name],
                times_forward=seconds[name] / seconds["forward"],
                flops_times_forward=compiled.flops / programs["forward"].flops,
                error=error,
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
        ALL: tapped([f"blocks_{name}" for name in names]),
        "tap one site": tapped([f"blocks_{middle}/resid_post"]),
    }
    return {name: program(f, model.params, tokens) for name, f in functions.items()}


def _error(
    worker: Worker, method: str, folder: Path, taps: Any, names: list[str]
) -> float:
    """Largest distance of a site's gradients from those of a peer."""
    worker.ask(what="run", method=method)
    worker.ask(what="save", sites=names, path=str(folder / "grads.npz"))
    with np.load(folder / "grads.npz") as theirs:
        return max(
            _distance(taps[f"blocks_{name}"].grads, theirs[name.replace("/", ".")])
            for name in names
        )


def _distance(ours: Any, theirs: np.ndarray) -> float:
    ours = np.asarray(ours[:, 0]).reshape(theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    lines, misses = measure(tiny=parse_command(BenchmarkConfig, __doc__).tiny)
    for line in lines:
        names = ("method", "peer", "ours_s", "ratio", "times_forward", "error")
        print({name: line[name] for name in names})
    print(misses)
