"""Runs our dictionary training for the benchmark, in a process of its own.

The protocol is that of ``peers/dictionaries.py``, with ``group`` (members side by
side), ``attribution`` (add the attribution terms), ``readouts`` and ``steps`` (of a
compiled chunk) in ``prepare``, which answers with what compiling took and needed.
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

import toyfeat as tf
from toyfeat.train.chunks import run_chunk
from toyfeat.types import Array


class Prepared(NamedTuple):
    """A compiled training.

    Attributes:
      run: trains for so many steps, a multiple of the chunk, and waits.
      params: returns the parameters as they are.
      info: seconds of compiling, bytes.
    """

    run: Callable[[int], None]
    params: Callable[[], dict[str, Array]]
    info: dict[str, float]


def dictionary(order: dict[str, Any]) -> tf.Dictionary:
    """The dictionary of an order."""
    size = order["d_in"], order["d_sae"]
    if order["architecture"] in ("topk", "batch_topk"):
        return getattr(tf, order["architecture"])(*size, order["k"])
    return getattr(tf, order["architecture"])(*size)


def trainer(order: dict[str, Any]) -> tf.Trainer:
    """Adam, clipped as SAELens does it, and the usual terms; nothing besides."""
    sae, l1 = dictionary(order), order.get("l1", 1.0)
    objective = tf.dictionary_objective(sae, sparsity=l1)
    if order.get("attribution"):
        objective = tf.attribution_objective(sae, sparsity=l1, dead_latents=1.0)
    plain = {"normalize": False, "center": False, "warm_up": 0, "clip": np.inf}
    adam = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(learning_rate)
        )
    )
    readouts = order.get("readouts", 1)
    done = tf.trainer(sae, objective, adam(3e-4), readouts=readouts, **plain)
    if order.get("members", 1) == 1:
        return done
    return tf.population(done, group=order.get("group"))


def prepare(acts: np.ndarray, order: dict[str, Any]) -> Prepared:
    """Compile a chunk of steps on consecutive rows of the activations."""
    batch, chunk, members = order["batch"], order["steps"], order.get("members", 1)
    made = trainer(order)
    key = jax.random.key(order.get("seed", 0))
    keys = key if members == 1 else jax.random.split(key, members)
    state = made.init(keys, learning_rate=order["lr"])
    given = {k: jnp.asarray(np.load(path)) for k, path in order.get("init", {}).items()}
    if "W_dec" in given:
        given.setdefault("W_enc", jnp.swapaxes(given["W_dec"], -1, -2))
    given = {k: jnp.broadcast_to(v, state.params[k].shape) for k, v in given.items()}
    state = state._replace(params={**state.params, **given})
    grads = None
    if order.get("attribution"):
        shape = len(acts), order.get("readouts", 1), acts.shape[1]
        grads = jax.random.normal(jax.random.key(1), shape)
    data = tf.Taps(jnp.asarray(acts), grads, jnp.ones(len(acts)))

    def take(data: tf.Taps, step: Array) -> tf.Taps:
        first = step % (len(acts) // batch) * batch
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, batch), data
        )

    start = time.perf_counter()
    first = jnp.zeros((), jnp.int32)
    lowered = run_chunk.lower(made.update, take, chunk, state, data, first)
    compiled = lowered.compile()
    info = {"compile_s": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    if memory is not None:
        info["temporary_bytes"] = memory.temp_size_in_bytes
        info["argument_bytes"] = memory.argument_size_in_bytes
    kept = [state]

    def run(steps: int) -> None:
        for begun in range(0, steps, chunk):
            kept[0], metrics, _ = compiled(kept[0], data, jnp.int32(begun))
            jax.block_until_ready(metrics)

    return Prepared(run, lambda: kept[0].params, info)


def main() -> None:
    """Answer until the input ends."""
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
