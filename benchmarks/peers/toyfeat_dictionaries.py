"""Run our dictionary training for a benchmark, in a process of its own.

The protocol is that of ``dictionaries.py`` beside this file.  ``prepare`` also takes
``group`` (members side by side), ``attribution`` (add the attribution terms),
``readouts`` and ``steps`` (of a compiled chunk), and answers with the seconds and bytes
of the compiled program.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import toyfeat as ft
from toyfeat.train.chunks import run_chunk
from toyfeat.types import Array


class Prepared(NamedTuple):
    """A compiled training.

    Attributes:
      run: trains for a number of steps, a multiple of the chunk, and waits.
      params: returns the parameters as they are.
      info: seconds of compiling, bytes.
    """

    run: Callable[[int], None]
    params: Callable[[], dict[str, Array]]
    info: dict[str, float]


def make_dictionary(order: dict[str, Any]) -> ft.Dictionary:
    """Make the dictionary of an order."""
    size = order["d_in"], order["d_sae"]
    if order["architecture"] in ("topk", "batch_topk"):
        return getattr(ft.dictionaries, order["architecture"])(*size, order["k"])
    return getattr(ft.dictionaries, order["architecture"])(*size)


def make_trainer(order: dict[str, Any]) -> ft.Trainer:
    """Make a trainer of Adam, clipped as in SAELens, and the usual terms alone."""
    sae, l1 = make_dictionary(order), order.get("l1", 1.0)
    objective = ft.losses.default(sae, sparsity=l1)
    if order.get("attribution"):
        objective = ft.losses.attribution(sae, sparsity=l1, dead_latents=1.0)
    plain = {"normalize": False, "center": False, "warm_up": 0, "clip": np.inf}
    adam = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(learning_rate)
        )
    )
    readouts = order.get("readouts", 1)
    trainer = ft.trainer(sae, objective, adam(3e-4), readouts=readouts, **plain)
    if order.get("members", 1) == 1:
        return trainer
    return ft.population(trainer, group=order.get("group"))


def prepare(acts: np.ndarray, order: dict[str, Any]) -> Prepared:
    """Compile a chunk of steps on consecutive rows of the activations."""
    batch, chunk, members = order["batch"], order["steps"], order.get("members", 1)
    trainer = make_trainer(order)
    key = jax.random.key(order.get("seed", 0))
    keys = key if members == 1 else jax.random.split(key, members)
    state = trainer.init(keys, learning_rate=order["lr"])
    # Start from the parameters of the order, with an encoder tied to the decoder.
    init = {k: jnp.asarray(np.load(path)) for k, path in order.get("init", {}).items()}
    if "W_dec" in init:
        init.setdefault("W_enc", jnp.swapaxes(init["W_dec"], -1, -2))
    init = {k: jnp.broadcast_to(v, state.params[k].shape) for k, v in init.items()}
    state = state._replace(params={**state.params, **init})
    grads = None
    if order.get("attribution"):
        shape = len(acts), order.get("readouts", 1), acts.shape[1]
        grads = jax.random.normal(jax.random.key(1), shape)
    data = ft.Taps(jnp.asarray(acts), grads, jnp.ones(len(acts)))

    def take(data: ft.Taps, step: Array) -> ft.Taps:
        first = step % (len(acts) // batch) * batch
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, batch), data
        )

    start = time.perf_counter()
    first = jnp.zeros((), jnp.int32)
    lowered = run_chunk.lower(trainer.update, take, chunk, state, data, first)
    compiled = lowered.compile()
    info = {"compile_s": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    if memory is not None:
        info["temporary_bytes"] = memory.temp_size_in_bytes
        info["argument_bytes"] = memory.argument_size_in_bytes
    latest = [state]

    def run(steps: int) -> None:
        for first in range(0, steps, chunk):
            latest[0], metrics, _ = compiled(latest[0], data, jnp.int32(first))
            jax.block_until_ready(metrics)

    return Prepared(run, lambda: latest[0].params, info)


def main() -> None:
    """Answer orders until the input ends."""
    acts, ready = np.zeros((0, 0), np.float32), None
    for line in sys.stdin:
        order = json.loads(line)
        op, answer = order.pop("op"), {}
        if op == "load":
            acts = np.load(order["path"])
        elif op == "prepare":
            ready = prepare(acts, order)
            answer = ready.info
        elif op == "run" and ready is not None:
            wall, cpu = time.perf_counter(), time.process_time()
            ready.run(order["steps"])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            answer = {"seconds": wall, "cpu_seconds": cpu}
        elif op == "save" and ready is not None:
            params = {name: np.asarray(x) for name, x in ready.params().items()}
            np.savez(order["path"], allow_pickle=False, **params)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
