"""Measure first calls on small arrays: seconds, and programs that are compiled.

    python benchmarks/first_calls.py [--only "CASE;CASE"] [--rounds 5] [--json PATH]

Every call is made in a process of its own, without a cache of compiled programs; the
figures are medians over the processes.  Processor time counts that of all threads, and
other programs change it less than seconds.  "SmolLM2" needs ``toyfeat fetch smollm2``
and is left out without.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row

import toyfeat as ft
from toyfeat.jobs import locate
from toyfeat.models.decoder import Decoder, load_decoder

SIZE = 64
_COMPILED = "/jax/core/compile/backend_compile_duration"
_STAGES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILED,
)
Call = Callable[[], Any]


@dataclass(frozen=True)
class FirstCallsConfig(BenchmarkConfig):
    """Options of this benchmark."""

    only: str = ""
    """Cases, separated by semicolons; all by default."""
    rounds: int = 5
    """Processes per case."""
    child: bool = False
    """Make the call in this process, and print what it took."""


def small_taps() -> ft.Taps:
    """Taps of 64 examples, 64 wide, one gradient each."""
    rng = np.random.default_rng(0)
    acts, grads = rng.standard_normal((2, SIZE, SIZE), np.float32)
    return ft.Taps(jnp.asarray(acts), jnp.asarray(grads[:, None]), jnp.ones(SIZE))


def call_moments() -> Call:
    """Moments of a batch."""
    taps = small_taps()
    return lambda: ft.moments_of(taps)


def call_gradient_pca() -> Call:
    """Gradient PCA of moments that are there."""
    rng = np.random.default_rng(0)
    acts, grads = rng.standard_normal((2, SIZE, SIZE), np.float32)
    arrays = SIZE, acts.mean(0), acts.T @ acts, grads.mean(0), grads.T @ grads / SIZE
    stats = ft.Moments(*(jnp.asarray(x, jnp.float32) for x in arrays))
    return lambda: ft.gradient_pca(stats, rank=5)


def call_decompose() -> Call:
    """Moments and gradient PCA, as in the README."""
    taps = small_taps()
    return lambda: ft.gradient_pca(ft.moments_of(taps), rank=5)


def call_fit() -> Call:
    """Batches, a trainer, its state and twenty updates."""
    taps = small_taps()

    def call() -> Any:
        sae = ft.dictionaries.standard(SIZE, 2 * SIZE)
        trainer = ft.trainer(sae, ft.losses.default(sae, sparsity=0.1))
        batches = ft.data.array_batches(taps._replace(grads=None), batch=16, seed=0)
        state = trainer.init(jax.random.key(0))
        return ft.fit(trainer, state, batches, steps=20, progress=False)

    return call


def call_mixing() -> Call:
    """Check a perceptron for mixing of examples."""
    model, x = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)]), small_taps().acts
    variables, probed = model.init(jax.random.key(0), x), ft.from_linen(model)
    return lambda: ft.check_no_mixing(probed, variables, x)


def call_mixing_smollm2() -> Call:
    """Check SmolLM2 for mixing, on four texts of 16 tokens."""
    model = load_decoder(locate("smollm2"))
    tokens = np.random.default_rng(0).integers(0, 1000, (4, 16)).astype(np.int32)
    probed = ft.from_linen(Decoder(model.config))
    return lambda: ft.check_no_mixing(probed, model.params, jnp.asarray(tokens))


CASES = {
    "moments_of": call_moments,
    "gradient_pca": call_gradient_pca,
    "moments_of, gradient_pca": call_decompose,
    "fit": call_fit,
    "check_no_mixing": call_mixing,
    "check_no_mixing of SmolLM2": call_mixing_smollm2,
}


def measure(name: str) -> dict[str, float]:
    """Make a call for the first time in this process, and count what it took."""
    call = CASES[name]()
    jax.block_until_ready(jax.live_arrays())
    spent: list[tuple[str, float]] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        spent.append((event, duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    start, busy = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return {
        "seconds": time.perf_counter() - start,
        "processor_s": time.process_time() - busy,
        "compile_s": sum(seconds for event, seconds in spent if event in _STAGES),
        "programs": sum(event == _COMPILED for event, _ in spent),
    }


def measure_apart(name: str) -> dict[str, float]:
    """Make the call in a fresh process, without a cache of compiled programs."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, "--child", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"first_calls: {name} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def chosen(config: FirstCallsConfig) -> Iterator[str]:
    """Names of the cases to run."""
    names = config.only.split(";") if config.only else list(CASES)
    for name in names:
        if name not in CASES:
            raise SystemExit(f"first_calls: no case {name!r}; there are {list(CASES)}")
        if "SmolLM2" in name and not config.only:
            try:
                locate("smollm2")
            except FileNotFoundError:
                continue
        yield name


def main() -> None:
    """Measure every case in fresh processes."""
    config = parse_command(FirstCallsConfig, __doc__)
    if config.child:
        print(json.dumps(measure(config.only)))
        return
    rounds = 1 if config.tiny else config.rounds
    names = ["gradient_pca"] if config.tiny else list(chosen(config))
    # In turns, so that a slow spell of the machine is one of all.
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            figures[name].append(measure_apart(name))
    rows = []
    for name, runs in figures.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append(row(name, {"rounds": rounds}, "first call", **middle, error=0.0))
        print(
            f"{name:28} {middle['seconds']:6.2f} s, {middle['processor_s']:6.2f} s of "
            f"the processor, {middle['programs']:.0f} programs",
            flush=True,
        )
    finish(rows, [], config.json)


if __name__ == "__main__":
    main()
